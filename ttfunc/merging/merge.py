"""Writing the trained rows into a state dict, and taking them out again."""

from __future__ import annotations

import copy
import operator
import warnings
from collections.abc import Mapping
from reprlib import repr as shown

import torch
from torch import Tensor, nn

from ttfunc.engines.shards import rows_at
from ttfunc.merging.state_dict import Group, called, groups_of, resized_beside
from ttfunc.rows.deltas import RowSpec, TokenDeltas
from ttfunc.rows.new_tokens import shape_in_weights
from ttfunc.rows.several import combine
from ttfunc.rows.token_ids import TokenIndices, with_rows
from ttfunc.torch_distributed_private import is_dtensor
from ttfunc.torch_private import is_wrapped, outside_of_modes
from ttfunc.weight.dtensor_rows import like, part


def merge(
    state_dict: Mapping[str, Tensor],
    params: TokenDeltas,
    *more: TokenDeltas,
    check_finite: bool = False,
    names: Mapping[str, str] | None = None,
) -> dict[str, Tensor]:
    """Return a state dict with the trained rows in it; `unmerge` is the inverse, bit for bit.

    `W[S] = R` in a copy of the matrix W, under each of its names.

    >>> model = torch.nn.Embedding(100, 8)
    >>> params = ttfunc.init_deltas(model, [3, 7], init="mean")
    >>> merged = merge(model.state_dict(), params)
    >>> torch.equal(merged["weight"][[3, 7]], params.deltas["weight"])
    True
    >>> torch.equal(unmerge(merged, params)["weight"], model.weight)
    True

    Args:
        state_dict: of the model, in any float dtype. It is not changed.
        params: with `(k, D)` deltas, which are cast to the dtype of the matrix.
        more: further rows, of other tokens.
        check_finite: refuse rows that are NaN or infinite in the matrix's dtype.
        names: a mapping from the model's name of a matrix to the state dict's, where the two differ
            (as with a wrapper around the model).

    Returns:
        A new dict. Tensors that are not patched are the ones you passed in, and names that shared
        one tensor still share one. With n new tokens a matrix is `(V + n, D)`. The result is
        differentiable with respect to the deltas: for a state dict to save, merge `params` that do
        not require grad, or merge under `torch.no_grad()`.

    Raises:
        KeyError: the state dict has none of the names of a matrix, or lacks the one in `names`.
        ValueError: a matrix or a delta of another shape; overlapping tokens; a row that is not
            finite; one tensor under names that were several matrices when the rows were made, which
            would all get the rows of one. (Of a state dict with only one of these names, merge
            cannot know whether it is tied.)
        TypeError: the state dict is not a mapping, or a matrix in it is not a float tensor.

    Warns:
        UserWarning: some rows in the state dict are the originals and others are not, so `unmerge`
            cannot give all of them back; this happens after a merge of other rows of these tokens.
            (If none are the originals, as with another base, the rows are replaced without a
            warning.)
    """
    together = called(state_dict, combine(params, *more), names)
    groups = groups_of(state_dict, together)
    for key in together.specs:
        own = [group for group in groups if group.key == key]
        _warn_of_others(state_dict, own, together.deltas[key])
    merged = _written(state_dict, groups, together.deltas)
    if check_finite:
        for name, spec, aliases in groups:  # each has a dtype of its own
            _check_finite(merged[aliases[0]], spec, name)
    return merged


def unmerge(
    state_dict: Mapping[str, Tensor],
    params: TokenDeltas,
    *more: TokenDeltas,
    names: Mapping[str, str] | None = None,
) -> dict[str, Tensor]:
    """Return a state dict with the original rows back in place: the inverse of `merge`.

    The originals are the rows that the model had when `params` were made. They overwrite whatever
    was written to these rows since.

    Args:
        state_dict: the merged one. It is not changed.
        params: the rows that were merged.
        more: further rows that were merged.
        names: as for `merge`.

    Returns:
        A new dict, which shares tensors with `state_dict` as the result of `merge` does.

    Raises:
        KeyError, ValueError, TypeError: as `merge`.
        ValueError: the dtype of the state dict holds more than that of the originals, which may
            then be rounded.
    """
    together = called(state_dict, combine(params, *more), names)
    groups = groups_of(state_dict, together, merged=True)
    for _, spec, aliases in groups:
        check_originals(aliases[0], state_dict[aliases[0]].dtype, spec.originals.dtype)
    return _written(state_dict, groups, together.originals, original=True)


def check_originals(name: str, dtype: torch.dtype, originals: torch.dtype) -> None:
    """Raise ValueError if rows of `dtype` cannot be given back from `originals`."""
    has, kept = torch.finfo(dtype), torch.finfo(originals)
    if has.eps < kept.eps or has.max > kept.max or has.smallest_normal < kept.smallest_normal:
        raise ValueError(
            f"{name!r} is in {dtype}, but the original rows were taken in {originals}, which does "
            "not hold all of its values: the originals may be rounded. Make the parameters from a "
            f"model in {dtype}, or keep the weights from before the merge."
        )


def _warn_of_others(state_dict: Mapping[str, Tensor], groups: list[Group], delta: Tensor) -> None:
    """Warn if some rows of a matrix are the originals, and others are neither these nor new.

    This happens where some of its names hold other rows, or where other adapters were merged.
    """
    held = [state_dict[group.aliases[0]] for group in groups]
    spec = groups[0].spec
    if torch.compiler.is_dynamo_compiling() or not all(map(_is_plain, [*held, spec.originals])):
        return
    originals = [_holds(matrix, spec, spec.originals) for matrix in held]
    if any(one != originals[0] for one in originals):
        pairs = list(zip(originals, groups, strict=True))
        others, these = (
            [name for one, group in pairs if all(one) == have for name in group.aliases]
            for have in (False, True)
        )
        warnings.warn(
            f"the rows of tokens {shown(list(spec.indices.ids))} in {others} are not the originals "
            f"of the parameters, but those in {these} are. These names are one matrix in the "
            "model, but not in this state dict. The trained rows replace both, and unmerge will "
            "write the originals to both. Keep this state dict.",
            stacklevel=3,
        )
    elif held[0].dtype == spec.originals.dtype and len(set(originals[0])) > 1:  # not by rounding
        ids = spec.known(spec.originals)[0].tolist()
        merged = _holds(held[0], spec, delta) if _is_plain(delta) else originals[0]
        known = map(operator.or_, originals[0], merged)
        if other := [token for token, one in zip(ids, known, strict=True) if not one]:
            warnings.warn(
                f"the rows of tokens {shown(other)} in {groups[0].aliases} are not the originals "
                "of the parameters, though those of its other tokens are: were other rows of these "
                "tokens merged before, or were they trained since? The new rows replace them, and "
                "unmerge will write the originals. Keep this state dict.",
                stacklevel=3,
            )


def _is_plain(tensor: Tensor) -> bool:
    """Whether its values can be read here: it is no tensor of a transform, a trace or a mesh."""
    return type(tensor) in (Tensor, nn.Parameter) and not tensor.is_meta and not is_wrapped(tensor)


def _holds(matrix: Tensor, spec: RowSpec, rows: Tensor) -> list[bool]:
    """For each of the rows that is not new, whether the matrix has it, in its dtype."""
    with outside_of_modes():
        ids, known = spec.known(rows.detach().to(matrix.device, matrix.dtype))
        found = matrix.detach().index_select(0, ids)
        same = found.view(torch.uint8) == known.contiguous().view(torch.uint8)
        held: list[bool] = same.all(dim=1).tolist()
        return held


def _written(
    state_dict: Mapping[str, Tensor],
    groups: list[Group],
    values: Mapping[str, Tensor],
    *,
    original: bool = False,
) -> dict[str, Tensor]:
    """A copy of the state dict with these rows, which is longer by the new tokens.

    original: the rows are of old tokens alone, and the copy is shorter by the new ones.
    """
    # copy.copy keeps the type and the _metadata of what nn.Module.state_dict returns.
    result = copy.copy(state_dict) if isinstance(state_dict, dict) else dict(state_dict)
    for group in groups:
        key, spec, aliases = group
        # Read from the result: another adapter may already have written to one of these names.
        matrix = result[aliases[0]]
        rows = values[key].to(matrix.device, matrix.dtype)
        ids = spec.indices.ids_on(matrix.device)
        # Another matrix that is this tensor here may have made it longer, or shorter, already.
        by = max(0, spec.height - len(matrix))
        if original:
            by = min(0, shape_in_weights(spec, merged=False)[0] - len(matrix))
            ids, rows = spec.known(rows)
        written = _with_rows(matrix[:by] if by < 0 else matrix, ids, rows, max(0, by))
        result.update(dict.fromkeys(aliases, written))
        if by:
            result.update(resized_beside(result, group, by))
    return result


def _with_rows(matrix: Tensor, ids: Tensor, rows: Tensor, longer: int) -> Tensor:
    if is_dtensor(matrix):
        if longer:
            raise ValueError(
                f"{longer} new tokens for a matrix of which each rank has a part: merge them into "
                "the whole state dict, as get_model_state_dict gives it with "
                "StateDictOptions(full_state_dict=True)."
            )
        own_rows, own_ids = part(rows, TokenIndices(tuple(ids.tolist())), matrix)
        local = matrix.to_local()  # type: ignore[attr-defined]
        here = _with_rows(local, own_ids.ids_on(local.device), own_rows, 0)
        return like(matrix, here)
    if matrix.element_size() > 1:
        return with_rows(matrix, ids, rows, longer)
    # index_copy does not support 8-bit floats, so their bytes are copied.
    as_bytes = with_rows(matrix.view(torch.uint8), ids, rows.view(torch.uint8), longer)
    return as_bytes.view(matrix.dtype)


def _check_finite(matrix: Tensor, spec: RowSpec, name: str) -> None:
    rows = rows_at(matrix, spec.indices.ids_on(matrix.device))
    if rows.element_size() == 1:  # torch has no isfinite for floats of eight bits
        rows = rows.float()
    finite = torch.isfinite(rows).all(dim=1).tolist()
    if bad := [token for token, fine in zip(spec.indices.ids, finite, strict=True) if not fine]:
        raise ValueError(
            f"the rows of tokens {bad} for {name!r} are not finite in {matrix.dtype}. Train with a "
            "smaller step, or merge into a wider dtype."
        )
