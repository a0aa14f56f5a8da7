"""Writing the trained rows into a state dict, and taking them out again."""

from __future__ import annotations

import copy
from collections.abc import Mapping

import torch
from torch import Tensor

from ttfunc.deltas import TokenDeltas, TokenRows, check_shapes, combine
from ttfunc.targets import same_memory


def merge(
    state_dict: Mapping[str, Tensor],
    params: TokenDeltas,
    *more: TokenDeltas,
    check_finite: bool = False,
) -> dict[str, Tensor]:
    """A state dict with the trained rows in it; `unmerge(merge(sd, p), p)` is `sd` bit for bit.

    Args:
        state_dict: of the model, in any float dtype. It is not changed.
        params: with `(k, D)` deltas; they are cast to the dtype of the matrix.
        more: further rows, of other tokens.
        check_finite: refuse rows that are NaN or infinite in the matrix's dtype.

    Returns:
        A new dict. Every tensor that is not patched is the one passed in, and names that were one
        tensor are one tensor still. Differentiable by the deltas: merge `params` that do not
        require grad, or under `torch.no_grad()`, for a state dict to save.

    Raises:
        KeyError: the state dict has none of a matrix's names.
        ValueError: a matrix or a delta of another shape, overlapping tokens, or a row that is not
            finite.
        TypeError: no mapping, or a matrix in it that is no float tensor.
    """
    together = combine(params, *more)
    check_shapes(together)
    merged = _written(state_dict, together, together.deltas)
    if check_finite:
        for name, row in together.rows.items():
            for alias in row.names:
                if alias in merged:  # each has a dtype of its own
                    _check_finite(merged[alias], row, name)
    return merged


def unmerge(
    state_dict: Mapping[str, Tensor], params: TokenDeltas, *more: TokenDeltas
) -> dict[str, Tensor]:
    """A state dict with the original rows back in place: the inverse of `merge`.

    The originals are those that `params` were made with; whatever has been written to these rows
    since is overwritten. The state dict is not changed; the result shares with it as `merge`'s
    does.

    Raises:
        KeyError, ValueError: as `merge`; ValueError also where the state dict is of a dtype that
            holds more than the originals', so that they may be roundings of what was there.
    """
    together = combine(params, *more)
    check_shapes(together)
    restored = _written(state_dict, together, together.originals)
    for row in together.rows.values():
        for alias in row.names:
            if alias in restored:
                check_originals(alias, restored[alias].dtype, row.originals.dtype)
    return restored


def check_originals(name: str, dtype: torch.dtype, originals: torch.dtype) -> None:
    """Raise ValueError where rows of `dtype` cannot be given back from `originals`."""
    has, kept = torch.finfo(dtype), torch.finfo(originals)
    if has.eps < kept.eps or has.max > kept.max or has.smallest_normal < kept.smallest_normal:
        raise ValueError(
            f"{name!r} is in {dtype} and the original rows were taken in {originals}, which cannot "
            "give back all of it: they may not be what was there. Make the parameters from a model "
            f"in {dtype}, or keep what was merged into."
        )


def _written(
    state_dict: Mapping[str, Tensor], params: TokenDeltas, values: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    if not isinstance(state_dict, Mapping):
        raise TypeError(
            f"a state dict is needed, got {type(state_dict).__name__}. The order is "
            "merge(model.state_dict(), params)."
        )
    # copy.copy keeps the type and the _metadata of what nn.Module.state_dict returns.
    result: dict[str, Tensor] = (
        copy.copy(state_dict) if isinstance(state_dict, dict) else dict(state_dict)
    )
    for name, row in params.rows.items():
        # From the result: another adapter may have written to one of these names before.
        held = {alias: result[alias] for alias in row.names if alias in result}
        if not held:
            raise KeyError(
                f"the state dict has none of the names {row.names} of the token matrix. Is it of "
                f"the same model, without a prefix? It begins with {list(state_dict)[:3]}."
            )
        for alias, matrix in held.items():
            if not isinstance(matrix, Tensor) or not matrix.is_floating_point():
                what = matrix.dtype if isinstance(matrix, Tensor) else type(matrix).__name__
                raise TypeError(
                    f"{alias!r} in the state dict is {what}, which holds no rows to replace: a "
                    "floating-point tensor is needed. Merge before quantising."
                )
            if tuple(matrix.shape) != row.shape:
                raise ValueError(
                    f"{alias!r} in the state dict has shape {tuple(matrix.shape)}, and the "
                    f"parameters were made for {row.shape}. Use the state dict of that model."
                )
        for matrix, aliases in _distinct(result, held):
            rows = values[name].to(matrix.device, matrix.dtype)
            written = _with_rows(matrix, row.indices.on(matrix.device).ids, rows)
            result.update(dict.fromkeys(aliases, written))
    return result


def _with_rows(matrix: Tensor, ids: Tensor, rows: Tensor) -> Tensor:
    if matrix.element_size() > 1:
        return matrix.index_copy(0, ids, rows)
    # torch copies no float of eight bits by index, only their bytes.
    as_bytes = matrix.view(torch.uint8).index_copy(0, ids, rows.view(torch.uint8))
    return as_bytes.view(matrix.dtype)


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


def _check_finite(matrix: Tensor, row: TokenRows, name: str) -> None:
    rows = matrix.detach().index_select(0, row.indices.on(matrix.device).ids)
    if rows.element_size() == 1:  # torch has no isfinite for floats of eight bits
        rows = rows.float()
    finite = torch.isfinite(rows).all(dim=1).tolist()
    if bad := [token for token, fine in zip(row.indices.ids, finite, strict=True) if not fine]:
        raise ValueError(
            f"the rows of tokens {bad} for {name!r} are not finite in {matrix.dtype}. Train with a "
            "smaller step, or merge into a wider dtype."
        )
