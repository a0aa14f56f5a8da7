"""The token matrices in a state dict: under which names, and which of these are one tensor."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from torch import Tensor

from ttfunc.model.beside import adapters_in, bias_names, lengthened
from ttfunc.model.given import refuse_token_module
from ttfunc.model.matrix import holds_floats
from ttfunc.model.memory import same_memory
from ttfunc.model.names import advice, through_wrappers
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
        own: list[Group] = []
        for alias, matrix in held.items():
            _check_matrix(alias, matrix, spec, merged)
            if not any(alias in group.aliases for group in own):
                own.append(Group(key, spec, _names_of(state_dict, matrix)))
        others = {n for one, other in params.specs.items() if one != key for n in other.names}
        for _, _, aliases in own:
            # The tensor may be other matrices of the model as well.
            if apart := apart_among(spec, aliases) or [n for n in aliases if n in others]:
                raise ValueError(
                    f"the rows of {key!r} cannot be written to {aliases} of the state dict, which "
                    f"are one tensor: {apart} was another matrix when the rows were made, and "
                    "would change with it. Use a state dict with a tensor for each, as the untied "
                    "model gives it, or make the parameters with init_deltas on the tied model."
                )
        groups += own
    return groups


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


def resized_beside(state_dict: Mapping[str, Tensor], group: Group, by: int) -> dict[str, Tensor]:
    """What has a number for each token beside a matrix, with `by` zeros more, or so many less.

    These are the biases of the logits, under all their names, and the LoRAs around the matrix.
    """
    shapes = {name: one.shape for name, one in state_dict.items() if isinstance(one, Tensor)}
    start, _ = shape_in_weights(group.spec, by < 0)
    known = group.spec.origin.biases_among(shapes)
    found: dict[str, Tensor] = {}
    for bias in bias_names(shapes, group.aliases, start, known):
        if bias not in found:
            tensor = lengthened(state_dict[bias], len(shapes[bias]) - 1, by)
            found |= dict.fromkeys(_names_of(state_dict, state_dict[bias]), tensor)
    for name, dimension in adapters_in(shapes, group.aliases, start).items():
        found[name] = lengthened(state_dict[name], dimension, by)
    return found


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


def _names_of(state_dict: Mapping[str, Tensor], tensor: Tensor) -> list[str]:
    """All names that a state dict has for one tensor."""
    return [name for name, other in state_dict.items() if _is_same(tensor, other)]


def _is_same(tensor: Tensor, other: object) -> bool:
    # A module's extra state may be anything.
    return isinstance(other, Tensor) and same_memory(tensor, other)
