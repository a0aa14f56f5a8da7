"""The token matrices in a state dict: under which names, and which of these are one tensor."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from torch import Tensor

from ttfunc.model.beside import adapters_in, lengthened
from ttfunc.model.given import refuse_token_module
from ttfunc.model.matrix import holds_floats
from ttfunc.model.memory import same_memory
from ttfunc.model.names import advice, through_wrappers
from ttfunc.model.sizes import bias_names
from ttfunc.rows.deltas import RowSpec, TokenDeltas, check_shapes
from ttfunc.rows.new_tokens import shape_in_weights
from ttfunc.rows.renaming import apart_among, renamed


class Group(NamedTuple):
    """Names of one matrix of the parameters that are one tensor in a state dict."""

    key: str
    spec: RowSpec
    aliases: list[str]


def called(
    state_dict: Mapping[str, Tensor], params: TokenDeltas, names: Mapping[str, str] | None
) -> TokenDeltas:
    """The parameters under the names of the state dict."""
    check_shapes(params)
    refuse_token_module(state_dict, "module.base.state_dict()")
    if not isinstance(state_dict, Mapping):
        raise TypeError(
            f"a state dict is needed, got {type(state_dict).__name__}. The order is "
            "merge(model.state_dict(), params), and the same for unmerge."
        )
    begins = f"the state dict has no such tensor. It begins with {list(state_dict)[:3]}."
    return renamed(params, names, state_dict, "the state dict", lambda spec, other: begins)


def groups_of(
    state_dict: Mapping[str, Tensor], params: TokenDeltas, *, merged: bool = False
) -> list[Group]:
    """The tensors to write to, of a state dict that was merged or not.

    Raises KeyError, TypeError or ValueError where one cannot be.
    """
    groups = []
    for key, spec in params.specs.items():
        held = {alias: state_dict[alias] for alias in spec.names if alias in state_dict}
        _check_found(state_dict, spec, held)
        for alias, matrix in held.items():
            _check_matrix(alias, matrix, spec, merged)
        found = [Group(key, spec, aliases) for _, aliases in _distinct(state_dict, held)]
        for group in found:
            _check_apart(group, params)
        groups += found
    return groups


def _check_apart(group: Group, params: TokenDeltas) -> None:
    """Raise ValueError where the tensor is other matrices of the model as well."""
    key, spec, aliases = group
    others = (name for name, other in params.specs.items() if name != key)
    apart = apart_among(spec, aliases) or [
        name for other in others for name in params.specs[other].names if name in aliases
    ]
    if apart:
        raise ValueError(
            f"the rows of {key!r} cannot be written to {aliases} of the state dict, which are one "
            f"tensor: {apart} was another matrix when the rows were made, and would change with "
            "it. Use a state dict with a tensor for each, as the untied model gives it, or make "
            "the parameters with init_deltas on the tied model."
        )


def _check_found(
    state_dict: Mapping[str, Tensor], spec: RowSpec, held: Mapping[str, Tensor]
) -> None:
    if not held:
        raise KeyError(
            f"the state dict has none of the names {spec.names} of the token matrix."
            f"{advice(spec.names, state_dict) or ' Is it of the same model?'} It begins with "
            f"{list(state_dict)[:3]}."
        )
    absent = [name for name in spec.names if name not in held]
    others = through_wrappers(absent, state_dict) if absent else {}
    for name, other in others.items():
        matrix = state_dict[other]
        if isinstance(matrix, Tensor) and any(_is_same(matrix, known) for known in held.values()):
            continue
        raise KeyError(
            f"the state dict has {list(held)} for the token matrix {spec.names}. It has "
            f"{other!r} instead of {name!r}, and {other!r} would be left as it is. Give "
            f"names={others!r}."
        )


def biases_of(state_dict: Mapping[str, Tensor], group: Group, height: int) -> list[list[str]]:
    """The biases of the logits in a state dict, each with all its names; see `sizes.bias_names`."""
    shapes = {name: one.shape for name, one in state_dict.items() if isinstance(one, Tensor)}
    names = bias_names(shapes, group.aliases, height, group.spec.origin.biases_among(shapes))
    return [same for _, same in _distinct(state_dict, {name: state_dict[name] for name in names})]


def of_height(
    state_dict: Mapping[str, Tensor], aliases: list[str], height: int, now: int
) -> dict[str, Tensor]:
    """What LoRAs around the matrix have for each token, for `now` tokens: 0 for new ones."""
    shapes = {name: one.shape for name, one in state_dict.items() if isinstance(one, Tensor)}
    return {
        name: lengthened(state_dict[name], dimension, now - height)
        for name, dimension in adapters_in(shapes, aliases, height).items()
    }


def _check_matrix(alias: str, matrix: object, spec: RowSpec, merged: bool) -> None:
    if not isinstance(matrix, Tensor) or not holds_floats(matrix):
        what: object = type(matrix).__name__
        if isinstance(matrix, Tensor) and not matrix.is_floating_point():
            what = matrix.dtype
        raise TypeError(
            f"{alias!r} in the state dict is {what}, which holds no rows to replace: a "
            "floating-point tensor is needed. Merge before quantising."
        )
    shape = shape_in_weights(spec, merged)
    if tuple(matrix.shape) != shape:
        raise ValueError(
            f"{alias!r} in the state dict has shape {tuple(matrix.shape)}, and the "
            f"parameters were made for {shape}. Use the state dict of that model."
        )


def _distinct(
    state_dict: Mapping[str, Tensor], held: Mapping[str, Tensor]
) -> list[tuple[Tensor, list[str]]]:
    """The distinct tensors of `held`, each with all names that the state dict has for it."""
    distinct: list[Tensor] = []
    for matrix in held.values():
        if not any(same_memory(matrix, other) for other in distinct):
            distinct.append(matrix)
    return [
        (matrix, [n for n, other in state_dict.items() if _is_same(matrix, other)])
        for matrix in distinct
    ]


def _is_same(matrix: Tensor, other: object) -> bool:
    # A module's extra state may be anything.
    return isinstance(other, Tensor) and same_memory(matrix, other)
