"""New tokens, whose rows follow on the last row of a matrix: which of them belong together."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import replace

from torch import nn

from ttfunc.engines.ownership import shape_of
from ttfunc.model.both_ends import both_ends
from ttfunc.model.given import refuse_token_module
from ttfunc.model.held import names_of
from ttfunc.model.matrix import Matrix
from ttfunc.model.sizes import Entry
from ttfunc.rows.deltas import RowSpec, TokenDeltas
from ttfunc.rows.token_ids import TokenIndices


def check_after(model: nn.Module, after: object) -> None:
    """Raise unless new tokens of the model can follow on those of `after`; None is no others.

    TypeError for anything but TokenDeltas, ValueError for those of another model.
    """
    if after is None:
        return
    refuse_token_module(after, "after=module.params()")
    if not isinstance(after, TokenDeltas):
        raise TypeError(
            f"after is a {type(after).__name__}: give the TokenDeltas whose new tokens these are "
            "to follow on."
        )
    held = names_of(model)
    if foreign := [
        name for name, spec in after.specs.items() if not any(one in held for one in spec.names)
    ]:
        raise ValueError(
            f"after has rows of {foreign}, and {type(model).__name__} has no such parameter: give "
            "rows of this model."
        )


def next_token(after: TokenDeltas, matrix: Matrix) -> int:
    """The id that follows on the last row of a matrix with the rows of `after`.

    Raises ValueError if these were made for a matrix of another shape.
    """
    for spec in after.specs.values():
        if not set(spec.names).isdisjoint(matrix.names):
            if spec.shape != matrix.shape:
                raise ValueError(
                    f"after has rows of {spec.names[0]!r} of shape {spec.shape}, and its shape is "
                    f"{matrix.shape} now. Make or load them anew on the model as it is."
                )
            return spec.height
    return matrix.shape[0]


def numbered_on(spec: RowSpec, after: TokenDeltas, matrix: Matrix) -> RowSpec:
    """The rows with their new tokens numbered on from those of `after`; the others as they are."""
    height, start = spec.shape[0], next_token(after, matrix)
    on = start - height - spec.follows
    ids = tuple(token + on if token >= height else token for token in spec.indices.ids)
    return replace(spec, indices=TokenIndices(ids))


def check_ends(model: nn.Module, requests: list[tuple[Matrix, TokenIndices]]) -> None:
    """Raise ValueError if one end of the model grows otherwise than the other."""
    sizes: dict[str, int] = {}
    for name, module in both_ends(model).items():
        weight = module.get_parameter("weight")
        sizes[name] = shape_of(weight)[0]
        for matrix, indices in requests:
            if any(weight is one for _, one in matrix.slots):
                sizes[name] = max(sizes[name], *(token + 1 for token in indices.ids))
    if len(set(sizes.values())) > 1:
        raise ValueError(
            f"with these rows the matrices of {type(model).__name__} would have {sizes} rows: a "
            "new token needs one at both ends. Make them with the same new ids for both: "
            f"init_deltas(..., targets={list(sizes)}), or without targets."
        )


def check_complete(params: TokenDeltas) -> None:
    """Raise ValueError if new rows lack those that they follow on."""
    for spec in params.specs.values():
        if spec.height > spec.shape[0] + spec.grown:
            raise _left_out(spec, spec.shape[0])


def shape_in_weights(spec: RowSpec, merged: bool) -> tuple[int, int]:
    """The shape of the matrix in weights that the rows are to be merged into, or were.

    They have the new tokens that these rows follow on. Raises ValueError if the new rows
    themselves leave one out.
    """
    start = spec.shape[0] + spec.follows
    if spec.height > start + spec.grown:
        raise _left_out(spec, start)
    return start + spec.grown * merged, spec.shape[1]


def config_entries(specs: Mapping[str, RowSpec], merged: bool = False) -> dict[str, Entry] | None:
    """What the new tokens change in the config of their model; None where that is not known.

    merged: whether it is to be taken back. Raises ValueError if the config has no size for one
    of the matrices alone.
    """
    specs = {key: spec for key, spec in specs.items() if spec.grown}
    if any(spec.origin.sizes is None for spec in specs.values()):
        return None
    entries: dict[str, Entry] = {}
    for key, spec in specs.items():
        sizes = spec.origin.sizes or {}
        alike = {name: one for name, one in specs.items() if _grown(one) == _grown(spec)}
        with_them = {*alike, *(bias for one in alike.values() for bias in one.origin.biases or ())}
        if not sizes:
            raise ValueError(
                f"no entry in the config of {spec.origin.model} says how high {key!r} is, so that "
                "no folder of it can have new rows. Merge into a state dict (ttfunc.merge)."
            )
        if others := [other for other in spec.origin.shared if other not in with_them]:
            raise ValueError(
                f"{list(sizes)} in the config of {spec.origin.model} is the size of {key!r} and of "
                f"{others}, which do not get the {spec.grown} new rows: such a model cannot be "
                "loaded from a folder. Give the new rows to all of them (targets=), if they can "
                "have them, or merge into a state dict (ttfunc.merge)."
            )
        for path, value in sizes.items():
            old, new = value + spec.follows, value + spec.follows + spec.grown
            entries[path] = Entry(new, old, value) if merged else Entry(old, new, value)
    return entries


def _grown(spec: RowSpec) -> tuple[int, int]:
    return spec.follows, spec.grown


def _left_out(spec: RowSpec, start: int) -> ValueError:
    # The first one: an id from a file may be any number.
    token = next(token for token in itertools.count(start) if spec.indices.row_of(token) is None)
    return ValueError(
        f"the new rows of {spec.names[0]!r} leave out token {token}: they follow on those of other "
        "parameters. Give both: combine(first, these), or patch(first, these)."
    )
