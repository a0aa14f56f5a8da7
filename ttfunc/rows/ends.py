"""Rows of the input embedding alone, of a model whose head is a matrix of its own."""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Collection
from typing import Protocol

from torch import nn

from ttfunc.model.matrix import Matrix
from ttfunc.model.targets import head_apart
from ttfunc.rows.token_ids import TokenIndices

# Models that were told of a head whose rows are not trained.
_told: weakref.WeakSet[nn.Module] = weakref.WeakSet()


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
    model = spec.matrix.model() if spec.matrix is not None else None
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


def warn_of_half(model: nn.Module, specs: Collection[_Rows]) -> None:
    """Warn, once for a model, where its head is not trained with the input embedding."""
    found = next(filter(None, (half(spec, specs) for spec in specs)), None)
    if found is None or model in _told:
        return
    _told.add(model)
    embedding, head, target = found
    way = (
        "The head has no rows that can be trained"
        if target is None
        else (f"For both give targets={[embedding, target]}")
    )
    warnings.warn(
        f"rows of {embedding!r} alone are trained: the head {head!r} of {type(model).__name__} is "
        f"not tied to it, so the model learns to read these tokens and not to say them. {way}; "
        f"where the input alone is meant, targets={embedding!r} says so.",
        stacklevel=3,
    )
