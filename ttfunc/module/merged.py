"""A TokenModule over a PeftModel as a plain model: the adapter merged into a copy, and the rows.

The rows of tokens that the model has are written first, because an adapter on the same matrix adds
to them, as in a call. New rows come last: the adapter has nothing for them.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from ttfunc.engines.shards import rows_or_zeros
from ttfunc.model.matrix import matrix_of
from ttfunc.model.names import innermost
from ttfunc.model.origin import origin_of
from ttfunc.module.parts import Bridge
from ttfunc.rows.deltas import RowSpec, TokenDeltas
from ttfunc.weight.deferred import PatchedWeight


def can_merge(base: nn.Module) -> bool:
    """Whether it is a model with an adapter of PEFT's that can be merged into it."""
    return innermost(base) is not base and callable(getattr(base, "merge_and_unload", None))


@torch.no_grad()
def without_adapter(
    bridge: Bridge, *, shares: bool, **options: Any
) -> tuple[nn.Module, TokenDeltas]:
    """The model with the adapter merged into it, and the rows on that model.

    shares: with the base, what neither the adapter nor the rows write. options: those of PEFT's
    `merge_and_unload`. The base is not changed.
    """
    base, params = bridge.base, bridge.params()
    _check_ties(base)
    matrices = {name: spec.matrix.tensor for name, spec in params.specs.items() if spec.matrix}
    written = {id(one) for one in chain(matrices.values(), _merged_into(base))}
    held = chain(base.parameters(), base.buffers())
    kept = [one for one in held if shares and not (one.requires_grad or id(one) in written)]
    memo: dict[int, Any] = {id(one): one for one in kept}
    copied: Any = copy.deepcopy(base, memo)
    for name, one in bridge._weights().items():
        if not isinstance(one, PatchedWeight):  # a copy of the module has others than the base
            copied.get_parameter(name).copy_(one)
    for name, own in matrices.items():
        ids, rows = params.specs[name].known(params.deltas[name].detach())
        matrix = memo[id(own)]
        matrix[ids.to(matrix.device)] = rows.to(matrix.device, matrix.dtype)
    plain: nn.Module = copied.merge_and_unload(**options)
    plain.requires_grad_(False)
    return plain, _rows_on(plain, params, {name: memo[id(own)] for name, own in matrices.items()})


def _rows_on(plain: nn.Module, params: TokenDeltas, matrices: dict[str, Tensor]) -> TokenDeltas:
    """The rows on the merged model: those that it has by now, and the new ones."""
    deltas, specs = {}, {}
    for name, tensor in matrices.items():
        spec, matrix = params.specs[name], matrix_of(plain, tensor)
        ids = spec.indices.on(tensor.device).ids
        there = rows_or_zeros(tensor, ids)
        delta = params.deltas[name].detach().to(tensor.device, tensor.dtype)
        first = matrix.names[0]
        deltas[first] = torch.where((ids < spec.shape[0]).unsqueeze(-1), there, delta)
        origin = origin_of(plain, matrix, spec.indices.ids)
        specs[first] = RowSpec(matrix.names, matrix.shape, spec.indices, there, matrix, origin)
    return TokenDeltas(deltas, specs)


def _merged_into(base: nn.Module) -> Iterator[Tensor]:
    """What merging an adapter writes."""
    for module in base.modules():
        if "base_layer" in module._modules:
            yield from module.parameters()


def _check_ties(base: nn.Module) -> None:
    """Raise ValueError where an adapter would be merged into a matrix that has other places."""
    names: dict[int, list[str]] = {}
    for name, one in base.named_parameters(remove_duplicate=False):
        names.setdefault(id(one), []).append(name)
    for written in _merged_into(base):
        if len(tied := names.get(id(written), [])) > 1:
            raise ValueError(
                f"{tied} are one matrix, and the adapter is on it: merged, it would be at "
                "each of these places. Save them apart (ttfunc.save(module.params(), path) and "
                "module.base.save_pretrained(directory)), or leave tied matrices out of the "
                "adapter."
            )
