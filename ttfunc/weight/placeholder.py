"""What code gets for a deferred weight if it bypasses the weight's `__torch_function__`.

Nested tensors, scripted functions, transforms over the weight and the like never call it. They get
the placeholder: one NaN, expanded to the shape of the matrix, whose gradient goes to the rows. The
dispatcher puts the matrix in its place where an operation reads it; code that reads the memory
itself gets an error.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ttfunc.rows.token_ids import with_rows
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
from ttfunc.weight.overrides import refuse_layout, refuse_writes
from ttfunc.weight.reads import Reads


class Placeholder(Tensor):
    """A NaN that the dispatcher replaces by a matrix: `made` copies it for each operation.

    It is for transforms, which work on the tensor within their wrappers. Otherwise the weight does
    this itself.
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
        refuse_layout(func, args, _is_placeholder)
        if func in COMPARISONS or (getattr(func, "is_view", False) and _is_placeholder(args[0])):
            with outside_of_dispatch():
                seen = func(*args, **kwargs)
            if func in COMPARISONS:
                return seen
            if isinstance(seen, Tensor):  # a transform makes views of it before any read
                made = args[0].made
                return placeholder_of(seen, lambda: _viewed(func, made(), *args[1:], **kwargs))
        refuse_writes(func, args, kwargs, _is_placeholder)
        return func(*tree_map(_made, args), **tree_map(_made, kwargs))


def placeholder_of(nan: Tensor, made: Callable[[], Any]) -> Placeholder:
    placeholder = nan.as_subclass(Placeholder)
    placeholder.made = made
    return placeholder


def _viewed(func: Any, matrix: Tensor, *args: Any, **kwargs: Any) -> Any:
    # The matrix has another layout in memory than the NaN, and its view may need a copy.
    func = torch.ops.aten.reshape if func is torch.ops.aten.view.default else func
    return func(matrix, *args, **kwargs)


def _is_placeholder(value: Any) -> bool:
    return isinstance(value, Placeholder)


def _made(value: Any) -> Any:
    return value.made() if isinstance(value, Placeholder) else value


class _Wrapped(torch.autograd.Function):
    """A wrapper of a class, whose gradient is that of the tensor."""

    @staticmethod
    @keeps_signature
    def forward(ctx: Any, tensor: Tensor, kind: type[Tensor]) -> Tensor:
        wrapper: Tensor = wrapper_of(tensor, kind)
        return wrapper

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


def wrapped(fake: Tensor, kind: type[Tensor]) -> Any:
    """What `as_subclass` gives for other tensors: of this class, with the gradient of the fake."""
    with outside_of_transforms():
        return _Wrapped.apply(fake, kind)  # type: ignore[no-untyped-call]


class NaNPlaceholder(torch.autograd.Function):
    """The NaN, with the gradient of the matrix `base.index_copy(0, ids, rows)`."""

    @classmethod
    @keeps_signature
    def forward(
        cls, rows: Tensor, base: Tensor, ids: Tensor, grown: int, transformed: bool, reads: Reads
    ) -> Tensor:
        nan = rows.new_full((), torch.nan)
        forbid_writes(nan)
        nan = nan.expand(*rows.shape[:-2], base.shape[-2] + grown, base.shape[-1])
        if not transformed:  # the weight itself is what the dispatcher finds
            return nan

        def made() -> Tensor:
            reads.dense = True
            return cls.matrix(rows, base, ids, grown)

        return placeholder_of(nan, made)

    @staticmethod
    def matrix(rows: Tensor, base: Tensor, ids: Tensor, grown: int) -> Tensor:
        """What the NaN stands for; rows and base may have a batch in front."""
        return with_rows(base.expand(*rows.shape[:-2], *base.shape[-2:]), ids, rows, grown)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        _, base, ids, ctx.grown, _, ctx.reads = inputs
        ctx.set_materialize_grads(False)  # no zeros of the size of the base for its tangent
        # Not by save_for_backward: a patch that is made once is used by many backward passes.
        ctx.ids, ctx.shape = ids, base.shape

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        grad = grad.to_dense() if grad.is_sparse else grad  # from an embedding with sparse=True
        return grad.index_select(-2, ctx.ids), None, None, None, None, None

    @classmethod
    def jvp(cls, ctx: Any, tangent: Tensor, *_: None) -> Tensor:
        nothing = tangent.new_zeros(()).expand(ctx.shape)
        operands = (tangent, nothing, ctx.ids, ctx.grown, True, ctx.reads)
        result: Tensor = cls.apply(*operands)  # type: ignore[no-untyped-call]
        return result

    @classmethod
    def vmap(cls, info: Any, in_dims: tuple[int | None, ...], *operands: Any) -> tuple[Tensor, int]:
        rows, base, *others = operands
        dim = in_dims[0]
        rows = rows.expand(info.batch_size, *rows.shape) if dim is None else rows.movedim(dim, 0)
        carried: Tensor = cls.apply(rows, base, *others)  # type: ignore[no-untyped-call]
        return carried, 0


def strict_placeholder(base: Tensor, grown: int = 0) -> Tensor:
    """One NaN, expanded to the shape of the matrix, for `torch.export` with `strict=True`.

    Its graph keeps what nothing reads, such as a copy. Dynamo takes every read to the handlers.
    """
    return base.new_full((), torch.nan).expand(len(base) + grown, base.shape[1])


def nan_placeholder(
    kind: type[NaNPlaceholder],
    rows: Tensor,
    base: Tensor,
    ids: Tensor,
    grown: int,
    reads: Reads,
) -> Tensor:
    """One NaN, expanded to the shape of `base`, with the gradient that `kind` gives it.

    Under a transform, a read that bypasses the weight is noted in `reads`.
    """
    transformed = is_wrapped(rows)  # only a wrapper takes the class of the weight off
    operands = (rows, base, ids, grown, transformed, reads)
    placeholder: Tensor = kind.apply(*operands)  # type: ignore[no-untyped-call]
    return placeholder
