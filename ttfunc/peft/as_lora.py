"""Rows as a plain LoRA, for servers that know LoRA and no token rows."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from safetensors.torch import save as serialized
from torch import Tensor, nn

from ttfunc.disk.tensors import check_rows, cpu_copy, path_of, prefix_errors
from ttfunc.engines.ownership import is_sharded
from ttfunc.engines.shards import rows_at
from ttfunc.model.names import PEFT_PREFIX
from ttfunc.peft.writer import write_adapter
from ttfunc.rows.deltas import RowSpec, TokenDeltas, check_type


class _Layer(NamedTuple):
    """A module that a LoRA is for, whether it looks tokens up, and its rows."""

    name: str
    looks_up: bool
    spec: RowSpec
    delta: Tensor


def save_as_lora(
    params: TokenDeltas,
    directory: str | os.PathLike[str],
    *,
    rank: int | None = None,
    base_model: str | os.PathLike[str] | None = None,
) -> int:
    """Write the rows as a plain LoRA, for servers that know LoRA and no token rows.

    The LoRA is one of the embedding and the head. With the rows R in place of W[S] the matrix is W
    plus a product of two factors, as in a LoRA of rank k: of a V×k matrix that has a 1 for each
    token, and of R − W[S]. On a model that reads the matrix by its Embedding and Linear modules
    alone, it gives the logits of the rows, to rounding. It needs the rows W[S] that the model has
    now.

    The factors with V entries make the file far larger than the rows: 4 · rank · (V + D) bytes for
    each module. Do not merge this LoRA: of a tied matrix it has two parts, one for each way to read
    it, and PEFT's `merge_and_unload` would add both. Merge the rows themselves.

    Args:
        params: made from a model, which tells embeddings from heads. They are not changed.
        directory: as for `save_peft`.
        rank: at least k. Zeros fill up what is more, for servers that take only certain ranks.
        base_model: the folder or the hub name of the model, for the config.

    Returns:
        The bytes of the tensors written.

    Raises:
        ValueError: new tokens, which no LoRA can add; a rank below the number of rows; a matrix
            that is not the `weight` of an Embedding or a Linear, or that has a LoRA already.
        RuntimeError: parameters that belong to no model.
        FileExistsError, OSError: as for `save_peft`.
    """
    path = path_of(directory, order := "save_as_lora(params, directory)")
    check_type(params, order)
    with prefix_errors("these parameters cannot be saved as a LoRA"):
        width = _rank(params, rank)
        layers = list(_layers(params))
        tensors = {key: one for layer in layers for key, one in _factors(layer, width)}
    config = {
        "peft_type": "LORA",
        "r": width,
        "lora_alpha": width,  # so that the product is scaled by 1
        "target_modules": sorted({layer.name for layer in layers}),
        "base_model_name_or_path": None if base_model is None else os.fspath(base_model),
        **{"bias": "none", "lora_dropout": 0.0, "fan_in_fan_out": False},
        **{"inference_mode": True, "task_type": None},
    }
    write_adapter(path, serialized(tensors, {"format": "pt"}), config)
    return sum(one.nbytes for one in tensors.values())


def _rank(params: TokenDeltas, rank: int | None) -> int:
    least = max((len(spec.indices) for spec in params.specs.values()), default=0)
    if least == 0:
        raise ValueError(f"there are no rows in {params}")
    if rank is not None and (isinstance(rank, bool) or not isinstance(rank, int) or rank < least):
        raise ValueError(f"rank must be an int of at least {least}, the number of rows, got {rank}")
    return least if rank is None else rank


def _layers(params: TokenDeltas) -> Iterator[_Layer]:
    for key, spec in params.specs.items():
        model = spec.matrix.model() if spec.matrix is not None else None
        if spec.matrix is None or model is None:
            raise RuntimeError(f"the rows of {key!r} belong to no model: load them onto one")
        if spec.grown:
            raise ValueError(
                f"{key!r} has {spec.grown} new tokens, and a LoRA adds to rows that are there. "
                "Merge them: merge_checkpoint writes a model with the longer vocabulary"
            )
        delta = cpu_copy(params.deltas[key], f"the deltas of {key!r}")
        check_rows(delta, len(spec.indices), spec.shape[1], f"the deltas of {key!r}")
        for name in spec.matrix.names:
            module, _, attribute = name.rpartition(".")
            owner = model.get_submodule(module)
            if attribute != "weight" or not isinstance(owner, (nn.Embedding, nn.Linear)):
                raise ValueError(
                    f"{name!r} belongs to a {type(owner).__name__}, and PEFT's LoRA is for the "
                    "weight of an Embedding or a Linear"
                )
            module = module.removeprefix(PEFT_PREFIX)
            if not module or module.endswith(".base_layer"):
                raise ValueError(
                    f"{name!r} is the matrix of {'the model itself' if not module else 'a LoRA'}, "
                    "which a LoRA cannot be for: it names modules of a plain model"
                )
            yield _Layer(module, isinstance(owner, nn.Embedding), spec, delta)


def _factors(layer: _Layer, rank: int) -> Iterator[tuple[str, Any]]:
    """The two factors, under PEFT's names: `(V, rank)` picks the tokens, the other has the rows."""
    spec, matrix = layer.spec, layer.spec.matrix.tensor  # type: ignore[union-attr]
    cpu = torch.device("cpu")
    ids = spec.indices.ids_on(cpu)
    which = torch.zeros(spec.shape[0], rank, device=cpu)
    change = torch.zeros(rank, spec.shape[1], device=cpu)
    which[ids, torch.arange(len(ids), device=cpu)] = 1
    # To read the rows of a sharded matrix takes all ranks, and one of them writes.
    held = spec.originals if is_sharded(matrix) else rows_at(matrix, ids.to(matrix.device))
    now = cpu_copy(held, f"the rows of {layer.name!r}")
    change[: len(ids)] = (layer.delta.double() - now.double()).float()
    start = f"{PEFT_PREFIX}{layer.name}"
    if layer.looks_up:
        yield f"{start}.lora_embedding_A", which.T.contiguous()
        yield f"{start}.lora_embedding_B", change.T.contiguous()
    else:
        yield f"{start}.lora_A.weight", change
        yield f"{start}.lora_B.weight", which
