"""The trained rows, apart from the model: a pytree with one leaf for each distinct token matrix."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import optree
import torch
import torch.utils._pytree as torch_pytree
from optree.registry import __GLOBAL_NAMESPACE as GLOBAL_NAMESPACE
from torch import Tensor, nn

from ttfunc.indices import TokenIndices, token_indices
from ttfunc.targets import Matrix, Targets, find_targets, matrix_of

Init: TypeAlias = "str | Tensor | Callable[[Tensor, Tensor], Tensor]"


@dataclass(frozen=True, eq=False)
class TokenRows:
    """What stays fixed about the rows of one matrix. Compares by content; never copied.

    names: all names of the matrix. shape: its `(V, D)`. indices: which rows. originals: the `(k, D)`
    rows as they were, in the matrix's dtype. matrix: where the rows belong, in the model that they
    were made from; not part of the content, and not pickled.
    """

    names: tuple[str, ...]
    shape: tuple[int, int]
    indices: TokenIndices
    originals: Tensor
    matrix: Matrix | None

    def __eq__(self, other: object) -> bool:
        if self is other:
            return True
        return isinstance(other, TokenRows) and (
            (self.names, self.shape, self.indices) == (other.names, other.shape, other.indices)
            and _same_bits(self.originals, other.originals)
        )

    def __hash__(self) -> int:
        return hash((self.names, self.shape, self.indices))

    def __deepcopy__(self, memo: dict[int, Any]) -> TokenRows:
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        return TokenRows, (self.names, self.shape, self.indices, self.originals, None)


@dataclass(frozen=True, eq=False)
class TokenDeltas:
    """Replacement rows for the token matrices of a model: a pytree of optree and of torch.

    deltas: one `(k, D)` float leaf for each distinct matrix, keyed by its first name in the model.
    rows: the static part, under the same keys; read it through the properties.
    """

    deltas: dict[str, Tensor]
    rows: dict[str, TokenRows]

    @property
    def token_indices(self) -> dict[str, Tensor]:
        """The token ids, `(k,)` int64 on the CPU: row i of every array belongs to id i."""
        cpu = torch.device("cpu")
        return {name: row.indices.on(cpu).ids for name, row in self.rows.items()}

    @property
    def originals(self) -> dict[str, Tensor]:
        """The `(k, D)` rows as they were, in the dtype of the matrix."""
        return {name: row.originals for name, row in self.rows.items()}

    @property
    def tied(self) -> dict[str, tuple[str, ...]]:
        """All names of each matrix, its own first one included."""
        return {name: row.names for name, row in self.rows.items()}

    def __repr__(self) -> str:
        parts = [
            f"{' = '.join(row.names)}: {len(row.indices)} of {row.shape[0]} rows"
            for row in self.rows.values()
        ]
        return f"TokenDeltas({'; '.join(parts)})"


def init_deltas(
    model: nn.Module,
    idx: Iterable[int] | Mapping[str, Iterable[int]],
    *,
    targets: Targets | None = None,
    init: Init = "base",
    dtype: torch.dtype | None = None,
    generator: torch.Generator | None = None,
    requires_grad: bool = False,
) -> TokenDeltas:
    """The rows `idx` of the model's token matrices, as a pytree of their own.

    Args:
        model: any module. It is not changed.
        idx: k token ids, or a mapping from target to its own ids (then without `targets`).
        targets: a module name or the end of one, a list of them, or a compiled pattern; Embedding
            and Linear modules. By default the input embedding. What is tied to a target by identity
            or memory is trained with it.
        init: where the rows start. `"base"`: as they are. `"mean"`: the mean of the matrix.
            `"normal"`: drawn with the mean and spread of each column of it. A `(k, D)` tensor. Or a
            function of the `(V, D)` matrix and the `(k,)` ids that returns `(k, D)` rows.
        dtype: of the deltas; by default the matrix's own, but float32 for a half-precision one.
        generator: for `"normal"`.
        requires_grad: makes the deltas leaves for `torch.optim`; `torch.func` needs it not.

    Returns:
        TokenDeltas with a `(k, D)` delta on the device of each distinct matrix.

    Raises:
        TypeError, ValueError, IndexError: for ids that are no token ids, targets that are unknown
        or ambiguous, tied targets with different ids, an `init` of another shape.
    """
    deltas, rows = {}, {}
    for matrix, indices in _requests(model, idx, targets):
        weight = matrix.parameter.detach()
        name, ids = matrix.names[0], indices.on(weight.device).ids
        originals = weight.index_select(0, ids)
        start = _start(init, weight, ids, originals, name, generator)
        delta = start.to(weight.device, dtype or _delta_dtype(weight.dtype), copy=True)
        deltas[name] = delta.requires_grad_(requires_grad)
        shape = (weight.shape[0], weight.shape[1])
        rows[name] = TokenRows(matrix.names, shape, indices, originals, matrix)
    return TokenDeltas(deltas, rows)


def combine(*params: TokenDeltas) -> TokenDeltas:
    """One TokenDeltas with the rows of all of `params`, in their order; none of them is changed.

    Deltas over the same matrix are concatenated to `(k1 + k2 + …, D)`. Raises ValueError where a
    token is in more than one of them, or where they were made from different models.
    """
    if not params:
        raise ValueError("combine() got no parameters: give at least one TokenDeltas.")
    return functools.reduce(_union, params)


def _union(a: TokenDeltas, b: TokenDeltas) -> TokenDeltas:
    deltas, rows = {**a.deltas, **b.deltas}, {**a.rows, **b.rows}
    for name in a.rows.keys() & b.rows.keys():
        rows[name] = _joined_rows(a.rows[name], b.rows[name])
        deltas[name] = torch.cat([a.deltas[name], b.deltas[name]], dim=-2)
    return TokenDeltas(deltas, rows)


# Combining at each training step must not sort, nor move the ids to the device, again.
@functools.lru_cache(maxsize=64)
def _joined_indices(a: TokenIndices, b: TokenIndices) -> TokenIndices:
    return a.joined(b)


def _joined_rows(a: TokenRows, b: TokenRows) -> TokenRows:
    if (a.names, a.shape) != (b.names, b.shape) or _other_model(a.matrix, b.matrix):
        raise ValueError(
            f"the parameters for {a.names[0]!r} were made from different models: names {a.names} "
            f"and {b.names}, shapes {a.shape} and {b.shape}. Make both with init_deltas on the "
            "same model."
        )
    return replace(
        a,
        indices=_joined_indices(a.indices, b.indices),
        originals=torch.cat([a.originals, b.originals]),
        matrix=a.matrix or b.matrix,
    )


def _other_model(a: Matrix | None, b: Matrix | None) -> bool:
    return a is not None and b is not None and a.parameter is not b.parameter


def _requests(
    model: nn.Module, idx: Iterable[int] | Mapping[str, Iterable[int]], targets: Targets | None
) -> list[tuple[Matrix, TokenIndices]]:
    """Each distinct matrix that is asked for, with its indices."""
    if isinstance(idx, Mapping):
        if targets is not None:
            raise ValueError(
                f"idx is a mapping with targets of its own, {list(idx)}, and targets={targets!r} "
                "is given too. Give one of the two."
            )
        if not idx:
            raise ValueError("no token indices: idx is an empty mapping. Name a target in it.")
        asked = [
            (n, m, ids) for key, ids in idx.items() for n, m in find_targets(model, key).items()
        ]
    else:
        # The ids may come from an iterator, and every target reads them.
        ids = list(idx) if hasattr(idx, "__next__") else idx
        asked = [(n, m, ids) for n, m in find_targets(model, targets).items()]

    requests: dict[str, tuple[str, Matrix, TokenIndices]] = {}
    for target, module, ids in asked:
        weight = module.get_parameter("weight")
        matrix, indices = matrix_of(model, weight), token_indices(ids, weight.shape[0], target)
        first, _, other = requests.setdefault(matrix.names[0], (target, matrix, indices))
        if other != indices:
            raise ValueError(
                f"targets {first!r} and {target!r} are tied (one matrix, {matrix.names}) and were "
                f"given different token indices, {other.ids} and {indices.ids}. Give them the same "
                "ones in the same order, or name only one of the two."
            )
        _warn_of_padding(target, module, indices)
    return [(matrix, indices) for _, matrix, indices in requests.values()]


def _warn_of_padding(target: str, module: nn.Module, indices: TokenIndices) -> None:
    padding = getattr(module, "padding_idx", None)
    if padding is not None and indices.row_of(padding) is not None:
        warnings.warn(
            f"token {padding} is the padding_idx of {target!r}: its row gets no gradient from the "
            "input side, so it trains only through a tied head, if there is one.",
            stacklevel=4,
        )


def _start(
    init: Init,
    weight: Tensor,
    ids: Tensor,
    originals: Tensor,
    name: str,
    generator: torch.Generator | None,
) -> Tensor:
    if isinstance(init, str):
        if init == "base":
            return originals
        wide = torch.promote_types(weight.dtype, torch.float32)
        mean = weight.mean(0, dtype=wide).expand(originals.shape)
        if init == "mean":
            return mean
        if init == "normal":
            noise = torch.randn(
                originals.shape, generator=generator, device=weight.device, dtype=wide
            )
            return mean + noise * weight.std(0, correction=0).to(wide)
        raise ValueError(f"init={init!r} is unknown. {_INITS}")
    if not (isinstance(init, Tensor) or callable(init)):
        raise TypeError(f"init is a {type(init).__name__}. {_INITS}")
    start = init if isinstance(init, Tensor) else init(weight, ids)
    if not isinstance(start, Tensor) or start.shape != originals.shape:
        got = tuple(start.shape) if isinstance(start, Tensor) else type(start).__name__
        raise ValueError(
            f"init gives {got} for {name!r}, and {tuple(originals.shape)} is needed: a row for "
            "each token index, in their order."
        )
    return start.detach()


_INITS = 'Give "base", "mean", "normal", a (k, D) tensor or a function of (base, idx).'


def _delta_dtype(dtype: torch.dtype) -> torch.dtype:
    """As PEFT's autocast_adapter_dtype: small updates vanish in half precision."""
    return torch.float32 if dtype in (torch.float16, torch.bfloat16) else dtype


def _same_bits(a: Tensor, b: Tensor) -> bool:
    if a is b:
        return True
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    if a.is_meta or b.is_meta:  # no values to compare
        return a.is_meta and b.is_meta
    # As bytes, so that a NaN equals itself.
    return torch.equal(a.cpu().view(torch.uint8), b.cpu().view(torch.uint8))


def _flatten(params: TokenDeltas) -> tuple[list[Tensor], Any]:
    # Sorted, because optree and torch order the keys of a dict differently.
    names = tuple(sorted(params.deltas))
    return [params.deltas[name] for name in names], (names, tuple(params.rows[n] for n in names))


def _unflatten(context: Any, leaves: Iterable[Any]) -> TokenDeltas:
    names, rows = context
    return TokenDeltas(
        dict(zip(names, leaves, strict=True)), dict(zip(names, rows, strict=True))
    )


def _flatten_with_keys(params: TokenDeltas) -> tuple[list[tuple[Any, Tensor]], Any]:
    leaves, context = _flatten(params)
    keys = [torch_pytree.MappingKey(name) for name in context[0]]
    return list(zip(keys, leaves, strict=True)), context


optree.register_pytree_node(
    TokenDeltas,
    lambda params: (*_flatten(params), tuple(sorted(params.deltas))),
    _unflatten,
    namespace=GLOBAL_NAMESPACE,
)
torch_pytree.register_pytree_node(
    TokenDeltas,
    _flatten,
    lambda leaves, context: _unflatten(context, leaves),
    flatten_with_keys_fn=_flatten_with_keys,
)
