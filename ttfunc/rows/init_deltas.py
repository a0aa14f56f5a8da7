"""Choosing the rows of a model, and the values that they start with."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Mapping
from reprlib import repr as shown

import torch
from torch import nn

from ttfunc.engines.ownership import check_engine
from ttfunc.engines.shards import rows_or_zeros
from ttfunc.model.beside import check_beside
from ttfunc.model.given import refuse_token_module
from ttfunc.model.matrix import Matrix, matrix_of
from ttfunc.model.origin import origin_of
from ttfunc.model.targets import Targets, both_ends, check_ties_kept, find_targets
from ttfunc.rows.deltas import RowSpec, TokenDeltas, warn_of_half
from ttfunc.rows.given import check_dtype, token_indices
from ttfunc.rows.new_tokens import check_after, check_ends, next_token
from ttfunc.rows.starts import Init, delta_dtype, start_of_each, start_rows
from ttfunc.rows.token_ids import TokenIndices
from ttfunc.torch_private import warn_of_untested


def init_deltas(
    model: nn.Module,
    idx: Iterable[int] | Mapping[str, Iterable[int]],
    *,
    targets: Targets | None = None,
    init: Init = "base",
    grow: bool = False,
    after: TokenDeltas | None = None,
    dtype: torch.dtype | None = None,
    generator: torch.Generator | None = None,
    requires_grad: bool = False,
) -> TokenDeltas:
    """Make rows of a model's token matrices that you train apart from the model.

    The rows R of the token ids S start as W[S], the rows of the matrix W, or as `init` says.

    >>> model = torch.nn.Sequential(torch.nn.Embedding(100, 8), torch.nn.Linear(8, 100))
    >>> params = ttfunc.init_deltas(model, [3, 7])
    >>> params
    TokenDeltas(0.weight: 2 of 100 rows)
    >>> params.deltas["0.weight"].shape, params.token_indices["0.weight"]
    (torch.Size([2, 8]), tensor([3, 7]))

    Args:
        model: any module. It is not changed.
        idx: k token ids; or a mapping from each target to its own ids, and then no `targets`.
        targets: the Embedding and Linear modules that have the rows: the name of a module or the
            end of one, a compiled pattern, or a list of these. By default the input embedding, and
            for new tokens the head too. A matrix that is tied to a target, by identity or by
            memory, is trained with it. Where PEFT has wrapped a layer, you name the layer itself.
        init: where the rows start. `"base"`: as the model has them, and new ones at the mean of the
            matrix. `"mean"`: at the mean of the matrix. `"normal"`: drawn with the mean and the
            standard deviation of each of its columns. A `(k, D)` tensor, for one matrix. A function
            that takes the `(V, D)` matrix and the `(k,)` ids, and returns `(k, D)` rows. Or a
            mapping from each target to one of these.
        grow: allow new tokens, which the matrix has no rows for. Their ids follow its last one: V,
            V+1, … without a gap. The patched matrix has one row more for each; the model stays as
            it is. An untied head grows with the input embedding, also inside a LoRA.
        after: TokenDeltas that already have new tokens. New ids follow theirs, as with `grow`, and
            `patch(after, these)` gives the model both.
        dtype: of the deltas. By default the matrix's own, but float32 for a half-precision one.
        generator: draws the rows of `"normal"`.
        requires_grad: make the deltas leaves for `torch.optim`. `torch.func` does not need it.

    Returns:
        TokenDeltas with a `(k, D)` delta for each distinct matrix, on its device.

    Raises:
        TypeError: ids that are not integers; a `dtype` that is not a float; a TokenModule.
        IndexError: an id past the end of the matrix, without `grow` or with a gap.
        ValueError: no ids, or repeated or negative ones; a target that matches no module, or no
            target for a model that has no one input embedding; tied targets with different ids; an
            `init` of another shape, or one tensor for several matrices; an `after` that does not
            fit the model; new tokens where the head or an adapter has no place for them.

    Warns:
        UserWarning: the default target trains rows of the input embedding alone, because the head
            is a matrix of its own (once for a model); or an id is the `padding_idx`, whose row gets
            no gradient from a lookup.
    """
    warn_of_untested()
    refuse_token_module(model, "init_deltas(module.base, ...)")
    if not isinstance(model, nn.Module):
        raise TypeError(
            f"model must be a torch.nn.Module, got {type(model).__name__}: {shown(model)}. The "
            "order is init_deltas(model, idx)."
        )
    check_engine(model)
    _check_growth(model, grow, after)
    check_dtype(dtype)
    deltas, specs = {}, {}
    requests = _requests(model, idx, targets, grow, after)
    starts = start_of_each(model, init, [matrix for matrix, _ in requests])
    for matrix, indices in requests:
        weight, name = matrix.tensor, matrix.names[0]
        ids = indices.on(weight.device).ids
        originals = rows_or_zeros(weight, ids)
        start = start_rows(starts[name], weight, indices, originals, name, generator)
        if max(indices.ids) >= matrix.shape[0]:
            new = (ids >= matrix.shape[0]).unsqueeze(-1)
            originals = torch.where(new, start.to(originals), originals)
        delta = start.to(weight.device, dtype or delta_dtype(weight.dtype), copy=True)
        deltas[name] = delta.requires_grad_(requires_grad)
        origin = origin_of(model, matrix, indices.ids)
        specs[name] = RowSpec(matrix.names, matrix.shape, indices, originals, matrix, origin)
    params = TokenDeltas(deltas, specs)
    if targets is None and not isinstance(idx, Mapping):
        warn_of_half(model, params)
    return params


def _check_growth(model: nn.Module, grow: object, after: object) -> None:
    if isinstance(grow, TokenDeltas):
        raise TypeError(
            "grow is a TokenDeltas: give after=first for new tokens that follow on those of first. "
            "It implies grow=True."
        )
    if not isinstance(grow, bool):
        raise TypeError(f"grow is a {type(grow).__name__}: give True for new tokens.")
    check_after(model, after)


def _requests(
    model: nn.Module,
    idx: Iterable[int] | Mapping[str, Iterable[int]],
    targets: Targets | None,
    grow: bool,
    after: TokenDeltas | None,
) -> list[tuple[Matrix, TokenIndices]]:
    """Each distinct matrix that is asked for, with its indices."""
    wanted = _wanted(model, idx, targets, grow, after)
    requests: dict[str, tuple[str, Matrix, TokenIndices]] = {}
    for target, module, ids in _each_module(wanted):
        weight = module.get_parameter("weight")
        check_ties_kept(model, target, module)
        matrix = matrix_of(model, weight)
        indices = token_indices(ids, matrix.shape[0], target, _first_new(grow, after, matrix))
        first, _, other = requests.setdefault(matrix.names[0], (target, matrix, indices))
        if other != indices:
            raise ValueError(
                f"targets {first!r} and {target!r} are tied (one matrix, {matrix.names}) and were "
                f"given different token indices, {other.ids} and {indices.ids}. Give them the same "
                "ones in the same order, or name only one of the two."
            )
        _warn_of_padding(target, module, indices)
    found = [(matrix, indices) for _, matrix, indices in requests.values()]
    if longer := [matrix for matrix, indices in found if max(indices.ids) >= matrix.shape[0]]:
        check_ends(model, found)
        for matrix in longer:
            check_beside(model, matrix)
    return found


def _wanted(
    model: nn.Module,
    idx: Iterable[int] | Mapping[str, Iterable[int]],
    targets: Targets | None,
    grow: bool,
    after: TokenDeltas | None,
) -> list[tuple[dict[str, nn.Module], Iterable[int]]]:
    """Groups of modules, each with its ids."""
    if not isinstance(idx, Mapping):
        idx = list(idx) if isinstance(idx, Iterator) else idx  # it may be read twice
        named = find_targets(model, targets)
        grows = grow or after is not None
        if grows and targets is None and _has_new(model, named, idx, grow, after):
            named = both_ends(model, likely=True)
        return [(named, idx)]
    if targets is not None:
        raise ValueError(
            f"idx is a mapping with targets of its own, {list(idx)}, and targets={targets!r} "
            "is given too. Give one of the two."
        )
    if not idx:
        raise ValueError("no token indices: idx is an empty mapping. Name a target in it.")
    return [(find_targets(model, [key]), ids) for key, ids in idx.items()]


def _has_new(
    model: nn.Module,
    named: Mapping[str, nn.Module],
    idx: Iterable[int],
    grow: bool,
    after: TokenDeltas | None,
) -> bool:
    """Whether one of the ids is past the end of the one matrix."""
    ((name, module),) = named.items()
    matrix = matrix_of(model, module.get_parameter("weight"))
    indices = token_indices(idx, matrix.shape[0], name, _first_new(grow, after, matrix))
    return max(indices.ids) >= matrix.shape[0]


def _first_new(grow: bool, after: TokenDeltas | None, matrix: Matrix) -> int | None:
    """The first id that a new token of the matrix may have, if it may have one."""
    if after is not None:
        return next_token(after, matrix)
    return matrix.shape[0] if grow else None


def _each_module(
    wanted: list[tuple[dict[str, nn.Module], Iterable[int]]],
) -> Iterator[tuple[str, nn.Module, Iterable[int]]]:
    for modules, ids in wanted:
        # The ids may come from an iterator, and each module reads them.
        ids = list(ids) if isinstance(ids, Iterator) else ids
        for name, module in modules.items():
            yield name, module, ids


def _warn_of_padding(target: str, module: nn.Module, indices: TokenIndices) -> None:
    padding = getattr(module, "padding_idx", None)
    if padding is not None and indices.row_of(padding) is not None:
        warnings.warn(
            f"token {padding} is the padding_idx of {target!r}: its row gets no gradient from the "
            "input side, so it trains only through a tied head, if there is one.",
            stacklevel=4,
        )
