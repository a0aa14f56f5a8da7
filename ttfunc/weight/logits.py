"""Deferred logits: a product of hidden states and a patched weight that has not happened yet.

A loss can be had without them (see loss.py). What models do to logits on the way there stays
undone with the product: shapes are those of the hidden states, and casts, scales and softcaps are
noted. Anything else makes the logits, and gives what it gives without deferring.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from ttfunc.indices import outside_of_autocast
from ttfunc.torch_private import (
    first_order,
    forbid_writes,
    keeps_signature,
    no_torch_function,
    transforms_active,
    tree_leaves,
    tree_map,
    version_of,
)
from ttfunc.weight.loss import Steps, gradients, in_steps
from ttfunc.weight.overrides import ANSWERED_BY_BASE, ANSWERED_BY_PLACEHOLDER, OfEach, written_by
from ttfunc.weight.placeholder import placeholder_of
from ttfunc.weight.reads import SharedRows, autocast, cast_like, patched_product
from ttfunc.weight.source import RowPatch

_HANDLERS: dict[Any, Callable[..., Any]] = {}
Handler = TypeVar("Handler", bound=Callable[..., Any])

# Questions that the NaN in their place answers, which has their shape, dtype and history.
_METADATA = (ANSWERED_BY_BASE | ANSWERED_BY_PLACEHOLDER) - {
    *(Tensor.is_contiguous, Tensor.stride, Tensor.storage_offset, Tensor.untyped_storage),
}


class Undone(NamedTuple):
    """The operands of a product, and what the model does to it.

    hidden: `(..., D)`. base, rows, bias: as the product takes them, cast by autocast. steps: from
    the product to these logits, one position at a time.
    """

    hidden: Tensor
    rows: SharedRows
    base: Tensor
    bias: Tensor | None
    steps: Steps
    versions: tuple[tuple[Tensor, int | None], ...]

    def operands(self) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor]:
        """Hidden states, base, rows, bias and ids, as a product takes them.

        Raises RuntimeError where one of them was written to since.
        """
        if any(version_of(tensor) != known for tensor, known in self.versions):
            raise RuntimeError(
                "these logits were deferred, and are read only now that the hidden states or the "
                "rows they are made of were written to (by a step of an optimizer, say). Read them "
                "before that, or leave deferred_logits=True out of patch."
            )
        ids = self.rows.indices.on(self.base.device).ids
        rows = cast_like(self.rows.values, self.base)
        return self.hidden, self.base, rows, self.bias, ids

    def done(self) -> Tensor:
        """The logits themselves. Raises as `operands`."""
        hidden, base, _, bias, _ = self.operands()
        # They were cast as autocast was when the model multiplied.
        with outside_of_autocast(hidden.device):
            return in_steps(self.steps, self.rows.product(hidden, base, bias))


def implements(*functions: Any) -> Callable[[Handler], Handler]:
    """Registers what deferred logits do in place of these torch functions."""

    def register(handler: Handler) -> Handler:
        _HANDLERS.update(dict.fromkeys(functions, handler))
        return handler

    return register


class DeferredLogits(Tensor):
    """`(..., V)` logits that are made when something reads them.

    made: the logits, once they were made. written: whether something was written to them. family:
    the other logits that would lie in the same memory.
    """

    undone: Undone
    made: Tensor | None
    written: bool
    family: weakref.WeakSet[DeferredLogits]

    @classmethod
    def __torch_function__(
        cls,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if all(one.made is None for one in _deferred_in(args, kwargs)):
            if func in _METADATA:
                with no_torch_function():
                    return func(*args, **kwargs)
            handler = _HANDLERS.get(func)
            result = NotImplemented if handler is None else handler(*args, **kwargs)
            if result is not NotImplemented:
                return result
        for one in _deferred_in(written_by(func, args, kwargs)):
            one.prepare_write()
        return func(*tree_map(done, args), **tree_map(done, kwargs))

    # As a patched weight's: for code that bypasses __torch_function__.
    __torch_dispatch__ = OfEach()

    @classmethod
    def _dispatched(
        cls,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if _deferred_in(written_by(func, args, kwargs)):
            raise RuntimeError(
                f"{func} would write to deferred logits without having made them. Leave "
                "deferred_logits=True out of patch."
            )
        with torch.no_grad():
            return func(*tree_map(done, args), **tree_map(done, kwargs))

    def prepare_write(self) -> None:
        """Make the logits, for something to write to. Raises if others share their memory."""
        if len(self.family) > 1:
            raise RuntimeError(
                "a model writes to deferred logits of which it also holds a view, and the view "
                "would not see it. Leave deferred_logits=True out of patch."
            )
        self.made, self.written = done(self), True

    def like(self, undone: Undone, *, same_memory: bool) -> DeferredLogits:
        """Logits made of these."""
        return _wrap(undone, self.family if same_memory else weakref.WeakSet())


def done(value: Any) -> Any:
    """The logits themselves for deferred ones; any other value as it is."""
    if not isinstance(value, DeferredLogits):
        return value
    if value.made is not None:
        with no_torch_function():
            wanted = torch.is_grad_enabled() and value.requires_grad
        if value.written or value.made.requires_grad or not wanted:
            return value.made
    made = value.undone.done()
    if not transforms_active():  # in which the next read may be at another level
        value.made = made
    return made


def defer(hidden: Tensor, rows: SharedRows, base: Tensor, bias: Tensor | None) -> DeferredLogits:
    """`rows.product(hidden, base, bias)`, not done yet."""
    bias = None if bias is None else autocast(bias)
    hidden, base = autocast(hidden), autocast(base)
    operands = [one for one in (hidden, rows.values, base, bias) if one is not None]
    versions = tuple((one, version_of(one)) for one in operands)
    return _wrap(Undone(hidden, rows, base, bias, (), versions), weakref.WeakSet())


def can_defer(hidden: Tensor, rows: RowPatch, bias: Tensor | None) -> bool:
    """Whether a loss of the product can be had without it, as far as one can see beforehand."""
    if torch.compiler.is_dynamo_compiling() or hidden.is_meta or not isinstance(rows, SharedRows):
        return False
    # The gradient of a bias sums over all positions.
    return not (bias is not None and bias.requires_grad) and first_order(hidden, rows.values)


def wants_gradient(hidden: Tensor, rows: RowPatch) -> bool:
    """Whether this is a step of training. Elsewhere someone reads the logits."""
    return torch.is_grad_enabled() and (hidden.requires_grad or rows.values.requires_grad)


def _wrap(undone: Undone, family: weakref.WeakSet[DeferredLogits]) -> DeferredLogits:
    operands, transformed = undone.operands(), transforms_active()
    dtype = in_steps(undone.steps, undone.hidden.new_empty(0)).dtype
    nan = _NotMade.apply(*operands, undone.rows.grown, undone.steps, dtype, transformed)  # type: ignore[no-untyped-call]
    logits = nan.as_subclass(DeferredLogits)
    logits.undone, logits.made, logits.written, logits.family = undone, None, False, family
    family.add(logits)
    return logits  # type: ignore[no-any-return]


def _deferred_in(*values: Any) -> list[DeferredLogits]:
    return [one for one in tree_leaves(values) if isinstance(one, DeferredLogits)]


class _NotMade(torch.autograd.Function):
    """A NaN in the shape of the logits, with their gradient."""

    @staticmethod
    @keeps_signature
    def forward(
        hidden: Tensor,
        base: Tensor,
        rows: Tensor,
        bias: Tensor | None,
        ids: Tensor,
        grown: int,
        steps: Steps,
        dtype: torch.dtype,
        transformed: bool,
    ) -> Tensor:
        nan = hidden.new_full((), torch.nan, dtype=dtype)
        forbid_writes(nan)
        nan = nan.expand(*hidden.shape[:-1], len(base) + grown)
        if not transformed:  # the logits themselves are what the dispatcher finds
            return nan
        return placeholder_of(nan, lambda: _made(hidden, base, rows, bias, ids, grown, steps))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        *operands, ctx.grown, ctx.steps, _, _ = inputs
        ctx.save_for_backward(*operands)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        hidden, base, rows, bias, ids = ctx.saved_tensors

        def made(hidden: Tensor, rows: Tensor) -> Tensor:
            return _made(hidden, base, rows, bias, ids, ctx.grown, ctx.steps)

        first, second = gradients(made, hidden, rows, grad, ctx.needs_input_grad)
        return first, None, second, *(None,) * 6

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], *operands: Any) -> tuple[Tensor, int]:
        hidden, *others = operands
        if all(dim is None for dim in in_dims[1:5]) and in_dims[0] is not None:
            nan: Tensor = _NotMade.apply(hidden.movedim(in_dims[0], 0), *others)  # type: ignore[no-untyped-call]
            return nan, 0
        made = torch.vmap(_made, in_dims[:-2], randomness=info.randomness)
        return made(*operands[:-2]), 0


def _made(
    hidden: Tensor,
    base: Tensor,
    rows: Tensor,
    bias: Tensor | None,
    ids: Tensor,
    grown: int,
    steps: Steps,
) -> Tensor:
    with outside_of_autocast(hidden.device):
        return in_steps(steps, patched_product(hidden, base, rows, bias, ids, grown))
