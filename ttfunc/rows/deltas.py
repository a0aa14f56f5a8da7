"""The trained rows, apart from the model: a pytree with one leaf for each distinct token matrix."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NoReturn, cast

import optree
import torch
from torch import Tensor

from ttfunc.model.given import refuse_token_module
from ttfunc.model.matrix import Matrix
from ttfunc.model.memory import same_bits
from ttfunc.model.origin import Origin
from ttfunc.rows.ends import told_half
from ttfunc.rows.given import check_apart
from ttfunc.rows.token_ids import TokenIndices, union
from ttfunc.torch_private import OPTREE_GLOBAL, outside_of_modes, torch_pytree


@dataclass(frozen=True, eq=False)
class RowSpec:
    """What stays fixed about the rows of one matrix. Compares by content; its tensors stay as one.

    names: all names of the matrix. shape: its `(V, D)`. indices: which rows. originals: the
    `(k, D)` rows as they were, in the matrix's dtype; for new tokens where they started, or zeros
    where that is not known, and these are not part of the content. matrix: where the rows belong,
    in the model that they were made from; not part of the content, and not pickled. origin: what
    that model said of the matrix; not part of the content either. grown: how many of them are new,
    for tokens that the matrix does not have. follows: how many new tokens of others come before the
    first of these.
    """

    names: tuple[str, ...]
    shape: tuple[int, int]
    indices: TokenIndices
    originals: Tensor
    matrix: Matrix | None
    origin: Origin = field(default_factory=Origin)

    grown: int = field(init=False)
    follows: int = field(init=False)

    def __post_init__(self) -> None:
        new = [token for token in self.indices.ids if token >= self.shape[0]]
        object.__setattr__(self, "grown", len(new))
        object.__setattr__(self, "follows", min(new) - self.shape[0] if new else 0)

    @property
    def height(self) -> int:
        """V, and the rows that it grows by."""
        return max(self.shape[0], max(self.indices.ids) + 1)

    @property
    def counted(self) -> str:
        """How many rows, of how many; for a person."""
        count = f"{len(self.indices) - self.grown:,} of {self.shape[0]:,}"
        return f"{count} and {self.grown:,} new" if self.grown else count

    def known(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """The ids that the matrix has, and those of `(k, D)` rows that are theirs."""
        ids = self.indices.on(rows.device).ids
        if not self.grown:
            return ids, rows
        has = [row for row, token in enumerate(self.indices.ids) if token < self.shape[0]]
        places = ids.new_tensor(has)
        return ids[places], rows.index_select(0, places)

    def __eq__(self, other: object) -> bool:
        if self is other:
            return True
        return isinstance(other, RowSpec) and (
            (self.names, self.shape, self.indices) == (other.names, other.shape, other.indices)
            and self.same_originals(self.originals, other.originals)
        )

    def same_originals(self, a: Tensor, b: Tensor) -> bool:
        """Whether two `(k, D)` have the same bits, but for new tokens."""
        with outside_of_modes():
            return same_bits(a, b) or same_bits(self.known(a)[1], self.known(b)[1])

    def __hash__(self) -> int:
        return hash((self.names, self.shape, self.indices))

    def __deepcopy__(self, memo: dict[int, Any]) -> RowSpec:
        """Itself; of a copy of the model, if that was made before in the same call."""
        matrix = None if self.matrix is None else self.matrix.in_copy(memo)
        return self if matrix is self.matrix else replace(self, matrix=matrix)

    def __reduce__(self) -> tuple[Any, ...]:
        return RowSpec, (self.names, self.shape, self.indices, self.originals, None, self.origin)


@dataclass(frozen=True, eq=False)
class TokenDeltas:
    """Rows that replace those of a model's token matrices: a pytree for optree and for torch.

    The float tensors in `deltas` are its leaves: the new rows themselves, not differences.

    Attributes:
        deltas: a `(k, D)` leaf for each distinct matrix, under its first name in the model.
        specs: what is fixed about the rows, under the same names. Read it through the properties.
    """

    deltas: dict[str, Tensor]
    specs: dict[str, RowSpec]

    def __post_init__(self) -> None:
        if self.deltas.keys() != self.specs.keys():
            raise ValueError(
                f"the deltas are for {sorted(self.deltas)} and the specs for {sorted(self.specs)}: "
                "each matrix needs both. Replace values, not names."
            )

    @property
    def token_indices(self) -> dict[str, Tensor]:
        """The `(k,)` int64 token ids on the CPU, by name: row i of every array belongs to id i."""
        cpu = torch.device("cpu")
        return {name: spec.indices.on(cpu).ids.clone() for name, spec in self.specs.items()}

    @property
    def originals(self) -> dict[str, Tensor]:
        """The `(k, D)` rows as they were, in the dtype of the matrix; new ones as they started."""
        return {name: spec.originals for name, spec in self.specs.items()}

    @property
    def tied(self) -> dict[str, tuple[str, ...]]:
        """All names of each matrix, by its first one."""
        return {name: spec.names for name, spec in self.specs.items()}

    def __iter__(self) -> NoReturn:
        raise TypeError(
            "TokenDeltas is a pytree, not a list of tensors. For its leaves, for example for an "
            "optimizer, call optree.tree_leaves(params)."
        )

    def __getitem__(self, name: object) -> NoReturn:
        raise TypeError(
            f"TokenDeltas cannot be indexed, got [{name!r}]. Use params.deltas[name], "
            f"params.token_indices[name] or params.originals[name], with one of the names "
            f"{list(self.deltas)}."
        )

    def __getattr__(self, name: str) -> NoReturn:  # only for what is not there
        hint = ""
        if name == "rows":
            hint = " The values are params.deltas, and what is fixed about them is params.specs."
        elif not name.startswith("_") and callable(getattr(Tensor, name, None)):
            hint = (
                " It is a pytree. To do this to each of its tensors, use optree: "
                f"params = optree.tree_map(lambda t: t.{name}(...), params)."
            )
        raise AttributeError(f"TokenDeltas has no attribute {name!r}.{hint}")

    def __repr__(self) -> str:
        each = self.specs.values()
        parts = [f"{' = '.join(s.names)}: {s.counted} rows{told_half(s, each)}" for s in each]
        return f"TokenDeltas({'; '.join(parts)})"


_ORDER = "patch(params), merge(state_dict, params), summary(model, params)"


def combine(*params: TokenDeltas) -> TokenDeltas:
    """Put the rows of several TokenDeltas of one model into one, in their order.

    Deltas over the same matrix are concatenated to `(k1 + k2 + …, D)`.

    Args:
        params: at least one TokenDeltas. None of them is changed.

    Returns:
        A new TokenDeltas.

    Raises:
        ValueError: none given; a token in more than one of them; one name for matrices of different
            models.
        TypeError: anything but a TokenDeltas.
    """
    if not params:
        raise ValueError("combine() got no parameters: give at least one TokenDeltas.")
    for given in params:
        check_type(given)
    return functools.reduce(_union, params)


def check_type(params: object, order: str = _ORDER) -> None:
    """Raise TypeError for anything but a TokenDeltas, with the right `order`."""
    refuse_token_module(params, "module.params(), which are its rows")
    if not isinstance(params, TokenDeltas):
        raise TypeError(
            f"got {type(params).__name__} where the parameters of init_deltas (TokenDeltas) are "
            f"needed. The order is {order}."
        )


def _union(a: TokenDeltas, b: TokenDeltas) -> TokenDeltas:
    deltas, specs = {**a.deltas, **b.deltas}, {**a.specs, **b.specs}
    check_one_model([a, b])
    for name in [name for name in a.specs if name in b.specs]:
        specs[name] = _joined_rows(a.specs[name], b.specs[name])
        deltas[name] = _joined(a.deltas[name], b.deltas[name], name)
    return TokenDeltas(deltas, specs)


def check_one_model(params: Sequence[TokenDeltas]) -> None:
    """Raise ValueError where a name stands for matrices of different models."""
    first: dict[str, RowSpec] = {}
    for spec in (spec for given in params for spec in given.specs.values()):
        for name in spec.names:
            other = first.setdefault(name, spec)
            same = (spec.names, spec.shape) == (other.names, other.shape)
            if not same or _other_model(spec.matrix, other.matrix):
                raise ValueError(
                    f"{name!r} belongs to the matrix {other.names} of shape {other.shape} in one "
                    f"of the parameters, and to {spec.names} of shape {spec.shape} in another: "
                    "they were made from different models, or the model was tied in between. Make "
                    "all with init_deltas on the same model."
                )


def _joined(a: Tensor, b: Tensor, name: str) -> Tensor:
    if a.ndim != b.ndim or a.shape[:-2] != b.shape[:-2] or a.shape[-1] != b.shape[-1]:
        raise ValueError(
            f"the deltas for {name!r} have shapes {tuple(a.shape)} and {tuple(b.shape)}: only "
            "their numbers of rows may differ. Stack both, or neither."
        )
    return torch.cat([a, b], dim=-2)


def _joined_rows(a: RowSpec, b: RowSpec) -> RowSpec:
    check_apart(a.indices, b.indices, a.names[0], a.shape[0])
    with outside_of_modes():
        originals = torch.cat([a.originals, b.originals.to(a.originals.device)])
    return replace(
        a,
        indices=union((a.indices, b.indices)),
        originals=originals,
        matrix=a.matrix or b.matrix,
        origin=a.origin.joined(b.origin),
    )


def _other_model(a: Matrix | None, b: Matrix | None) -> bool:
    return a is not None and b is not None and a.tensor is not b.tensor


def _flatten(params: TokenDeltas) -> tuple[list[Tensor], Any]:
    # Sorted, because optree and torch order the keys of a dict differently.
    names = tuple(sorted(params.deltas))
    return [params.deltas[name] for name in names], (names, tuple(params.specs[n] for n in names))


def _unflatten(context: Any, leaves: Iterable[Any]) -> TokenDeltas:
    names, specs = context
    return TokenDeltas(dict(zip(names, leaves, strict=True)), dict(zip(names, specs, strict=True)))


def _flatten_with_keys(params: TokenDeltas) -> tuple[list[tuple[Any, Tensor]], Any]:
    leaves, context = _flatten(params)
    keys: list[Any] = [torch_pytree.MappingKey(name) for name in context[0]]
    return list(zip(keys, leaves, strict=True)), context


def _optree_flatten(params: Any) -> tuple[list[Tensor], Any, tuple[str, ...]]:
    leaves, context = _flatten(params)
    return leaves, context, context[0]


# optree's annotations ask for a Collection; its code takes any class.
optree.register_pytree_node(
    cast("Any", TokenDeltas),
    _optree_flatten,
    cast("Any", _unflatten),
    namespace=OPTREE_GLOBAL,
)
torch_pytree.register_pytree_node(
    TokenDeltas,
    _flatten,
    lambda leaves, context: _unflatten(context, leaves),
    flatten_with_keys_fn=_flatten_with_keys,
)
