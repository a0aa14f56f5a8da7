"""Deferred logits: a product of hidden states and a patched weight that has not happened yet.

A loss needs no logits (see loss.py). What a model does to logits on the way to its loss is put off
with the product: a change of shape is made to the hidden states, and casts, scales and softcaps are
noted. Any other function gets the logits, and returns what it returns without deferring.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from ttfunc.rows.token_ids import TokenIndices
from ttfunc.torch_private import (
    TensorBase,
    first_order,
    is_traced,
    no_torch_function,
    outside_of_modes,
    transform_depth,
    transforms_active,
    tree_leaves,
    version_of,
)
from ttfunc.weight.lazy import Lazy, expanded_nan
from ttfunc.weight.loss import Steps, gradients, in_steps, made_of
from ttfunc.weight.overrides import registry
from ttfunc.weight.placeholder import placeholder, with_values
from ttfunc.weight.product import autocast, cast_like, long_bias
from ttfunc.weight.rows import Rows

# For each torch function that needs no logits, its handler (see logit_handlers.py).
_HANDLERS, implements = registry()

# Questions about the layout in memory, which the NaN does not have.
_LAYOUT = {Tensor.is_contiguous, Tensor.stride, Tensor.storage_offset}
# Hooks and shared memory need the logits themselves.
_IDENTITY = {Tensor.untyped_storage, vars(TensorBase)["grad_fn"].__get__}


class PendingProduct(NamedTuple):
    """The operands of a product that is put off, and what the model does to its result.

    hidden: `(..., D)`. base, rows, bias: as autocast casts them for the product. The rows are a
    copy, so that the step of an optimizer does not change these logits. steps: functions of the
    product that give the logits, and treat each position alone. versions: each tensor that the
    product reads in place, with its version when it was put off.
    """

    hidden: Tensor
    base: Tensor
    rows: Tensor
    bias: Tensor | None
    indices: TokenIndices
    steps: Steps
    versions: tuple[tuple[Tensor, int | None], ...]

    def checked(self) -> PendingProduct:
        """Itself. Raises RuntimeError if the hidden states or the matrix were written to since."""
        if any(version_of(tensor) != known for tensor, known in self.versions):
            raise RuntimeError(
                "these logits were deferred, and are read only now that the hidden states or the "
                "matrix that they are made of were written to. Read them before that, or leave "
                "deferred_logits=True out of patch."
            )
        return self

    def made(self) -> Tensor:
        """The logits themselves. Raises as `checked`."""
        hidden, base, rows, bias, indices, steps, _ = self.checked()
        return made_of(steps, hidden, base, rows, bias, indices)


class Memory:
    """The one tensor of logits that several views share once it is made.

    depth: how many transforms were at work when the product was put off.
    """

    def __init__(self, pending: PendingProduct) -> None:
        self.pending, self.depth = pending, transform_depth()
        self.made: Tensor | None = None

    def filled(self) -> Tensor:
        """The logits with their graph. The first read makes them."""
        if self.made is not None:
            return self.made
        with torch.enable_grad():
            made = self.pending.made()
        # A further transform, or inference mode, makes logits that are of no use outside of it.
        if transform_depth() == self.depth and not made.is_inference():
            self.made = made
        return made


class DeferredLogits(Lazy):
    """`(..., V)` logits that are made when something reads them.

    pending: the product that makes them. memory: the tensor that all views of them share; views:
    the operations from that tensor to these logits. meta: a tensor on meta with their size and
    strides. own_grad_fn: the `grad_fn` that they were made with; another function may have put its
    own in that place since. known: the logits, once they are made.
    """

    pending: PendingProduct
    memory: Memory
    views: tuple[Callable[[Tensor], Tensor], ...]
    meta: Tensor
    own_grad_fn: object
    known: Tensor | None

    @property
    def is_pending(self) -> bool:
        """Whether nothing has read these logits, or others in the same memory."""
        with no_torch_function():
            own = self.grad_fn is self.own_grad_fn
        return own and self.known is None and self.memory.made is None

    def answering(self, question: Callable[..., Any]) -> Tensor:
        """The tensor that answers: the NaN, which has their shape, dtype and history."""
        if not self.is_pending or question in _IDENTITY:
            return self.made()
        return self.meta if question in _LAYOUT else self

    def now(self) -> DeferredLogits:
        """Itself: no engine gathers logits."""
        return self

    @classmethod
    def handled(cls, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The result of a handler; NotImplemented if any logits among the arguments were read."""
        given = tree_leaves((args, kwargs))
        if not all(one.is_pending for one in given if isinstance(one, DeferredLogits)):
            return NotImplemented
        return super().handled(func, args, kwargs)

    def made(self) -> Tensor:
        """The logits, with the `grad_fn` that another function may have given to these."""
        if self.known is not None:
            return self.known
        made = self.values()
        with no_torch_function():
            if self.grad_fn is not self.own_grad_fn:
                made = with_values(self.as_subclass(Tensor), made)
        if self.memory.made is not None:
            self.known = made
        return made

    def values(self) -> Tensor:
        """The logits, with the graph of the product that was put off."""
        made = self.memory.filled()
        with torch.enable_grad():
            for view in self.views:
                made = view(made)
        return made

    def loses_writes(self) -> bool:
        """Logits are made once, and keep what is written to them."""
        return False

    def view_by(self, pending: PendingProduct, view: Callable[[Tensor], Tensor]) -> DeferredLogits:
        """The result of `view`, which shares their memory."""
        return pending_logits(pending, self.memory, (*self.views, view), self.meta_after(view))

    def meta_after(self, view: Callable[[Tensor], Tensor]) -> Tensor:
        """A tensor on meta with the size and strides of the result of `view`."""
        with outside_of_modes():
            return view(self.meta)


@dataclass(frozen=True)
class _Logits:
    """The logits as a function of hidden states, base, rows and bias."""

    pending: PendingProduct
    dtype: torch.dtype

    def blank(self, hidden: Tensor, base: Tensor, *others: Any) -> Tensor:
        shape = (*hidden.shape[:-1], self.pending.indices.height(len(base)))
        return expanded_nan(hidden, shape, self.dtype)

    def made(self, hidden: Tensor, base: Tensor, rows: Tensor, bias: Tensor | None) -> Tensor:
        return made_of(self.pending.steps, hidden, base, rows, bias, self.pending.indices)

    def gradient(
        self, grad: Tensor, needs: tuple[bool, ...], *operands: Any
    ) -> tuple[Tensor | None, ...]:
        self.pending.checked()  # torch checks what a function saves, and the operands are not saved
        hidden, base, rows, bias = operands
        first, second = gradients(
            lambda hidden, rows: self.made(hidden, base, rows, bias), hidden, rows, grad, needs
        )
        return first, None, second, None


def defer(rows: Rows, hidden: Tensor, base: Tensor, bias: Tensor | None) -> DeferredLogits:
    """`rows.product(hidden, base, bias)`, put off until something reads it."""
    hidden, base = autocast(hidden), autocast(base)
    indices = cast(TokenIndices, rows.ids)
    bias = long_bias(bias, base, indices)
    versions = tuple((one, version_of(one)) for one in (hidden, base, bias) if one is not None)
    kept = _kept(rows.values, base)
    return pending_logits(PendingProduct(hidden, base, kept, bias, indices, (), versions))


def _kept(values: Tensor, base: Tensor) -> Tensor:
    """A copy of the rows, in the product's dtype.

    An optimizer's step writes to the rows, often without a new version, and the logits must stay
    those from before it. Rows that were written to get no gradient: torch refuses likewise where a
    product has saved an operand for its backward.
    """
    cast = cast_like(values, base)
    if cast is not values:
        return cast
    copy, version = values.clone(), version_of(values)

    def check(grad: Tensor) -> None:
        if version_of(values) != version:
            raise RuntimeError(
                "the gradient of deferred logits is asked for only now that the rows that they are "
                "made of have been modified by an inplace operation (a step of an optimizer, a "
                "clamp). Call backward before that, or make the logits anew."
            )

    if copy.requires_grad and not transforms_active():
        copy.register_hook(check)
    return copy


def can_defer(hidden: Tensor, rows: Tensor, bias: Tensor | None) -> bool:
    """Whether a loss may be computed without the logits; a later read may still make them."""
    traced = torch.compiler.is_dynamo_compiling() or is_traced()
    if traced or hidden.is_meta:
        return False
    # The gradient of a bias sums over all positions.
    return not (bias is not None and bias.requires_grad) and first_order(hidden, rows)


def pending_logits(
    pending: PendingProduct,
    memory: Memory | None = None,
    views: tuple[Callable[[Tensor], Tensor], ...] = (),
    meta: Tensor | None = None,
) -> DeferredLogits:
    """DeferredLogits of a product, in new memory or as a view; under no_grad without gradient."""
    pending = pending.checked()
    if not torch.is_grad_enabled():
        pending = pending._replace(hidden=pending.hidden.detach(), rows=pending.rows.detach())
        views = (*views, Tensor.detach)
    dtype = in_steps(pending.steps, pending.hidden.new_empty(0)).dtype
    hidden, base, rows, bias, *_ = pending
    nan = placeholder(_Logits(pending, dtype), hidden, base, rows, bias)
    if meta is None:
        with outside_of_modes():
            meta = torch.empty(nan.shape, dtype=dtype, device="meta")
    logits: DeferredLogits = nan.as_subclass(DeferredLogits)
    logits.pending, logits.memory = pending, memory or Memory(pending)
    logits.views, logits.meta, logits.known = views, meta, None
    with no_torch_function():
        logits.own_grad_fn = logits.grad_fn
    return logits


DeferredLogits.handlers = _HANDLERS
