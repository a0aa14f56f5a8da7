"""The patched weight: an `index_copy` that has not happened yet.

`base.index_copy(0, ids, rows)` copies a V×D matrix at each call, and its backward builds V×D
gradients to keep k rows of them. A deferred weight keeps `(base, ids, rows)` and gives the same
results where a model looks tokens up or multiplies by the matrix; for anything else it becomes
the copy.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._pytree import tree_map

from ttfunc.indices import TokenIndices
from ttfunc.overrides import ABOUT, BENEATH, einsum_as_product, transposes, written_by
from ttfunc.reads import carrier, lookup, product
from ttfunc.targets import Matrix, memory_of


class Source(NamedTuple):
    """What a patched weight is made of: `(V, D)` base and `(k, D)` rows, alike in all else.

    beneath: the `(V, D)` tensor that a deferred weight is to whatever gets past
    `__torch_function__`. copy: the patched matrix, of a dense one. memory: where the model's own
    matrix lay. uses: how it was read.
    """

    base: Tensor
    rows: Tensor
    indices: TokenIndices
    matrix: Matrix | None
    beneath: Tensor
    copy: Tensor | None
    memory: tuple[object, ...] | None
    uses: set[str]


class PatchedWeight(Tensor):
    """A `(V, D)` weight with k of its rows replaced, or the `(D, V)` transpose of one.

    Made by `patch`. `source.uses` tells how it was read: `"lookup"`, `"product"`, `"dense"`.
    """

    source: Source
    transposed: bool

    @property
    def deferred(self) -> bool:
        """Whether the copy has not been made."""
        return self.source.copy is None

    @classmethod
    def __torch_function__(
        cls,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if func in ABOUT:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*tree_map(_frozen, args), **tree_map(_frozen, kwargs))
        if func in BENEATH:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **kwargs)
        handler = _HANDLERS.get(func)
        if handler is not None:
            result = handler(*args, **kwargs)
            if result is not NotImplemented:
                return result
        _refuse(func, args, kwargs)
        with torch._C.DisableTorchFunctionSubclass():
            return func(*tree_map(_dense, args), **tree_map(_dense, kwargs))


def patched(
    base: Tensor, rows: Tensor, indices: TokenIndices, matrix: Matrix | None, *, dense: bool
) -> PatchedWeight:
    """The weight with `rows` in place of `indices`, copied at once (`dense`) or deferred.

    The memory beneath a deferred weight is one NaN, expanded: whatever gets past
    `__torch_function__` sees NaN, never the base.
    """
    copy = base.index_copy(0, indices.on(base.device).ids, rows) if dense else None
    beneath = carrier(rows, base, indices) if copy is None else copy
    memory = None
    if matrix is not None and not torch.compiler.is_compiling():  # which reads no pointers
        memory = memory_of(matrix.tensor)
    return _wrap(Source(base, rows, indices, matrix, beneath, copy, memory, set()))


def _wrap(source: Source, *, transposed: bool = False) -> PatchedWeight:
    beneath = source.beneath.mT if transposed else source.beneath
    weight = beneath.as_subclass(PatchedWeight)
    weight.source, weight.transposed = source, transposed
    return weight


def _frozen(value: Any) -> Any:
    """In place of a patched weight its base, which has the same shape, dtype, device and layout."""
    if not isinstance(value, PatchedWeight):
        return value
    return value.source.base.mT if value.transposed else value.source.base


def _dense(value: Any) -> Any:
    """In place of a patched weight the matrix itself."""
    if not isinstance(value, PatchedWeight):
        return value
    value.source.uses.add("dense")
    source, copy = value.source, value.source.copy
    if copy is None:
        # Not kept for the next read, which may be under another grad mode or transform.
        ids = source.indices.on(source.base.device).ids
        copy = source.base.index_copy(0, ids, source.rows)
    return copy.mT if value.transposed else copy


def _refuse(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Raise where the copy would be written to, or outlived by a pointer: both would be lost."""
    written = written_by(func, args, kwargs)
    if any(isinstance(value, PatchedWeight) and value.deferred for value in written):
        raise RuntimeError(
            f"{func.__name__} on a patched weight: the weight is made anew for each call, so what "
            "is written to it (or read through a pointer to it) would be lost. Write to the model "
            "or to the deltas before the call, or use patch(params, dense=True)."
        )


# --- The reads that need no copy. Each gets the arguments of the torch function it stands for.


def _is_deferred(value: Any, *, transposed: bool = False) -> bool:
    return isinstance(value, PatchedWeight) and value.deferred and value.transposed is transposed


def _is_plain(value: Any) -> bool:
    """Whether it is a dense tensor of floats, which the product is written for."""
    return (
        isinstance(value, Tensor)
        and not isinstance(value, PatchedWeight)
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
    # max_norm rescales the matrix itself, and the last two say how its V×D gradient is made.
    if max_norm is not None or scale_grad_by_freq or sparse or not _is_deferred(weight):
        return NotImplemented
    if isinstance(input, PatchedWeight):
        return NotImplemented
    source = weight.source
    source.uses.add("lookup")
    return lookup(input, source.base, source.rows, source.indices, padding_idx)


def _getitem(weight: Any, tokens: Any) -> Any:
    if not (_is_deferred(weight) and isinstance(tokens, Tensor)):
        return NotImplemented
    if tokens.dtype not in (torch.int64, torch.int32):  # a mask, or bytes that count as one
        return NotImplemented
    # Indexing counts negative numbers from the end, an embedding refuses them.
    return _embedding(torch.where(tokens < 0, tokens + len(weight), tokens), weight)


def _linear(input: Any, weight: Any, bias: Any = None) -> Any:
    if not (_is_deferred(weight) and _is_plain(input)):
        return NotImplemented
    if not (bias is None or (_is_plain(bias) and bias.shape == weight.shape[:1])):
        return NotImplemented
    source = weight.source
    source.uses.add("product")
    return product(input, source.base, source.rows, source.indices, bias)


def _matmul(input: Any, other: Any) -> Any:
    if _is_deferred(other, transposed=True):
        return _linear(input, _transpose(other))
    if _is_deferred(input) and isinstance(other, Tensor):  # W @ x is (xᵀ @ Wᵀ)ᵀ
        return _linear(other, input) if other.ndim == 1 else _linear(other.mT, input).mT
    return NotImplemented


def _addmm(input: Any, mat1: Any, mat2: Any, *, beta: Any = 1, alpha: Any = 1) -> Any:
    if beta != 1 or alpha != 1 or not _is_deferred(mat2, transposed=True):
        return NotImplemented
    return _linear(mat1, _transpose(mat2), input)


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
    weight = _transpose(weight) if weight.transposed else weight
    return torch.einsum(around[1], _linear(torch.einsum(around[0], hidden), weight))


def _transpose(weight: Any) -> Any:
    if not isinstance(weight, PatchedWeight) or not weight.deferred:
        return NotImplemented
    return _wrap(weight.source, transposed=not weight.transposed)


def _swap(weight: Any, dim0: int, dim1: int) -> Any:
    return _transpose(weight) if transposes(dim0, dim1) else NotImplemented


def _permute(weight: Any, *dims: Any) -> Any:
    order = tuple(dims[0]) if isinstance(dims[0], (tuple, list)) else dims
    turned = len(order) == 2 and transposes(*order) and order[0] in (1, -1)
    return _transpose(weight) if turned else NotImplemented


def _rowwise(func: Callable[..., Any]) -> Callable[..., Any]:
    """A function that acts on each row alone goes to the base and to the rows."""

    def handler(weight: Any, *args: Any, **kwargs: Any) -> Any:
        args, kwargs = tree_map(_frozen, args), tree_map(_frozen, kwargs)
        if not isinstance(weight, PatchedWeight):  # h.to(w) asks w for its dtype and device alone
            return func(weight, *args, **kwargs)
        if not weight.deferred:
            return NotImplemented
        base = func(weight.source.base, *args, **kwargs)
        if base is weight.source.base:
            return weight
        if not base.is_floating_point():
            return NotImplemented
        rows = func(weight.source.rows, *args, **kwargs)
        beneath = carrier(rows, base, weight.source.indices)
        source = weight.source._replace(base=base, rows=rows, beneath=beneath)
        return _wrap(source, transposed=weight.transposed)

    return handler


def _positional(handler: Callable[..., Any]) -> Callable[..., Any]:
    """Leave a call with keywords to the copy: each torch function has names of its own for them."""
    return lambda *args, **kwargs: NotImplemented if kwargs else handler(*args)


_HANDLERS: dict[Any, Callable[..., Any]] = {
    F.embedding: _embedding,
    F.linear: _linear,
    torch.addmm: _addmm,
    torch.einsum: _einsum,
    Tensor.__getitem__: _getitem,
    Tensor.__rmatmul__: lambda self, other: _matmul(other, self),
}
_HANDLERS |= dict.fromkeys(
    (torch.matmul, Tensor.matmul, Tensor.__matmul__, torch.mm, Tensor.mm), _positional(_matmul)
)
_HANDLERS |= dict.fromkeys(
    (Tensor.T.__get__, Tensor.mT.__get__, Tensor.t, torch.t),  # type: ignore[attr-defined]
    _positional(_transpose),
)
_HANDLERS |= dict.fromkeys((Tensor.transpose, torch.transpose), _positional(_swap))
_HANDLERS |= dict.fromkeys((Tensor.permute, torch.permute), _positional(_permute))
_HANDLERS |= {
    func: _rowwise(func)
    for func in (
        *(Tensor.to, Tensor.type_as, Tensor.detach),
        *(Tensor.float, Tensor.double, Tensor.half, Tensor.bfloat16),
    )
}
