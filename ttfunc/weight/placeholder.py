"""What code gets if it bypasses the `__torch_function__` of a deferred weight or of logits.

Nested tensors, scripted functions and transforms over the weight never call it. They get a
placeholder: one NaN, expanded to the shape, that passes its gradient on to the operands the tensor
is made of. If an operation reads the placeholder, the dispatcher makes the tensor. Code that reads
the memory directly gets an error or NaN, and never wrong numbers.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from ttfunc.rows.token_ids import with_rows
from ttfunc.torch_distributed_private import is_dtensor
from ttfunc.torch_private import (
    COMPARISONS,
    FUNCTIONALIZE,
    at_work,
    in_dual_level,
    in_strict_export,
    is_traced,
    is_wrapped,
    keeps_signature,
    outside_of_dispatch,
    outside_of_transforms,
    plain_torch_function,
    transforms_active,
    wrapper_of,
)
from ttfunc.weight.lazy import Lazy, expanded_nan
from ttfunc.weight.overrides import AS_STRIDED
from ttfunc.weight.rows import Rows, not_mixed


class Reads:
    """How a weight was read, with a flag for each way.

    Compiled code sets a flag without reading it first, so that the code also serves another weight.
    version: the version of the rows when the call began; None for a weight outside of a call.
    """

    def __init__(self, version: int | None = None) -> None:
        self.lookup = self.product = self.dense = False
        self.version = version


class Recipe(Protocol):
    """How to make the tensor that a placeholder stands for, and its gradient."""

    def blank(self, *operands: Any) -> Tensor:
        """The placeholder: a tensor with the shape, dtype and device of the one it stands for."""

    def made(self, *operands: Any) -> Tensor:
        """The tensor itself."""

    def gradient(
        self, grad: Tensor, needs: tuple[bool, ...], *operands: Any
    ) -> tuple[Tensor | None, ...]:
        """The gradient of each operand, given the tensor's; needs: which operands want one."""


def placeholder(recipe: Recipe, *operands: Any) -> Tensor:
    """The placeholder of `recipe.made(*operands)`, with its gradient.

    Within a transform the result is a `Placeholder`, for which the dispatcher makes the tensor.
    Elsewhere the caller makes the result the memory of a lazy tensor, which the dispatcher finds.
    """
    # Only the wrapper of a transform hides the class of the lazy tensor from the dispatcher.
    transformed = any(isinstance(one, Tensor) and is_wrapped(one) for one in operands)
    standing: Tensor = _StandIn.apply(recipe, transformed, *operands)  # type: ignore[no-untyped-call]
    return standing


class _StandIn(torch.autograd.Function):
    @staticmethod
    @keeps_signature
    def forward(recipe: Recipe, transformed: bool, *operands: Any) -> Tensor:
        blank = recipe.blank(*operands)
        return _replaced(blank, lambda: recipe.made(*operands)) if transformed else blank

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.set_materialize_grads(False)  # a tangent of zeros would be as large as the base
        # Not by save_for_backward: many backward passes may use one patch.
        ctx.recipe, _, *ctx.operands = inputs

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return None, None, *ctx.recipe.gradient(grad, ctx.needs_input_grad[2:], *ctx.operands)

    @staticmethod
    def jvp(ctx: Any, _recipe: None, _transformed: None, tangent: Tensor, *_: None) -> Tensor:
        # Forward mode only meets matrices. A matrix is linear in its rows, so its tangent is the
        # matrix of the rows' tangents over a base of 0.
        _, base, *others = ctx.operands
        # Not made from the tangent, which may be a batch.
        nothing = torch.zeros((), dtype=base.dtype, device=base.device).expand(base.shape)
        result: Tensor = _StandIn.apply(ctx.recipe, True, tangent, nothing, *others)  # type: ignore[no-untyped-call]
        return result

    @staticmethod
    def vmap(
        info: Any,
        in_dims: tuple[int | None, ...],
        recipe: Recipe,
        transformed: bool,
        *operands: Any,
    ) -> tuple[Tensor, int]:
        _, _, batched, *dims = in_dims
        if batched is None or any(dim is not None for dim in dims):
            made = torch.vmap(recipe.made, (batched, *dims), randomness=info.randomness)
            return made(*operands), 0
        first, *others = operands
        first = first.movedim(batched, 0)
        standing: Tensor = _StandIn.apply(recipe, transformed, first, *others)  # type: ignore[no-untyped-call]
        return standing, 0


@dataclass(frozen=True)
class _InPlaceOf:
    """Another tensor in the place of the first operand, whose gradient goes to that operand."""

    blank: Callable[..., Tensor]

    def made(self, *operands: Tensor) -> Tensor:
        return self.blank(*operands)

    def gradient(
        self, grad: Tensor, needs: tuple[bool, ...], *operands: Tensor
    ) -> tuple[Tensor | None, ...]:
        return grad, *(None for _ in operands[1:])


def with_values(tensor: Tensor, values: Tensor) -> Any:
    """A copy of `values` whose gradient goes to `tensor`."""
    copy = _InPlaceOf(lambda _, values: values.clone())
    return _StandIn.apply(copy, False, tensor, values.detach())  # type: ignore[no-untyped-call]


def wrapped(fake: Tensor, kind: type[Tensor]) -> Any:
    """`fake.as_subclass(kind)` with a gradient, for a fake tensor, which has no such method."""
    wrapper = _InPlaceOf(lambda fake: wrapper_of(fake, kind))
    with outside_of_transforms():
        return _StandIn.apply(wrapper, False, fake)  # type: ignore[no-untyped-call]


class Placeholder(Lazy):
    """A lazy tensor inside of the wrapper of a transform."""

    __torch_function__ = plain_torch_function  # type: ignore[assignment]

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        viewed = getattr(func, "is_view", False) and isinstance(args[0], Placeholder)
        if func in COMPARISONS or (viewed and func is not AS_STRIDED):
            with outside_of_dispatch():
                seen = func(*args, **(kwargs or {}))
            if func in COMPARISONS:
                return seen
            if isinstance(seen, Tensor):  # transforms make views of it before any read
                make = args[0].make
                return _replaced(seen, lambda: _viewed(func, make(), *args[1:], **(kwargs or {})))
        return cls._dispatched(func, types, args, kwargs)


def _replaced(blank: Tensor, make: Callable[[], Any]) -> Placeholder:
    found = blank.as_subclass(Placeholder)
    found.make, found.piece = make, None
    return found


def _viewed(func: Any, matrix: Tensor, *args: Any, **kwargs: Any) -> Any:
    # The tensor has another layout in memory than the NaN, so its view may need a copy.
    func = torch.ops.aten.reshape if func is torch.ops.aten.view.default else func
    return func(matrix, *args, **kwargs)


def matrix_placeholder(rows: Rows, base: Tensor, reads: Reads, *, whole: bool = True) -> Tensor:
    """One NaN in the shape of the matrix, whose gradient goes to the rows.

    If each example has its own rows, the gradient is refused. `reads` notes a read of the matrix
    itself, which is refused if no rank has the whole of it (not `whole`, or a DTensor).
    """
    new_tokens = rows.new_tokens(base)
    if rows.by_example():
        if torch.compiler.is_dynamo_compiling():
            return _constant(rows, base)
        if _no_placeholder():
            with outside_of_transforms():  # so that the dispatcher finds the weight itself
                return _constant(rows, base)
        recipe = _Matrix(new_tokens, reads, not_mixed, _no_mixed_gradient)
        return placeholder(recipe, rows.values[0], base, rows.places(base)[1])
    if whole and not is_dtensor(base):
        if in_strict_export():
            return _constant(rows, base)
        if _no_placeholder():
            return rows.materialise(base)
        recipe = _Matrix(new_tokens, reads)
    else:
        recipe = _Matrix(new_tokens, reads, _in_parts)
    values, ids = rows.written(base)
    return placeholder(recipe, values, base, ids)


@dataclass(frozen=True)
class _Matrix:
    """`base.index_copy(0, ids, values)`; a transform may put a batch in front of the values.

    no_matrix, no_gradient: make the error if the matrix, or its gradient, cannot be had.
    """

    new_tokens: int
    reads: Reads
    no_matrix: Callable[[], Exception] | None = None
    no_gradient: Callable[[], Exception] | None = None

    def blank(self, values: Tensor, base: Tensor, ids: Tensor) -> Tensor:
        height, width = base.shape[-2:]
        return expanded_nan(values, (*values.shape[:-2], height + self.new_tokens, width))

    def made(self, values: Tensor, base: Tensor, ids: Tensor) -> Tensor:
        if self.no_matrix is not None:
            raise self.no_matrix()
        self.reads.dense = True
        base = base.expand(*values.shape[:-2], *base.shape[-2:])
        return with_rows(base, ids, values, self.new_tokens)

    def gradient(
        self, grad: Tensor, needs: tuple[bool, ...], values: Tensor, base: Tensor, ids: Tensor
    ) -> tuple[Tensor | None, ...]:
        if self.no_gradient is not None:
            raise self.no_gradient()
        grad = grad.to_dense() if grad.is_sparse else grad  # from an embedding with sparse=True
        return grad.index_select(-2, ids), None, None


def _constant(rows: Rows, base: Tensor) -> Tensor:
    """One NaN in the shape of the matrix, without a gradient.

    A graph of `torch.export` with `strict=True` would keep a copy that nothing reads. Dynamo brings
    every read to the handlers.
    """
    return base.new_full((), torch.nan).expand(rows.height(base), base.shape[1])


def _no_placeholder() -> bool:
    """Whether to make the copy at once, because a placeholder could not carry a gradient here.

    torch.compile drops the copy if nothing reads it, and so does make_fx of a transform.
    functionalize, and forward mode without a transform (`torch.autograd.forward_ad`), pay for it.
    """
    if torch.compiler.is_dynamo_compiling() or at_work(FUNCTIONALIZE):
        return True
    return is_traced() if transforms_active() else in_dual_level()


def _in_parts() -> RuntimeError:
    return RuntimeError(
        "a transform reads the token matrix of a sharded model past its patch. Leave the matrix "
        "out of the sharding (ignored_params of fully_shard), or use loss.backward()."
    )


def _no_mixed_gradient() -> RuntimeError:
    return RuntimeError(
        "the gradient of a mixed patch went through an autograd.Function of the model's own, which "
        "expects one matrix. Call the model separately for each adapter's examples."
    )
