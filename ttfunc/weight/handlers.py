"""The reads of a deferred weight that need no copy, each with the torch functions it implements.

A handler gets the arguments of the function. It returns the result, or NotImplemented; then the
function gets the copy.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ttfunc.torch_private import IS_VIEW, LINEAR, LINEAR_CROSS_ENTROPY, tree_map
from ttfunc.weight.deferred import PatchedWeight, frozen, implements, is_deferred
from ttfunc.weight.logits import can_defer, defer
from ttfunc.weight.overrides import einsum_as_product, transposes
from ttfunc.weight.product import cast_like
from ttfunc.weight.rows import Rows
from ttfunc.weight.source import Source


def _positional(handler: Callable[..., Any]) -> Callable[..., Any]:
    """The handler for positional calls only, as keyword names differ from function to function."""
    return lambda *args, **kwargs: NotImplemented if kwargs else handler(*args)


def _is_plain(value: Any) -> bool:
    """Whether the value is a dense tensor of floats, as the product needs."""
    return (
        isinstance(value, Tensor)
        and not isinstance(value, PatchedWeight)
        and value.is_floating_point()
        and value.layout == torch.strided
        and not value.is_nested
    )


@implements(F.embedding)
def _embedding(
    input: Any,
    weight: Any,
    padding_idx: int | None = None,
    max_norm: float | None = None,
    norm_type: float = 2.0,
    scale_grad_by_freq: bool = False,
    sparse: bool = False,
) -> Any:
    if isinstance(input, PatchedWeight) or not isinstance(input, Tensor):
        return NotImplemented
    # max_norm rescales the matrix itself, and scale_grad_by_freq changes its V×D gradient.
    if max_norm is not None or scale_grad_by_freq or not is_deferred(weight):
        if not sparse:
            return NotImplemented
        return F.embedding(input, weight, padding_idx, max_norm, norm_type, scale_grad_by_freq)
    source = weight.source
    source.check_and_note("lookup")
    return source.rows.lookup(input, source.base, padding_idx)


@implements(F.embedding_bag)
def _embedding_bag(*args: Any, sparse: bool = False, **kwargs: Any) -> Any:
    # The copy cannot pass a sparse gradient on to the rows, whose gradient is dense.
    if len(args) > 7:
        sparse, args = args[7], (*args[:7], False, *args[8:])
    return F.embedding_bag(*args, **kwargs) if sparse else NotImplemented


@implements(Tensor.__getitem__)
def _getitem(weight: Any, tokens: Any) -> Any:
    if not is_deferred(weight):
        return NotImplemented
    if isinstance(tokens, slice) and tokens.step in (None, 1):  # a chunk of a fused loss
        start, stop, _ = tokens.indices(len(weight))
        weight.source.check_and_note("lookup")
        return weight.source.rows.piece(weight.source.base, start, max(start, stop))
    if not isinstance(tokens, Tensor):
        return NotImplemented
    if tokens.dtype not in (torch.int64, torch.int32):  # a mask, or bytes that count as one
        return NotImplemented
    # Indexing counts negative numbers from the end; an embedding refuses them.
    return _embedding(torch.where(tokens < 0, tokens + len(weight), tokens), weight)


def _is_product(input: Any, weight: Any, bias: Any) -> bool:
    """Whether these can be the operands of a product; the bias may lack the new tokens."""
    if not (is_deferred(weight) and _is_plain(input)):
        return False
    heights = ((len(weight.source.base),), (weight.source.height(),))
    return bias is None or (_is_plain(bias) and bias.shape in heights)


@implements(F.linear, LINEAR)  # ZeRO-3 may have replaced F.linear by its own
def _linear(input: Any, weight: Any, bias: Any = None) -> Any:
    if not _is_product(input, weight, bias):
        return NotImplemented
    # Outside of a training step, something will read the logits.
    trained = input.requires_grad or weight.source.rows.values.requires_grad
    waits = weight.source.defers and trained and torch.is_grad_enabled()
    return _logits(input, weight.source, bias, waits)


def _logits(input: Tensor, source: Source, bias: Tensor | None, waits: bool) -> Tensor:
    """The product, or deferred logits if it `waits` and can be deferred."""
    source.check_and_note("product")
    waits = waits and source.rows.fixed() and can_defer(input, source.rows.values, bias)
    return (defer if waits else Rows.product)(source.rows, input, source.base, bias)


@implements(*LINEAR_CROSS_ENTROPY)
def _linear_cross_entropy(
    input: Any,
    linear_weight: Any,
    target: Any,
    *,
    linear_bias: Any = None,
    ignore_index: int | None = None,
    options: Any = None,  # how torch would take it apart
    **others: Any,
) -> Any:
    if not _is_product(input, linear_weight, linear_bias) or input.ndim > 2:
        return NotImplemented
    logits = _logits(input, linear_weight.source, linear_bias, waits=True)
    ignore_index = -100 if ignore_index is None else ignore_index
    return F.cross_entropy(logits, target, ignore_index=ignore_index, **others)


@implements(torch.mm, Tensor.mm)
@_positional
def _mm(input: Any, mat2: Any) -> Any:
    return _matmul(input, mat2) if input.ndim == mat2.ndim == 2 else NotImplemented


# Dynamo names the last.
@implements(torch.matmul, Tensor.matmul, Tensor.__matmul__, operator.matmul)
@_positional
def _matmul(input: Any, other: Any) -> Any:
    if is_deferred(other, transposed=True):
        return _linear(input, other.transposed_view())
    if is_deferred(input) and isinstance(other, Tensor):  # W @ x is (xᵀ @ Wᵀ)ᵀ
        return _linear(other, input) if other.ndim == 1 else _linear(other.mT, input).mT
    return NotImplemented


implements(Tensor.__rmatmul__)(lambda other, input: _matmul(input, other))


@implements(torch.addmm)
def _addmm(
    input: Any, mat1: Any, mat2: Any, *old: Any, beta: Any = 1, alpha: Any = 1, out: Any = None
) -> Any:
    # An old signature has beta and alpha first.
    if old or out is not None or beta != 1 or alpha != 1 or mat1.ndim != 2:
        return NotImplemented
    if not is_deferred(mat2, transposed=True):
        return NotImplemented
    return _linear(mat1, mat2.transposed_view(), input)


@implements(torch.einsum)
def _einsum(equation: Any, *operands: Any) -> Any:
    if not isinstance(equation, str) or len(operands) != 2:
        return NotImplemented
    which = 1 if isinstance(operands[1], PatchedWeight) else 0
    weight, hidden = operands[which], operands[1 - which]
    if isinstance(hidden, PatchedWeight) or not weight.deferred:
        return NotImplemented
    around = einsum_as_product(equation, which, weight.transposed)
    if around is None:
        return NotImplemented
    hidden_term, _, turned_term = around[0].partition("->")
    if weight.source.rows.by_example() and turned_term[0] != hidden_term[0]:
        return NotImplemented  # the batch would not come first
    weight = weight.transposed_view() if weight.transposed else weight
    return torch.einsum(around[1], _linear(torch.einsum(around[0], hidden), weight))


@implements(Tensor.T.__get__, Tensor.mT.__get__, Tensor.t, torch.t)  # type: ignore[attr-defined]
@_positional
def _transpose(weight: Any) -> Any:
    waits = isinstance(weight, PatchedWeight) and weight.deferred
    return weight.transposed_view() if waits else NotImplemented


@implements(Tensor.transpose, torch.transpose)
@_positional
def _swapped(weight: Any, dim0: int, dim1: int) -> Any:
    return _transpose(weight) if transposes(dim0, dim1) else NotImplemented


@implements(Tensor.permute, torch.permute)
@_positional
def _permute(weight: Any, *dims: Any) -> Any:
    order = tuple(dims[0]) if isinstance(dims[0], (tuple, list)) else dims
    turned = len(order) == 2 and order[0] in (1, -1)
    return _swapped(weight, *order) if turned else NotImplemented


def _rowwise(func: Callable[..., Any]) -> Callable[..., Any]:
    """A handler that applies `func`, which acts on each row separately, to base and rows."""

    def handler(weight: Any, *args: Any, **kwargs: Any) -> Any:
        args, kwargs = tree_map(frozen, args), tree_map(frozen, kwargs)
        if not isinstance(weight, PatchedWeight):  # h.to(w) uses only the dtype and device of w
            return func(weight, *args, **kwargs)
        if not weight.deferred:
            return NotImplemented
        base = func(weight.source.base, *args, **kwargs)
        if base is weight.source.base:
            return weight
        if not base.is_floating_point():
            return NotImplemented
        rows = weight.source.rows.map(
            lambda values: func(cast_like(values, weight.source.base), *args, **kwargs)
        )
        return weight.with_source(weight.source.over(base, rows))

    return handler


for _func in (
    *(Tensor.to, Tensor.type_as, Tensor.detach),
    *(Tensor.float, Tensor.double, Tensor.half, Tensor.bfloat16),
):
    implements(_func)(_rowwise(_func))


@implements(IS_VIEW)
def _is_view(weight: Any) -> bool:
    """False, since a weight is no view of a tensor that others hold; torch.compile asks this."""
    return False
