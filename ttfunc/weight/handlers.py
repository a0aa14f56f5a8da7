"""The reads of a deferred weight that need no copy, each for the torch functions it stands for."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ttfunc.torch_private import no_torch_function, tree_map
from ttfunc.weight.overrides import einsum_as_product, transposes
from ttfunc.weight.reads import like
from ttfunc.weight.source import Sourced, is_deferred


def frozen(value: Any) -> Any:
    """In place of a patched weight its base."""
    return value.frozen if isinstance(value, Sourced) else value


def _is_plain(value: Any) -> bool:
    """Whether it is a dense tensor of floats, which the product is written for."""
    return (
        isinstance(value, Tensor)
        and not isinstance(value, Sourced)
        and value.is_floating_point()
        and value.layout == torch.strided
        and not value.is_nested
    )


def _embedding(
    input: Any,
    weight: Any,
    padding_idx: int | None = None,
    max_norm: float | None = None,
    norm_type: float = 2.0,
    scale_grad_by_freq: bool = False,
    sparse: bool = False,
) -> Any:
    if isinstance(input, Sourced):
        return NotImplemented
    # max_norm rescales the matrix itself, and scale_grad_by_freq says how its V×D gradient is made.
    if max_norm is not None or scale_grad_by_freq or not is_deferred(weight):
        if not sparse:
            return NotImplemented
        return F.embedding(input, weight, padding_idx, max_norm, norm_type, scale_grad_by_freq)
    source = weight.source
    source.note("lookup")
    return source.rows.lookup(input, source.base, padding_idx)


def _embedding_bag(*args: Any, sparse: bool = False, **kwargs: Any) -> Any:
    # The gradient of the rows is dense, and the copy takes no sparse one on its way to them.
    if len(args) > 7:
        sparse, args = args[7], (*args[:7], False, *args[8:])
    return F.embedding_bag(*args, **kwargs) if sparse else NotImplemented


def _getitem(weight: Any, tokens: Any) -> Any:
    if not (is_deferred(weight) and isinstance(tokens, Tensor)):
        return NotImplemented
    if tokens.dtype not in (torch.int64, torch.int32):  # a mask, or bytes that count as one
        return NotImplemented
    # Indexing counts negative numbers from the end, an embedding refuses them.
    return _embedding(torch.where(tokens < 0, tokens + len(weight), tokens), weight)


def _linear(input: Any, weight: Any, bias: Any = None) -> Any:
    if not (is_deferred(weight) and _is_plain(input)):
        return NotImplemented
    if not (bias is None or (_is_plain(bias) and bias.shape == weight.shape[:1])):
        return NotImplemented
    source = weight.source
    source.note("product")
    return source.rows.product(input, source.base, bias)


def _mm(input: Any, mat2: Any) -> Any:
    return _matmul(input, mat2) if input.ndim == mat2.ndim == 2 else NotImplemented


def _matmul(input: Any, other: Any) -> Any:
    if is_deferred(other, transposed=True):
        return _linear(input, other.turned())
    if is_deferred(input) and isinstance(other, Tensor):  # W @ x is (xᵀ @ Wᵀ)ᵀ
        return _linear(other, input) if other.ndim == 1 else _linear(other.mT, input).mT
    return NotImplemented


def _addmm(
    input: Any, mat1: Any, mat2: Any, *old: Any, beta: Any = 1, alpha: Any = 1, out: Any = None
) -> Any:
    # Of old, beta and alpha came first.
    if old or out is not None or beta != 1 or alpha != 1 or mat1.ndim != 2:
        return NotImplemented
    if not is_deferred(mat2, transposed=True):
        return NotImplemented
    return _linear(mat1, mat2.turned(), input)


def _einsum(equation: Any, *operands: Any) -> Any:
    if not isinstance(equation, str) or len(operands) != 2:
        return NotImplemented
    which = 1 if isinstance(operands[1], Sourced) else 0
    weight, hidden = operands[which], operands[1 - which]
    if isinstance(hidden, Sourced) or not weight.deferred:
        return NotImplemented
    around = einsum_as_product(equation, which, weight.transposed)
    if around is None:
        return NotImplemented
    hidden_term, _, turned_term = around[0].partition("->")
    if weight.source.rows.by_example and turned_term[0] != hidden_term[0]:
        return NotImplemented  # the batch would not come first
    weight = weight.turned() if weight.transposed else weight
    return torch.einsum(around[1], _linear(torch.einsum(around[0], hidden), weight))


def _transpose(weight: Any) -> Any:
    if not isinstance(weight, Sourced) or not weight.deferred:
        return NotImplemented
    return weight.turned()


def _swap(weight: Any, dim0: int, dim1: int) -> Any:
    return _transpose(weight) if transposes(dim0, dim1) else NotImplemented


def _permute(weight: Any, *dims: Any) -> Any:
    order = tuple(dims[0]) if isinstance(dims[0], (tuple, list)) else dims
    turned = len(order) == 2 and transposes(*order) and order[0] in (1, -1)
    return _transpose(weight) if turned else NotImplemented


def _storage(weight: Any) -> Any:
    """Of a mixed patch, which is no one matrix: torch.compile asks for it."""
    if not (weight.deferred and weight.source.rows.by_example):
        return NotImplemented
    with no_torch_function():
        return weight.untyped_storage()


def _rowwise(func: Callable[..., Any]) -> Callable[..., Any]:
    """A function that acts on each row alone goes to the base and to the rows."""

    def handler(weight: Any, *args: Any, **kwargs: Any) -> Any:
        args, kwargs = tree_map(frozen, args), tree_map(frozen, kwargs)
        if not isinstance(weight, Sourced):  # h.to(w) asks w for its dtype and device alone
            return func(weight, *args, **kwargs)
        if not weight.deferred:
            return NotImplemented
        base = func(weight.source.base, *args, **kwargs)
        if base is weight.source.base:
            return weight
        if not base.is_floating_point():
            return NotImplemented
        rows = weight.source.rows.map(
            lambda values: func(like(values, weight.source.base), *args, **kwargs)
        )
        beneath = rows.beneath(base, weight.source.reads)
        return weight.like(weight.source._replace(base=base, rows=rows, beneath=beneath))

    return handler


def _positional(handler: Callable[..., Any]) -> Callable[..., Any]:
    """Leave a call with keywords to the copy: each torch function has names of its own for them."""
    return lambda *args, **kwargs: NotImplemented if kwargs else handler(*args)


HANDLERS: dict[Any, Callable[..., Any]] = {
    F.embedding: _embedding,
    F.embedding_bag: _embedding_bag,
    F.linear: _linear,
    torch.addmm: _addmm,
    torch.einsum: _einsum,
    Tensor.__getitem__: _getitem,
    Tensor.untyped_storage: _storage,
    Tensor._is_view: lambda weight: False,  # of nothing that others hold
    Tensor.__rmatmul__: lambda self, other: _matmul(other, self),
}
HANDLERS |= dict.fromkeys((torch.matmul, Tensor.matmul, Tensor.__matmul__), _positional(_matmul))
HANDLERS |= dict.fromkeys((torch.mm, Tensor.mm), _positional(_mm))
HANDLERS |= dict.fromkeys(
    (Tensor.T.__get__, Tensor.mT.__get__, Tensor.t, torch.t),  # type: ignore[attr-defined]
    _positional(_transpose),
)
HANDLERS |= dict.fromkeys((Tensor.transpose, torch.transpose), _positional(_swap))
HANDLERS |= dict.fromkeys((Tensor.permute, torch.permute), _positional(_permute))
HANDLERS |= {
    func: _rowwise(func)
    for func in (
        *(Tensor.to, Tensor.type_as, Tensor.detach),
        *(Tensor.float, Tensor.double, Tensor.half, Tensor.bfloat16),
    )
}
