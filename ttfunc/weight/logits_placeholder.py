"""What deferred logits hold: one NaN in their shape, with their gradient, and their rows."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ttfunc.rows.token_ids import TokenIndices
from ttfunc.torch_private import forbid_writes, keeps_signature, transforms_active, version_of
from ttfunc.weight.loss import Steps, gradients, made_of
from ttfunc.weight.placeholder import placeholder_of
from ttfunc.weight.product import cast_like


class LogitsPlaceholder(torch.autograd.Function):
    """A NaN in the shape of the logits, with their gradient."""

    @staticmethod
    @keeps_signature
    def forward(
        hidden: Tensor,
        base: Tensor,
        rows: Tensor,
        bias: Tensor | None,
        indices: TokenIndices,
        steps: Steps,
        dtype: torch.dtype,
        transformed: bool,
    ) -> Tensor:
        nan = hidden.new_full((), torch.nan, dtype=dtype)
        forbid_writes(nan)
        nan = nan.expand(*hidden.shape[:-1], indices.height(len(base)))
        if not transformed:  # the logits themselves are what the dispatcher finds
            return nan
        return placeholder_of(nan, lambda: made_of(hidden, base, rows, bias, indices, steps))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        *operands, ctx.indices, ctx.steps, _, _ = inputs
        ctx.save_for_backward(*operands)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        hidden, base, rows, bias = ctx.saved_tensors

        def made(hidden: Tensor, rows: Tensor) -> Tensor:
            return made_of(hidden, base, rows, bias, ctx.indices, ctx.steps)

        first, second = gradients(made, hidden, rows, grad, ctx.needs_input_grad)
        return first, None, second, *(None,) * 5

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], *operands: Any) -> tuple[Tensor, int]:
        hidden, *others = operands
        if all(dim is None for dim in in_dims[1:5]) and in_dims[0] is not None:
            nan: Tensor = LogitsPlaceholder.apply(hidden.movedim(in_dims[0], 0), *others)  # type: ignore[no-untyped-call]
            return nan, 0
        made = torch.vmap(made_of, in_dims[:-2], randomness=info.randomness)
        return made(*operands[:-2]), 0


def kept(values: Tensor, base: Tensor) -> Tensor:
    """Rows as the product takes them, in a memory of their own.

    A step of an optimizer writes to the rows, often past their version, and the logits of the step
    are those from before.
    """
    cast = cast_like(values, base)
    if cast is not values:
        return cast
    return values.clone() if transforms_active() else _Kept.apply(values)  # type: ignore[no-untyped-call]


class _Kept(torch.autograd.Function):
    """A copy of the rows. It gives no gradient to rows that were written to since.

    torch says the same of an operand that a product has kept for its backward.
    """

    @staticmethod
    @keeps_signature
    def forward(ctx: Any, values: Tensor) -> Tensor:
        # Not by save_for_backward: several losses may be made of the same logits.
        ctx.values, ctx.version = values, version_of(values)
        return values.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        if version_of(ctx.values) != ctx.version:
            raise RuntimeError(
                "the gradient of deferred logits is asked for only now that the rows that they are "
                "made of have been modified by an inplace operation (a step of an optimizer, a "
                "clamp). Call backward before that, or make the logits anew."
            )
        return grad
