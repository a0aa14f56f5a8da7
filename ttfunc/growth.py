"""New tokens, whose rows follow on the last row of a matrix: which of them belong together."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

from ttfunc.deltas import RowSpec, TokenDeltas


def check_complete(params: TokenDeltas) -> None:
    """Raise ValueError where new rows lack those that they follow on."""
    for spec in params.specs.values():
        if spec.height > spec.shape[0] + spec.grown:
            raise _left_out(spec, spec.shape[0])


def check_same_new(params: Sequence[TokenDeltas]) -> None:
    """Raise ValueError where adapters that are to be side by side have other new tokens."""
    for name in dict.fromkeys(name for given in params for name in given.specs):
        held = [given.specs.get(name) for given in params]
        found = [(spec.follows, spec.grown) if spec else (0, 0) for spec in held]
        if len(set(found)) > 1:
            counts = [f"{grown} after {follows}" if follows else grown for follows, grown in found]
            raise ValueError(
                f"the adapters have {counts} new tokens for {name!r}: side by side their logits "
                "must be of one size. Give each the same new ids."
            )


def shape_in_weights(spec: RowSpec, merged: bool) -> tuple[int, int]:
    """The shape of the matrix in weights that the rows are to be merged into, or were.

    They have the new tokens that these rows follow on. Raises ValueError where the new rows
    themselves leave one out.
    """
    start = spec.shape[0] + spec.follows
    if spec.height > start + spec.grown:
        raise _left_out(spec, start)
    return start + spec.grown * merged, spec.shape[1]


def _left_out(spec: RowSpec, start: int) -> ValueError:
    # The first one: an id from a file may be any number.
    token = next(token for token in itertools.count(start) if spec.indices.row_of(token) is None)
    return ValueError(
        f"the new rows of {spec.names[0]!r} leave out token {token}: they follow on those of other "
        "parameters. Give both: combine(first, these), or patch(first, these)."
    )
