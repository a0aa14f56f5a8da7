"""Whether rows, ids and an assignment are inputs of a program, which itself checks nothing."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

import torch
from torch import Tensor

from ttfunc.call.patch_mixed import adapter_numbers
from ttfunc.model.matrix import Matrix
from ttfunc.rows.given import shortened
from ttfunc.torch_private import is_exported, transforms_active


def check_rows(matrix: Matrix, rows: object, ids: object, mixed: bool) -> None:
    """Raise unless these are rows for the matrix, and ids of its tokens."""
    name, (height, width) = matrix.names[0], matrix.shape
    if not isinstance(rows, Tensor) or not rows.is_floating_point():
        raise TypeError(f"the rows of {name!r} must be a float tensor, got {_kind_of(rows)}.")
    if not isinstance(ids, Tensor) or ids.dtype != torch.int64:
        raise TypeError(
            f"the ids of {name!r} must be an int64 tensor, got {_kind_of(ids)}. Convert them: "
            "ids.to(torch.int64)."
        )
    fits = ids.ndim == 1 + mixed and rows.shape == (*ids.shape, width) and ids.shape[-1] <= height
    if not fits or 0 in ids.shape:
        shapes = "(n, k) and (n, k, D)" if mixed else "(k,) and (k, D)"
        raise ValueError(
            f"the ids and rows of {name!r} must be {shapes}, with k from 1 to {height} and D "
            f"{width}; got {tuple(ids.shape)} and {tuple(rows.shape)}."
        )
    for one in ids.view(-1, ids.shape[-1]).tolist() if _has_values(ids) else []:
        used = Counter(token for token in one if token != -1)
        if beyond := [token for token in used if not 0 <= token < height]:
            raise IndexError(
                f"the ids {shortened(beyond)} are no tokens of {name!r}, which has {height} rows. "
                f"Give 0 to {height - 1}, or -1 for a row that is not used."
            )
        if repeated := sorted(token for token, times in used.items() if times > 1):
            raise ValueError(
                f"the ids {shortened(repeated)} of {name!r} are given more than once: each token "
                "has one row. Give -1 for the others."
            )


def check_assignment(assignment: object, counts: Mapping[str, int]) -> None:
    """Raise unless it is one among as many adapters as each matrix has ids of."""
    first, *others = counts.values()
    if any(count != first for count in others):  # sizes in a trace have no hash
        raise ValueError(f"the ids have other numbers of adapters: {counts}. Give the same.")
    if not isinstance(assignment, Tensor) or assignment.dtype != torch.int64:
        raise TypeError(f"assignment must be an int64 tensor, got {_kind_of(assignment)}.")
    if assignment.ndim != 1:
        raise ValueError(f"assignment must be (B,), got {tuple(assignment.shape)}.")
    if _has_values(assignment):
        adapter_numbers(assignment, first)


def _has_values(tensor: Tensor) -> bool:
    """Whether its values can be read here: it is not traced, nor on meta."""
    traced = is_exported() or transforms_active() or torch.compiler.is_dynamo_compiling()
    return not (traced or tensor.is_meta)


def _kind_of(value: object) -> object:
    """What was given in place of a tensor, for a message."""
    return getattr(value, "dtype", type(value).__name__)
