"""The trained rows, apart from the model: a pytree with one leaf for each distinct token matrix."""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import Any, NoReturn, cast

import optree
import torch
from torch import Tensor, nn

from ttfunc.model.both_ends import head_apart
from ttfunc.model.given import refuse_token_module
from ttfunc.model.matrix import Matrix
from ttfunc.model.memory import same_bits
from ttfunc.model.origin import Origin
from ttfunc.rows.token_ids import TokenIndices
from ttfunc.torch_distributed_private import is_dtensor
from ttfunc.torch_private import OPTREE_GLOBAL, outside_of_modes, torch_pytree


@dataclass(frozen=True, eq=False)
class RowSpec:
    """What stays fixed about the rows of one matrix. Two of them are equal if their content is.

    names: all names of the matrix. shape: its `(V, D)`. indices: which rows. originals: the
    `(k, D)` rows as they were, in the matrix's dtype; for new tokens the rows that they started
    with, or zeros if these are not known. matrix: the matrix in the model that the rows were made
    from; it is not pickled. origin: what that model said of the matrix. grown: the number of new
    tokens, which the matrix does not have. follows: the number of new tokens of other parameters
    that come before these.

    The content is names, shape, indices, and the originals of tokens that are not new.
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
        """The number of rows of the matrix with these new tokens, and those before them."""
        return max(self.shape[0], max(self.indices.ids) + 1)

    @property
    def counted(self) -> str:
        """The number of rows, and of how many, in words."""
        count = f"{len(self.indices) - self.grown:,} of {self.shape[0]:,}"
        return f"{count} and {self.grown:,} new" if self.grown else count

    def known(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """The ids that are not new, and their rows among `(k, D)` ones."""
        ids = self.indices.ids_on(rows.device)
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
        """Whether two `(k, D)` originals have the same bits, apart from new tokens."""
        with outside_of_modes():
            return same_bits(a, b) or same_bits(self.known(a)[1], self.known(b)[1])

    def __hash__(self) -> int:
        return hash((self.names, self.shape, self.indices))

    def __deepcopy__(self, memo: dict[int, Any]) -> RowSpec:
        """Itself; or for the copy of the model, if the same deepcopy has copied that before."""
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
        return {name: spec.indices.ids_on(cpu).clone() for name, spec in self.specs.items()}

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
        parts = [
            f"{' = '.join(spec.names)}: {spec.counted} rows{self.half_in_words(spec)}"
            for spec in self.specs.values()
        ]
        return f"TokenDeltas({'; '.join(parts)})"

    def half(self, spec: RowSpec) -> tuple[str, str, str | None] | None:
        """The input embedding, the head and its target, if the spec is of the embedding alone.

        None if the head has rows too, if the two are tied, and if the model names no head or is
        gone.
        """
        model = None if spec.matrix is None else spec.matrix.model()
        found = None if model is None else head_apart(model, spec.names, max(spec.indices.ids))
        names = [name for one in self.specs.values() for name in one.names]
        has_head = found and any(name.startswith(f"{found[1]}.") for name in names)
        return None if has_head else found

    def half_in_words(self, spec: RowSpec) -> str:
        """A note that a spec is of the input embedding alone; empty for any other spec."""
        if not (found := self.half(spec)):
            return ""
        embedding, head, target = found
        both = f"; targets={[embedding, target]} trains both" if target else ""
        return f" (of the input alone, not of the head {head}{both})"


_ORDER = "patch(params), merge(state_dict, params), summary(model, params)"


def check_type(params: object, order: str = _ORDER) -> None:
    """Raise TypeError for anything but a TokenDeltas, with the right `order`."""
    refuse_token_module(params, "module.params(), which are its rows")
    if not isinstance(params, TokenDeltas):
        raise TypeError(
            f"got {type(params).__name__} where the parameters of init_deltas (TokenDeltas) are "
            f"needed. The order is {order}."
        )


# The way out for rows that an engine has sharded, such as a TokenModule's in fully_shard.
GATHER = (
    "Gather the rows first, on all ranks: "
    "optree.tree_map(lambda row: row.detach().full_tensor(), params)."
)


def check_shapes(params: TokenDeltas) -> None:
    """Raise ValueError or TypeError unless each delta is a `(k, D)` float tensor."""
    for name, delta in params.deltas.items():
        spec = params.specs[name]
        expected = (len(spec.indices), spec.shape[1])
        if not isinstance(delta, Tensor) or not delta.is_floating_point():
            what = delta.dtype if isinstance(delta, Tensor) else type(delta).__name__
            raise TypeError(f"the delta of {name!r} is {what}: a floating-point tensor is needed.")
        if is_dtensor(delta):
            raise TypeError(f"the delta of {name!r} is in parts on several ranks. {GATHER}")
        if tuple(delta.shape) != expected:
            raise ValueError(
                f"the delta of {name!r} has shape {tuple(delta.shape)}, and {expected} is needed: "
                "a row for each token index. For a leading axis of adapters use torch.vmap."
            )


# Models whose head without trained rows was warned of.
_warned: weakref.WeakSet[nn.Module] = weakref.WeakSet()


def warn_of_half(model: nn.Module, params: TokenDeltas) -> None:
    """Warn, once for a model, if the input embedding is trained and its untied head is not."""
    found = next(filter(None, map(params.half, params.specs.values())), None)
    if found is None or model in _warned:
        return
    _warned.add(model)
    embedding, head, target = found
    way = (
        f"For both give targets={[embedding, target]}"
        if target
        else "The head has no rows that can be trained"
    )
    warnings.warn(
        f"rows of {embedding!r} alone are trained: the head {head!r} of {type(model).__name__} is "
        f"not tied to it, so the model learns to read these tokens and not to say them. {way}; "
        f"where the input alone is meant, targets={embedding!r} says so.",
        stacklevel=3,
    )


def _flatten(params: TokenDeltas) -> tuple[list[Tensor], Any]:
    # Sorted, because optree and torch order the keys of a dict differently.
    names = tuple(sorted(params.deltas))
    return [params.deltas[name] for name in names], (names, tuple(params.specs[n] for n in names))


def _unflatten(context: Any, leaves: Iterable[Any]) -> TokenDeltas:
    names, specs = context
    return TokenDeltas(dict(zip(names, leaves, strict=True)), dict(zip(names, specs, strict=True)))


def _flatten_with_keys(params: TokenDeltas) -> tuple[list[tuple[Any, Tensor]], Any]:
    leaves, context = _flatten(params)
    return list(zip(map(torch_pytree.MappingKey, context[0]), leaves, strict=True)), context


# optree's annotations ask for a Collection; its code takes any class.
optree.register_pytree_node(
    cast("Any", TokenDeltas),
    cast("Any", lambda params: (*(flat := _flatten(params)), flat[1][0])),
    cast("Any", _unflatten),
    namespace=OPTREE_GLOBAL,
)
torch_pytree.register_pytree_node(
    TokenDeltas,
    _flatten,
    lambda leaves, context: _unflatten(context, leaves),
    flatten_with_keys_fn=_flatten_with_keys,
)
