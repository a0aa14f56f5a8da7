"""Deferred logits: a product of hidden states and a patched weight that has not happened yet.

A loss can be had without them (see loss.py). What models do to logits on the way there stays
undone with the product: shapes are those of the hidden states, and casts, scales and softcaps are
noted. Anything else makes the logits, and gives what it gives without deferring.
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
# What can be hooked or shared: the logits themselves must answer.
_IDENTITY = {Tensor.untyped_storage, vars(TensorBase)["grad_fn"].__get__}


class Undone(NamedTuple):
    """The operands of a product, and what the model does to it.

    hidden: `(..., D)`. base, rows, bias: as the product takes them, cast by autocast; the rows have
    a memory of their own, so that a step of an optimizer leaves these logits as they are. steps:
    from the product to these logits, one position at a time. versions: of the tensors that the
    product would have read.
    """

    hidden: Tensor
    base: Tensor
    rows: Tensor
    bias: Tensor | None
    indices: TokenIndices
    steps: Steps
    versions: tuple[tuple[Tensor, int | None], ...]

    def checked(self) -> Undone:
        """The same. Raises RuntimeError where the hidden states or the matrix were written to."""
        if any(version_of(tensor) != known for tensor, known in self.versions):
            raise RuntimeError(
                "these logits were deferred, and are read only now that the hidden states or the "
                "matrix that they are made of were written to. Read them before that, or leave "
                "deferred_logits=True out of patch."
            )
        return self

    def done(self) -> Tensor:
        """The logits themselves. Raises as `checked`."""
        hidden, base, rows, bias, indices, steps, _ = self.checked()
        return made_of(steps, hidden, base, rows, bias, indices)


class Memory:
    """Where logits lie once they are made: one tensor, of which there may be views.

    depth: how many transforms were at work around them.
    """

    def __init__(self, undone: Undone) -> None:
        self.undone, self.depth = undone, transform_depth()
        self.made: Tensor | None = None

    def filled(self) -> Tensor:
        """The logits, made by the first who asks, and with their graph."""
        if self.made is not None:
            return self.made
        with torch.enable_grad():
            made = self.undone.done()
        # What is made within a further transform, or for inference alone, is of use there alone.
        if transform_depth() == self.depth and not made.is_inference():
            self.made = made
        return made


class DeferredLogits(Lazy):
    """`(..., V)` logits that are made when something reads them.

    undone: what these are made of. memory: where they will lie; `views` lead to them from there.
    blank: a tensor on meta of their size and strides. node: their `grad_fn`, unless a function of
    someone else replaces it. known: the logits, once they are made.
    """

    undone: Undone
    memory: Memory
    views: tuple[Callable[[Tensor], Tensor], ...]
    blank: Tensor
    node: object
    known: Tensor | None

    @property
    def waits(self) -> bool:
        """Whether nothing has read them, nor those in the same memory."""
        with no_torch_function():
            own = self.grad_fn is self.node
        return own and self.known is None and self.memory.made is None

    def answering(self, question: Callable[..., Any]) -> Tensor:
        """The NaN, which has their shape, dtype and history, as far as it knows."""
        if not self.waits or question in _IDENTITY:
            return self.made()
        return self.blank if question in _LAYOUT else self

    def now(self) -> DeferredLogits:
        """These."""
        return self

    @classmethod
    def handled(cls, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """As a Lazy's; nothing where some have been read."""
        given = tree_leaves((args, kwargs))
        if not all(one.waits for one in given if isinstance(one, DeferredLogits)):
            return NotImplemented
        return super().handled(func, args, kwargs)

    def made(self) -> Tensor:
        """The logits themselves, with the gradient that these have by now."""
        if self.known is not None:
            return self.known
        made = self.values()
        with no_torch_function():
            if self.grad_fn is not self.node:
                made = with_values(self.as_subclass(Tensor), made)
        if self.memory.made is not None:
            self.known = made
        return made

    def values(self) -> Tensor:
        """The logits, with the graph that they had when they were deferred."""
        made = self.memory.filled()
        with torch.enable_grad():
            for view in self.views:
                made = view(made)
        return made

    def loses_writes(self) -> bool:
        """Never: they are made once."""
        return False

    def view_by(self, undone: Undone, view: Callable[[Tensor], Tensor]) -> DeferredLogits:
        """These after `view`, which is a view of their memory."""
        blank = self.blank_after(view)
        return waiting(undone, self.memory, (*self.views, view), blank)

    def blank_after(self, view: Callable[[Tensor], Tensor]) -> Tensor:
        """The size and the strides that these have after it."""
        with outside_of_modes():
            return view(self.blank)


@dataclass(frozen=True)
class _Logits:
    """The logits as a function of hidden states, base, rows and bias."""

    undone: Undone
    dtype: torch.dtype

    def blank(self, hidden: Tensor, base: Tensor, *others: Any) -> Tensor:
        shape = (*hidden.shape[:-1], self.undone.indices.height(len(base)))
        return expanded_nan(hidden, shape, self.dtype)

    def made(self, hidden: Tensor, base: Tensor, rows: Tensor, bias: Tensor | None) -> Tensor:
        return made_of(self.undone.steps, hidden, base, rows, bias, self.undone.indices)

    def gradient(
        self, grad: Tensor, needs: tuple[bool, ...], *operands: Any
    ) -> tuple[Tensor | None, ...]:
        self.undone.checked()  # torch checks what a function saves, and the operands are not saved
        hidden, base, rows, bias = operands
        first, second = gradients(
            lambda hidden, rows: self.made(hidden, base, rows, bias), hidden, rows, grad, needs
        )
        return first, None, second, None


def defer(rows: Rows, hidden: Tensor, base: Tensor, bias: Tensor | None) -> DeferredLogits:
    """`rows.product(hidden, base, bias)`, not done yet."""
    hidden, base = autocast(hidden), autocast(base)
    indices = cast(TokenIndices, rows.ids)
    bias = long_bias(bias, base, indices)
    versions = tuple((one, version_of(one)) for one in (hidden, base, bias) if one is not None)
    kept = _kept(rows.values, base)
    return waiting(Undone(hidden, base, kept, bias, indices, (), versions))


def _kept(values: Tensor, base: Tensor) -> Tensor:
    """Rows as the product takes them, in a memory of their own.

    A step of an optimizer writes to the rows, often past their version, and the logits of the step
    are those from before. Rows that were written to since get no gradient: torch says the same of
    an operand that a product has kept for its backward.
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
    """Whether a loss of the product can be had without it, as far as one can see beforehand."""
    traced = torch.compiler.is_dynamo_compiling() or is_traced()
    if traced or hidden.is_meta:
        return False
    # The gradient of a bias sums over all positions.
    return not (bias is not None and bias.requires_grad) and first_order(hidden, rows)


def waiting(
    undone: Undone,
    memory: Memory | None = None,
    views: tuple[Callable[[Tensor], Tensor], ...] = (),
    blank: Tensor | None = None,
) -> DeferredLogits:
    """Logits that wait, in a memory of their own or as a view; under no_grad without a gradient."""
    undone = undone.checked()
    if not torch.is_grad_enabled():
        undone = undone._replace(hidden=undone.hidden.detach(), rows=undone.rows.detach())
        views = (*views, Tensor.detach)
    dtype = in_steps(undone.steps, undone.hidden.new_empty(0)).dtype
    nan = placeholder(_Logits(undone, dtype), undone.hidden, undone.base, undone.rows, undone.bias)
    if blank is None:
        with outside_of_modes():
            blank = torch.empty(nan.shape, dtype=dtype, device="meta")
    logits: DeferredLogits = nan.as_subclass(DeferredLogits)
    logits.undone, logits.memory = undone, memory or Memory(undone)
    logits.views, logits.blank, logits.known = views, blank, None
    with no_torch_function():
        logits.node = logits.grad_fn
    return logits


DeferredLogits.handlers = _HANDLERS
