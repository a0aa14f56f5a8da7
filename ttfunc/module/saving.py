"""`save_pretrained` and `merge_and_unload` of a TokenModule: the model with the rows written in it.

Of a PeftModel, the adapter is merged into a copy of the model. The rows of tokens that the model
has are written before that, because an adapter on the same matrix adds to them, as in a call. The
rows of new tokens come last: the adapter has nothing for them.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import chain
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn

from ttfunc.engines.ownership import engines_at_work, is_sharded
from ttfunc.engines.shards import rows_or_zeros
from ttfunc.merging.merge import merge
from ttfunc.model.matrix import matrix_of
from ttfunc.model.names import innermost
from ttfunc.model.sizes import with_entries
from ttfunc.module.classes import view_of
from ttfunc.rows.deltas import TokenDeltas
from ttfunc.rows.new_tokens import config_entries


def saving_method(module: Any, name: str, method: MethodType) -> Callable[..., Any] | None:
    """What the TokenModule does for a method that saves or merges its model.

    None for any other method, and for a model whose `save_pretrained` saves no whole model.
    """
    mergeable = _can_merge(module.base)
    if name == "merge_and_unload" and mergeable:
        return _merge_and_unload
    if name != "save_pretrained" or "state_dict" not in inspect.signature(method).parameters:
        return None
    base: nn.Module = module.base
    plain = base is method.__self__ and next(_merged_into(base), None) is None
    return _save if plain or mergeable else None


def _can_merge(base: nn.Module) -> bool:
    """Whether it is a PeftModel whose adapter can be merged into the model in it."""
    return innermost(base) is not base and callable(getattr(base, "merge_and_unload", None))


def _save(module: Any, method: MethodType, /, *args: Any, **kwargs: Any) -> None:
    """Save the merged model, as its own `save_pretrained` does."""
    given = inspect.signature(method).bind(*args, **kwargs).arguments
    options: dict[str, Any] = {**given.pop("kwargs", {}), **given}
    others = options.pop("state_dict", None)
    if others is not None and others.keys() != module.state_dict().keys():
        raise ValueError(
            f"a state dict with {list(others)[:3]} is not that of this TokenModule. Leave it out: "
            "what is saved is the model with the rows in it."
        )
    _check_whole(module.base)
    made: Any = _merged(module, shares=True) if _can_merge(module.base) else _with_rows(module)
    model, merged = made
    # A quantised model is asked for its state, whatever is given: transformers flattens that.
    answers: dict[str, Any] = {"state_dict": lambda *_, **__: dict(merged)}
    if entries := config_entries(module.params().specs):
        grown = with_entries(model.config, entries)
        answers["config"] = property(lambda _: grown)
    view_of(model, answers).save_pretrained(**{**options, "state_dict": merged})


def _merge_and_unload(module: Any, method: MethodType, /, **options: Any) -> nn.Module:
    """A plain model of its own with the adapter and the rows in it, resized for new tokens."""
    _check_whole(module.base)
    plain, merged = _merged(module, shares=False, **options)
    if heights := [spec.height for spec in module.params().specs.values() if spec.grown]:
        resize: Any = getattr(plain, "resize_token_embeddings", None)
        if resize is None:
            raise ValueError(
                f"{type(plain).__name__} cannot be resized for the new tokens: it has no "
                "resize_token_embeddings. Merge the adapter, and give the rows to merge()."
            )
        resize(max(heights), mean_resizing=False)
    plain.load_state_dict(merged)
    return plain


def _check_whole(model: nn.Module) -> None:
    if engines_at_work() and any(map(is_sharded, model.state_dict(keep_vars=True).values())):
        raise RuntimeError(
            f"each rank has a part of this {type(model).__name__}, and save_pretrained writes it "
            "whole. Gather its state dict (get_model_state_dict of torch.distributed.checkpoint, "
            "with full_state_dict=True), and save merge(state_dict, module.params()) on one rank; "
            "or save the rows, and merge the folder that the model came from (merge_checkpoint)."
        )


@torch.no_grad()
def _with_rows(module: Any) -> tuple[nn.Module, dict[str, Tensor]]:
    """The base, and its state dict with the rows and with what the module trains beside them."""
    base, state = module.base, module.base.state_dict()
    replaced = {id(base.get_parameter(name)): one for name, one in module._replaced().items()}
    for name, one in base.named_parameters(remove_duplicate=False):
        if id(one) in replaced:
            state[name] = replaced[id(one)].detach()
    return base, merge(state, module.params())


@torch.no_grad()
def _merged(module: Any, *, shares: bool, **options: Any) -> tuple[nn.Module, dict[str, Tensor]]:
    """A copy of the model with the adapter merged into it, and its state dict with the rows.

    shares: whether the copy shares with the base what neither the adapter nor the rows write.
    options: of PEFT's `merge_and_unload`.
    """
    base, params = module.base, module.params()
    _check_ties(base)
    matrices = {name: spec.matrix.tensor for name, spec in params.specs.items() if spec.matrix}
    written = {id(one) for one in chain(matrices.values(), _merged_into(base))}
    held = chain(base.parameters(), base.buffers())
    kept = [one for one in held if shares and not (one.requires_grad or id(one) in written)]
    memo: dict[int, Any] = {id(one): one for one in kept}
    copied: Any = copy.deepcopy(base, memo)
    for name, one in module._replaced().items():
        copied.get_parameter(name).copy_(one)
    copies = {name: memo[id(own)] for name, own in matrices.items()}
    for name, matrix in copies.items():
        ids, rows = params.specs[name].known(params.deltas[name])
        matrix[ids.to(matrix.device)] = rows.to(matrix.device, matrix.dtype)
    plain: nn.Module = copied.merge_and_unload(**options)
    plain.requires_grad_(False)
    names = {name: matrix_of(plain, matrix).names[0] for name, matrix in copies.items()}
    deltas = {name: _rows_now(params, name, matrix) for name, matrix in copies.items()}
    return plain, merge(plain.state_dict(), replace(params, deltas=deltas), names=names)


def _rows_now(params: TokenDeltas, name: str, matrix: Tensor) -> Tensor:
    """The rows that the matrix has by now for its own tokens, and the trained rows of new ones."""
    ids = params.specs[name].indices.ids_on(matrix.device)
    delta = params.deltas[name].to(matrix.device, matrix.dtype)
    return torch.where((ids < len(matrix)).unsqueeze(-1), rows_or_zeros(matrix, ids), delta)


def _merged_into(base: nn.Module) -> Iterator[Tensor]:
    """The parameters that merging an adapter writes."""
    for module in base.modules():
        if "base_layer" in module._modules:
            yield from module.parameters()


def _check_ties(base: nn.Module) -> None:
    """Raise ValueError if an adapter would be merged into a matrix that has other places."""
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
