"""Several TokenDeltas in one: `combine` for one call, `stack` for adapters side by side."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from ttfunc.engines.ownership import base_for_call, is_sharded
from ttfunc.rows.deltas import RowSpec, TokenDeltas, check_shapes, check_type
from ttfunc.rows.given import shortened
from ttfunc.rows.token_ids import TokenIndices, outside_of_autocast, union, with_rows
from ttfunc.torch_private import outside_of_modes


def combine(*params: TokenDeltas) -> TokenDeltas:
    """Put the rows of several TokenDeltas of one model into one, in their order.

    Deltas over the same matrix are concatenated to `(k1 + k2 + …, D)`.

    Args:
        params: at least one TokenDeltas. None of them is changed.

    Returns:
        A new TokenDeltas.

    Raises:
        ValueError: none given; a token in more than one of them; one name for matrices of different
            models.
        TypeError: anything but a TokenDeltas.
    """
    if not params:
        raise ValueError("combine() got no parameters: give at least one TokenDeltas.")
    for given in params:
        check_type(given)
    return functools.reduce(_union, params)


def _union(a: TokenDeltas, b: TokenDeltas) -> TokenDeltas:
    _check_one_model([a, b])
    deltas, specs = {**a.deltas, **b.deltas}, {**a.specs, **b.specs}
    for name in [name for name in a.specs if name in b.specs]:
        specs[name] = _joined_specs(a.specs[name], b.specs[name])
        both = [a.deltas[name], b.deltas[name]]
        first, second = (tuple(delta.shape) for delta in both)
        if (first[:-2], len(first), first[-1]) != (second[:-2], len(second), second[-1]):
            raise ValueError(
                f"the deltas for {name!r} have shapes {first} and {second}: only their numbers of "
                "rows may differ. Stack both, or neither."
            )
        deltas[name] = torch.cat(both, dim=-2)
    return TokenDeltas(deltas, specs)


def _joined_specs(a: RowSpec, b: RowSpec) -> RowSpec:
    _check_apart(a, b)
    with outside_of_modes():
        originals = torch.cat([a.originals, b.originals.to(a.originals.device)])
    return replace(
        a,
        indices=union((a.indices, b.indices)),
        originals=originals,
        matrix=a.matrix or b.matrix,
        origin=a.origin.joined(b.origin),
    )


def _check_apart(a: RowSpec, b: RowSpec) -> None:
    """Raise ValueError if a token is in both."""
    if both := sorted({*a.indices.ids} & {*b.indices.ids}):
        way = "Train or merge the adapters one at a time, or drop the overlap."
        if both[0] >= a.shape[0]:
            way = (
                "If these are other new tokens, number them on from those of the first: "
                "load(path, model, after=first), or init_deltas(model, idx, after=first)."
            )
        raise ValueError(
            f"token indices {shortened(both)} are in more than one of the parameters for "
            f"{a.names[0]!r}: each token has one row. {way}"
        )


def _check_one_model(params: Sequence[TokenDeltas]) -> None:
    """Raise ValueError if a name stands for matrices of different models."""
    first: dict[str, RowSpec] = {}
    for spec in (spec for given in params for spec in given.specs.values()):
        for name in spec.names:
            other = first.setdefault(name, spec)
            same = (spec.names, spec.shape) == (other.names, other.shape)
            tensors = [one.matrix.tensor for one in (spec, other) if one.matrix is not None]
            if not same or (tensors and tensors[0] is not tensors[-1]):
                raise ValueError(
                    f"{name!r} belongs to the matrix {other.names} of shape {other.shape} in one "
                    f"of the parameters, and to {spec.names} of shape {spec.shape} in another: "
                    "they were made from different models, or the model was tied in between. Make "
                    "all with init_deltas on the same model."
                )


def stack(params_list: Iterable[TokenDeltas]) -> TokenDeltas:
    """Put n adapters into one pytree with `(n, k, D)` leaves, over all of their tokens; for `vmap`.

    >>> model = torch.nn.Embedding(100, 8)
    >>> stacked = stack([ttfunc.init_deltas(model, [3, 7]), ttfunc.init_deltas(model, [7, 9])])
    >>> stacked.deltas["weight"].shape, stacked.token_indices["weight"]
    (torch.Size([2, 3, 8]), tensor([3, 7, 9]))
    >>> x = torch.tensor([3, 9])
    >>> torch.vmap(lambda p: ttfunc.functional_call(model, ttfunc.patch(p), x))(stacked).shape
    torch.Size([2, 2, 8])

    Adapter i is `optree.tree_map(lambda t: t[i], stacked)`. For a token or a matrix that only other
    adapters have, it holds the model's row as it is now (or the original, if the rows belong to no
    model or an engine has the matrix).

    Args:
        params_list: n TokenDeltas of one model, of the same tokens or different ones. They are not
            changed.

    Returns:
        TokenDeltas of all k tokens, in the order in which they first come. Each leaf has the widest
        dtype among the adapters' leaves, and the matrix where it holds rows of it. The leaves are
        differentiable with respect to the adapters'.

    Raises:
        ValueError: none given; a delta that is not `(k, D)`; adapters of different models;
            different originals of one token.
        TypeError: anything but TokenDeltas.
    """
    adapters = aligned(params_list)
    names = dict.fromkeys(name for adapter in adapters for name in adapter.specs)
    deltas, specs = {}, {}
    for name in names:
        spec = _common([adapter.specs[name] for adapter in adapters if name in adapter.specs])
        specs[name] = spec
        device = next(one.deltas[name].device for one in adapters if name in one.deltas)
        now = _rows_now(spec).to(device)
        filled = [_filled(adapter, name, spec, now) for adapter in adapters]
        with outside_of_autocast(device):
            deltas[name] = torch.stack(filled)
    return TokenDeltas(deltas, specs)


def aligned(
    params_list: Iterable[TokenDeltas], least: int = 1, order: str = "stack([params, ...])"
) -> list[TokenDeltas]:
    """The adapters as a list of at least `least`.

    Raises unless each is well formed, all are of one model, and all have the same new tokens.
    """
    if isinstance(params_list, TokenDeltas) or not isinstance(params_list, Iterable):
        raise TypeError(
            f"a list of TokenDeltas is needed, got {type(params_list).__name__}. For one adapter "
            "give [params]."
        )
    adapters = list(params_list)
    if len(adapters) < least:
        raise no_adapters()
    for adapter in adapters:
        check_type(adapter, order)
        check_shapes(adapter)
    _check_one_model(adapters)
    _check_same_new(adapters)
    return adapters


def _check_same_new(params: Sequence[TokenDeltas]) -> None:
    """Raise ValueError if adapters for one batch have different new tokens."""
    for name in dict.fromkeys(name for given in params for name in given.specs):
        held = [given.specs.get(name) for given in params]
        found = [(spec.follows, spec.grown) if spec else (0, 0) for spec in held]
        if len(set(found)) > 1:
            counts = [f"{grown} after {follows}" if follows else grown for follows, grown in found]
            raise ValueError(
                f"the adapters have {counts} new tokens for {name!r}: side by side their logits "
                "must be of one size. Give each the same new ids."
            )


def no_adapters() -> ValueError:
    """The error for an empty list of adapters."""
    return ValueError("no adapters: give at least one TokenDeltas.")


def scattered(delta: Tensor, indices: TokenIndices, into: Tensor, among: TokenIndices) -> Tensor:
    """A copy of `into`, the rows of the ids `among`, with `delta` in the rows of `indices`."""
    _, places = among.find(indices.ids_on(into.device), into.device)
    return with_rows(into, places, delta.to(into.device, into.dtype))


def _common(specs: list[RowSpec]) -> RowSpec:
    indices = union(tuple(spec.indices for spec in specs))
    with outside_of_modes():
        first = specs[0].originals
        wide = functools.reduce(torch.promote_types, (spec.originals.dtype for spec in specs))
        originals = first.new_zeros(len(indices), first.shape[1], dtype=wide)
        for spec in specs:
            originals = scattered(spec.originals, spec.indices, originals, indices)
        for spec in specs:
            _, places = indices.find(spec.indices.ids_on(first.device), first.device)
            held, own = originals[places], spec.originals.to(first.device, wide)
            if not spec.same_originals(held, own):
                raise ValueError(
                    f"the adapters for {spec.names[0]!r} were made when the model had other rows, "
                    "or another dtype: their originals of one token differ. Make them anew with "
                    "init_deltas on the model as it is."
                )
            # Adapters may have started a new row differently; one spec cannot hold both starts.
            apart = (held.view(torch.uint8) != own.view(torch.uint8)).any(1)
            originals[places[apart]] = 0
    matrix = next((spec.matrix for spec in specs if spec.matrix is not None), None)
    return replace(specs[0], indices=indices, originals=originals, matrix=matrix)


def _rows_now(spec: RowSpec) -> Tensor:
    """The model's own rows of these tokens, as they are now."""
    matrix = spec.matrix
    if matrix is None or matrix.shape != spec.shape or is_sharded(matrix.tensor):
        return spec.originals
    ids, base = spec.indices.ids_on(matrix.tensor.device), base_for_call(matrix.current)
    if not spec.grown:
        return base.index_select(0, ids)
    # All adapters have rows for the new tokens, which replace whatever is read here.
    return base.index_select(0, ids.clamp(max=len(base) - 1))


def _filled(adapter: TokenDeltas, name: str, spec: RowSpec, now: Tensor) -> Tensor:
    if name not in adapter.specs:
        return now
    delta, indices = adapter.deltas[name], adapter.specs[name].indices
    into = now.to(delta.device, delta.dtype)
    if len(indices) < len(spec.indices):
        into = now.to(delta.device, torch.promote_types(delta.dtype, now.dtype))
    return scattered(delta, indices, into, spec.indices)
