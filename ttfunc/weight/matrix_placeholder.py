"""What code gets that bypasses the `__torch_function__` of a patched weight."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ttfunc.rows.token_ids import with_rows
from ttfunc.torch_distributed_private import is_dtensor
from ttfunc.torch_private import (
    FUNCTIONALIZE,
    at_work,
    in_dual_level,
    in_strict_export,
    is_traced,
    outside_of_transforms,
    transforms_active,
)
from ttfunc.weight.placeholder import Reads, expanded_nan, placeholder
from ttfunc.weight.rows import Rows, not_mixed


def matrix_placeholder(rows: Rows, base: Tensor, reads: Reads, *, whole: bool = True) -> Tensor:
    """One NaN in the shape of the matrix, whose gradient goes to the rows.

    Where each example has its own rows, the gradient is refused. A read of the matrix itself is
    noted in `reads`, and refused where no rank has the matrix (not `whole`, or a DTensor).
    """
    if rows.by_example():
        return _mixed(rows, base, reads)
    on_ranks = not whole or is_dtensor(base)
    if not on_ranks and in_strict_export():
        return _constant(rows, base)
    if not on_ranks and _no_placeholder():
        return rows.materialise(base)
    recipe = (_OnRanks if on_ranks else _Matrix)(rows.new_tokens(base), reads)
    values, ids = rows.written(base)
    return placeholder(recipe, values, base, ids)


@dataclass(frozen=True)
class _Matrix:
    """`base.index_copy(0, ids, values)`; a transform may put a batch in front of the values."""

    new_tokens: int
    reads: Reads

    def blank(self, values: Tensor, base: Tensor, ids: Tensor) -> Tensor:
        height, width = base.shape[-2:]
        return expanded_nan(values, (*values.shape[:-2], height + self.new_tokens, width))

    def made(self, values: Tensor, base: Tensor, ids: Tensor) -> Tensor:
        self.reads.dense = True
        base = base.expand(*values.shape[:-2], *base.shape[-2:])
        return with_rows(base, ids, values, self.new_tokens)

    def gradient(
        self, grad: Tensor, needs: tuple[bool, ...], values: Tensor, base: Tensor, ids: Tensor
    ) -> tuple[Tensor | None, ...]:
        grad = grad.to_dense() if grad.is_sparse else grad  # from an embedding with sparse=True
        return grad.index_select(-2, ids), None, None


class _OnRanks(_Matrix):
    """A matrix that no rank has whole."""

    def made(self, values: Tensor, base: Tensor, ids: Tensor) -> Tensor:
        raise RuntimeError(
            "a transform reads the token matrix of a sharded model past its patch. Leave the "
            "matrix out of the sharding (ignored_params of fully_shard), or use loss.backward()."
        )


class _Mixed(_Matrix):
    """A matrix of each example, of which there is none, and no gradient."""

    def made(self, values: Tensor, base: Tensor, ids: Tensor) -> Tensor:
        raise not_mixed()

    def gradient(
        self, grad: Tensor, needs: tuple[bool, ...], values: Tensor, base: Tensor, ids: Tensor
    ) -> tuple[Tensor | None, ...]:
        raise RuntimeError(
            "the gradient of a mixed patch went through an autograd.Function of the model's own, "
            "which expects one matrix. Call the model separately for each adapter's examples."
        )


def _mixed(rows: Rows, base: Tensor, reads: Reads) -> Tensor:
    if torch.compiler.is_dynamo_compiling():
        return _constant(rows, base)
    if _no_placeholder():
        with outside_of_transforms():  # so that the dispatcher finds the weight itself
            return _constant(rows, base)
    recipe = _Mixed(rows.new_tokens(base), reads)
    return placeholder(recipe, rows.values[0], base, rows.places(base)[1])


def _constant(rows: Rows, base: Tensor) -> Tensor:
    """One NaN in the shape of the matrix, without a gradient.

    A graph of `torch.export` with `strict=True` keeps what nothing reads, such as a copy. Dynamo
    takes every read to the handlers.
    """
    return base.new_full((), torch.nan).expand(rows.height(base), base.shape[1])


def _no_placeholder() -> bool:
    """Whether the placeholder cannot carry a gradient, and the copy itself takes its place.

    torch.compile drops the copy if nothing reads it, and so does make_fx of a transform;
    functionalize, and forward mode without a transform (`torch.autograd.forward_ad`), pay for it.
    """
    if torch.compiler.is_dynamo_compiling() or at_work(FUNCTIONALIZE):
        return True
    return is_traced() if transforms_active() else in_dual_level()
