"""Choosing the rows of a model, and the values that they start with."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Mapping
from reprlib import repr as brief
from typing import NamedTuple

import torch
from torch import nn

from ttfunc.engines.ownership import check_engine
from ttfunc.engines.shards import rows_or_zeros
from ttfunc.model.beside import check_beside
from ttfunc.model.both_ends import both_ends, check_ties_kept
from ttfunc.model.given import refuse_token_module
from ttfunc.model.matrix import Matrix, matrix_of
from ttfunc.model.origin import origin_of
from ttfunc.model.targets import Targets, find_targets
from ttfunc.rows.deltas import RowSpec, TokenDeltas, warn_of_half
from ttfunc.rows.given import check_dtype, token_indices
from ttfunc.rows.new_tokens import check_after, check_ends, next_token
from ttfunc.rows.starts import Init, delta_dtype, start_of_each, start_rows
from ttfunc.rows.token_ids import TokenIndices


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
    _check_arguments(model, grow, after, dtype)
    deltas, specs = {}, {}
    requests = _requests(model, idx, targets, _Growth(grow, after))
    starts = start_of_each(model, init, [matrix for matrix, _ in requests])
    for matrix, indices in requests:
        weight, name = matrix.tensor, matrix.names[0]
        ids = indices.ids_on(weight.device)
        originals = rows_or_zeros(weight, ids)
        start = start_rows(starts[name], matrix, indices, originals, generator)
        if indices.end > matrix.shape[0]:
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


def _check_arguments(
    model: nn.Module, grow: bool, after: TokenDeltas | None, dtype: torch.dtype | None
) -> None:
    refuse_token_module(model, "init_deltas(module.base, ...)")
    if not isinstance(model, nn.Module):
        raise TypeError(
            f"model must be a torch.nn.Module, got {type(model).__name__}: {brief(model)}. The "
            "order is init_deltas(model, idx)."
        )
    if not isinstance(grow, bool):
        way = "after=first" if isinstance(grow, TokenDeltas) else "True"
        raise TypeError(f"grow is a {type(grow).__name__}: give {way} for new tokens.")
    check_engine(model)
    check_after(model, after)
    check_dtype(dtype)


class _Growth(NamedTuple):
    """Whether ids past the end are allowed, and the parameters whose new tokens they follow on."""

    grow: bool
    after: TokenDeltas | None

    def indices(self, ids: Iterable[int], matrix: Matrix, target: str) -> TokenIndices:
        """The ids for a matrix, checked."""
        height = matrix.shape[0]
        first_new = height if self.grow else None
        if self.after is not None:
            first_new = next_token(self.after, matrix)
        return token_indices(ids, height, target, first_new)


def _requests(
    model: nn.Module,
    idx: Iterable[int] | Mapping[str, Iterable[int]],
    targets: Targets | None,
    growth: _Growth,
) -> list[tuple[Matrix, TokenIndices]]:
    """Each distinct matrix that is asked for, with its indices."""
    requests: dict[str, tuple[str, Matrix, TokenIndices]] = {}
    for target, module, ids in _modules(model, idx, targets, growth):
        check_ties_kept(model, target, module)
        matrix = matrix_of(model, module.get_parameter("weight"))
        indices = growth.indices(ids, matrix, target)
        first, _, other = requests.setdefault(matrix.names[0], (target, matrix, indices))
        if other != indices:
            raise ValueError(
                f"targets {first!r} and {target!r} are tied (one matrix, {matrix.names}) and were "
                f"given different token indices, {other.ids} and {indices.ids}. Give them the same "
                "ones in the same order, or name only one of the two."
            )
        padding = getattr(module, "padding_idx", None)
        if padding is not None and indices.row_of(padding) is not None:
            warnings.warn(
                f"token {padding} is the padding_idx of {target!r}: its row gets no gradient from "
                "the input side, so it trains only through a tied head, if there is one.",
                stacklevel=3,
            )
    found = [(matrix, indices) for _, matrix, indices in requests.values()]
    if longer := [matrix for matrix, indices in found if indices.end > matrix.shape[0]]:
        check_ends(model, found)
        for matrix in longer:
            check_beside(model, matrix)
    return found


def _modules(
    model: nn.Module,
    idx: Iterable[int] | Mapping[str, Iterable[int]],
    targets: Targets | None,
    growth: _Growth,
) -> Iterator[tuple[str, nn.Module, Iterable[int]]]:
    """Each module that is asked for, by name, with its ids."""
    if not isinstance(idx, Mapping):
        idx = list(idx) if isinstance(idx, Iterator) else idx  # each module reads it
        named = find_targets(model, targets)
        if targets is None and (growth.grow or growth.after is not None):
            ((name, module),) = named.items()
            matrix = matrix_of(model, module.get_parameter("weight"))
            if growth.indices(idx, matrix, name).end > matrix.shape[0]:
                named = both_ends(model, likely=True)
        yield from ((name, module, idx) for name, module in named.items())
        return
    if targets is not None:
        raise ValueError(
            f"idx is a mapping with targets of its own, {list(idx)}, and targets={targets!r} "
            "is given too. Give one of the two."
        )
    if not idx:
        raise ValueError("no token indices: idx is an empty mapping. Name a target in it.")
    for key, ids in idx.items():
        ids = list(ids) if isinstance(ids, Iterator) else ids
        yield from ((name, module, ids) for name, module in find_targets(model, [key]).items())
