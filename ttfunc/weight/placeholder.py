"""What code gets that bypasses the `__torch_function__` of a weight, or of logits, that wait.

Nested tensors, scripted functions, transforms over the weight and the like never call it. They get
a placeholder: one NaN, expanded to the shape, whose gradient goes to what the tensor is made of.
The dispatcher makes the tensor in its place where an operation reads it; code that reads the memory
itself gets an error or NaN, never numbers that are wrong.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from ttfunc.torch_private import (
    COMPARISONS,
    forbid_writes,
    is_wrapped,
    keeps_signature,
    outside_of_dispatch,
    outside_of_transforms,
    plain_torch_function,
    tree_map,
    wrapper_of,
)
from ttfunc.weight.overrides import refuse_writes


class Reads:
    """How a weight was read, with a flag for each way.

    Compiled code sets a flag without reading it first, so that it also serves another weight.
    version: the version of the rows when the call began; None for a weight outside of a call.
    """

    def __init__(self, version: int | None = None) -> None:
        self.lookup = self.product = self.dense = False
        self.version = version


class Recipe(Protocol):
    """What a placeholder stands for: a function of some operands, and its gradient."""

    def blank(self, *operands: Any) -> Tensor:
        """What stands in its place: a tensor of its shape, dtype and device."""

    def made(self, *operands: Any) -> Tensor:
        """The tensor itself."""

    def gradient(
        self, grad: Tensor, needs: tuple[bool, ...], *operands: Any
    ) -> tuple[Tensor | None, ...]:
        """The gradient of each operand, given the tensor's; `needs` says which are asked for."""


def placeholder(recipe: Recipe, *operands: Any) -> Tensor:
    """What stands in the place of `recipe.made(*operands)`, with its gradient.

    Within a transform it is a tensor that the dispatcher replaces. Elsewhere the lazy tensor, which
    takes this as its memory, is what the dispatcher finds.
    """
    # Only a wrapper of a transform takes the class of the lazy tensor off.
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
        ctx.set_materialize_grads(False)  # no zeros of the size of the base for its tangent
        # Not by save_for_backward: a patch that is made once is used by many backward passes.
        ctx.recipe, _, *ctx.operands = inputs

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return None, None, *ctx.recipe.gradient(grad, ctx.needs_input_grad[2:], *ctx.operands)

    @staticmethod
    def jvp(ctx: Any, _recipe: None, _transformed: None, tangent: Tensor, *_: None) -> Tensor:
        # Forward mode meets a matrix alone. It is linear in its rows: its tangent is the matrix of
        # the rows' tangents over a base of 0.
        _, base, *others = ctx.operands
        # Not made of the tangent, which may be a batch.
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


def expanded_nan(
    like: Tensor, shape: tuple[int, ...] | torch.Size, dtype: torch.dtype | None = None
) -> Tensor:
    """One NaN of the device and dtype of another tensor, expanded to a shape."""
    nan = like.new_full((), torch.nan, dtype=dtype or like.dtype)
    forbid_writes(nan)
    return nan.expand(shape)


@dataclass(frozen=True)
class _InPlaceOf:
    """Another tensor in the place of the first operand, with the gradient of that one."""

    blank: Callable[..., Tensor]

    def made(self, *operands: Tensor) -> Tensor:
        return self.blank(*operands)

    def gradient(
        self, grad: Tensor, needs: tuple[bool, ...], *operands: Tensor
    ) -> tuple[Tensor | None, ...]:
        return grad, *(None for _ in operands[1:])


def with_values(tensor: Tensor, values: Tensor) -> Any:
    """A copy of `values` that has the gradient of `tensor`."""
    copy = _InPlaceOf(lambda _, values: values.clone())
    return _StandIn.apply(copy, False, tensor, values.detach())  # type: ignore[no-untyped-call]


def wrapped(fake: Tensor, kind: type[Tensor]) -> Any:
    """A fake tensor as one of a class, with its gradient; `as_subclass` does not work on it."""
    wrapper = _InPlaceOf(lambda fake: wrapper_of(fake, kind))
    with outside_of_transforms():
        return _StandIn.apply(wrapper, False, fake)  # type: ignore[no-untyped-call]


class Placeholder(Tensor):
    """A NaN that the dispatcher replaces: `made` makes the tensor anew for each operation.

    It is for transforms, which work on it within their wrappers.
    """

    made: Callable[[], Tensor]

    __torch_function__ = plain_torch_function  # type: ignore[assignment]

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        refuse_writes(func, args, kwargs, _is_placeholder)
        if func in COMPARISONS or (getattr(func, "is_view", False) and _is_placeholder(args[0])):
            with outside_of_dispatch():
                seen = func(*args, **kwargs)
            if func in COMPARISONS:
                return seen
            if isinstance(seen, Tensor):  # a transform makes views of it before any read
                made = args[0].made
                return _replaced(seen, lambda: _viewed(func, made(), *args[1:], **kwargs))
        return func(*tree_map(_made, args), **tree_map(_made, kwargs))


def _replaced(blank: Tensor, made: Callable[[], Any]) -> Placeholder:
    found = blank.as_subclass(Placeholder)
    found.made = made
    return found


def _viewed(func: Any, matrix: Tensor, *args: Any, **kwargs: Any) -> Any:
    # The matrix has another layout in memory than the NaN, and its view may need a copy.
    func = torch.ops.aten.reshape if func is torch.ops.aten.view.default else func
    return func(matrix, *args, **kwargs)


def _is_placeholder(value: Any) -> bool:
    return isinstance(value, Placeholder)


def _made(value: Any) -> Any:
    return value.made() if isinstance(value, Placeholder) else value
