"""Rows of the input embedding alone, of a model whose head is a matrix of its own."""

from __future__ import annotations

from collections.abc import Collection
from typing import Protocol

from ttfunc.indices import TokenIndices
from ttfunc.model.matrix import Matrix
from ttfunc.model.targets import head_apart


class _Rows(Protocol):
    """What is asked of a `RowSpec`."""

    @property
    def names(self) -> tuple[str, ...]: ...
    @property
    def indices(self) -> TokenIndices: ...
    @property
    def matrix(self) -> Matrix | None: ...


def half(spec: _Rows, all_specs: Collection[_Rows]) -> tuple[str, str, str | None] | None:
    """The input embedding, the head and its target, where these rows are of the former alone.

    None where some of all the rows are of the head, where the two ends are tied, and where the
    model names no head or is gone.
    """
    model = spec.matrix.path.model() if spec.matrix is not None else None
    found = None if model is None else head_apart(model, spec.names, max(spec.indices.ids))
    if found is None:
        return None
    names = [name for one in all_specs for name in one.names]
    return None if any(name.startswith(f"{found[1]}.") for name in names) else found


def told_half(spec: _Rows, all_specs: Collection[_Rows]) -> str:
    """What is to be told of rows of the input alone, for a person; empty for others."""
    found = half(spec, all_specs)
    if found is None:
        return ""
    embedding, head, target = found
    both = "" if target is None else f"; targets={[embedding, target]} trains both"
    return f" (of the input alone, not of the head {head}{both})"
