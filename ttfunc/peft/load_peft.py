"""Reading the token rows that PEFT trained."""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from ttfunc.disk.put_on import on_matrix, put_on
from ttfunc.disk.tensors import (
    differing,
    opened,
    path_of,
    prefix_errors,
    tensor_of,
)
from ttfunc.engines.ownership import shape_of
from ttfunc.engines.shards import whole_of
from ttfunc.model.given import check_model
from ttfunc.model.names import innermost, matrix_named
from ttfunc.peft.adapter import (
    DELTA,
    WEIGHTS,
    AdapterRows,
    read_adapter,
    warn_of_other_keys,
)
from ttfunc.peft.rules import check_targets
from ttfunc.rows.deltas import RowSpec, TokenDeltas
from ttfunc.rows.given import check_dtype, shortened


def load_peft(
    directory: str | os.PathLike[str],
    model: nn.Module,
    *,
    dtype: torch.dtype | None = None,
    requires_grad: bool = False,
) -> TokenDeltas:
    """Read the token rows of a PEFT adapter, and put them on `model`, which is not changed.

    It reads TRAINABLE_TOKENS adapters, and LORA adapters with `trainable_token_indices`; a warning
    says that a LoRA's own weights are not loaded. Ties are found in the model, by identity. The
    originals are the rows that the model has now.

    Args:
        directory: with `adapter_config.json` and `adapter_model.safetensors`.
        model: the model itself, or a PeftModel into which PEFT loads the rest of the adapter.
        dtype: of the deltas. By default that of the file.
        requires_grad: make the deltas leaves for `torch.optim`. `torch.func` does not need it.

    Returns:
        TokenDeltas on the device of each matrix. For a model on `meta` the deltas are on the CPU,
        and the originals on `meta`.

    Raises:
        FileNotFoundError: there is no adapter.
        KeyError: it has rows for a module that the model does not have.
        TypeError: a `dtype` that is not a float; a TokenModule.
        ValueError: a PeftModel that already has rows of tokens; another kind of adapter, or a
            damaged one; ids that are no tokens of the model; rows of another width; different rows
            for tied modules; a target without rows, or rows without a target; whole weights, beside
            the rows, that differ from the model's.

    Warns:
        UserWarning: the adapter has other weights, which are not loaded.
    """
    directory = path_of(directory, order := "load_peft(directory, model)")
    check_model(model, order, "load_peft(directory, module.base)")
    check_dtype(dtype)
    _check_has_none(model, directory)
    adapter = read_adapter(directory)
    deltas: dict[str, Tensor] = {}
    specs: dict[str, RowSpec] = {}
    with prefix_errors(f"{str(directory)!r} does not fit this {type(model).__name__}"):
        for found in adapter.rows:
            spec = _spec_of(found, model, directory)
            name = spec.names[0]
            if name in specs and (
                specs[name].indices != spec.indices or differing(deltas[name], found.rows)
            ):
                raise ValueError(
                    f"it has different rows or token indices for {spec.names}, which are tied here"
                )
            deltas[name], specs[name] = found.rows, spec
        check_targets(adapter.config, innermost(model), specs)
        if innermost(model) is model:  # else PEFT is to load them
            _check_weights(directory / WEIGHTS, adapter.weights, model, specs)
    if innermost(model) is model:
        warn_of_other_keys(adapter.other_keys, directory)
    rows = {name: found.to(dtype or found.dtype) for name, found in deltas.items()}
    return put_on(model, TokenDeltas(rows, specs), directory, requires_grad=requires_grad)


def _check_has_none(model: nn.Module, directory: Path) -> None:
    """Raises ValueError for a PeftModel into which PEFT has loaded rows of tokens."""
    for name, _ in model.named_parameters():
        module, found, _ = name.partition(f"{DELTA}.")
        if found:
            raise ValueError(
                f"this {type(model).__name__} has rows of tokens already, which PEFT trains, in "
                f"{module!r}: PeftModel.from_pretrained loads those of {str(directory)!r} itself. "
                "Call it as it is; or load_peft(directory, model.unload()) on the plain model. For "
                "a LoRA that stays, make a PeftModel of a config without trainable_token_indices."
            )


def _spec_of(found: AdapterRows, model: nn.Module, source: Path) -> RowSpec:
    """What stays fixed about the rows, for the matrix that they belong to."""
    matrix = matrix_named(model, f"{found.module}.weight", source)
    shape = shape_of(matrix.tensor)
    if len(shape) != 2 or shape[1] != found.rows.shape[1]:
        raise ValueError(
            f"its rows for {found.module!r} are {tuple(found.rows.shape)}, and the weight is "
            f"{tuple(shape)}"
        )
    if beyond := [token for token in found.indices if token >= shape[0]]:
        raise ValueError(
            f"token indices {shortened(beyond)} are past the end of {matrix.names[0]!r}, which has "
            f"{shape[0]} rows. Resize the model first: "
            "model.resize_token_embeddings(len(tokenizer)). (A file of ttfunc.save needs no "
            "resizing: load takes new tokens)"
        )
    return on_matrix(matrix, found.indices, found.rows, f"the rows of {found.module!r}")


def _check_weights(
    path: Path, keys: Mapping[str, str], model: nn.Module, specs: Mapping[str, RowSpec]
) -> None:
    """Raises ValueError if PEFT would write base weights that differ from the model's."""
    replaced = {name: list(spec.indices.ids) for spec in specs.values() for name in spec.names}
    for name, key in keys.items():
        held = whole_of(matrix_named(model, name, path).tensor)
        with opened(path) as file:
            saved = tensor_of(file, key)
        if saved.shape != held.shape or not saved.is_floating_point():
            raise ValueError(
                f"it also has {name!r} whole, {tuple(saved.shape)} in {saved.dtype}, but the model "
                f"has {tuple(held.shape)}. Resize the model first, and copy that weight into it"
            )
        if held.is_meta:
            warnings.warn(
                f"{str(path)!r} also has {name!r} whole, which is not loaded. Make sure that the "
                "base has the same values.",
                stacklevel=3,
            )
            continue
        pair = (torch.atleast_2d(t).flatten(1) for t in (saved, held.to(saved.device)))
        if other := sorted(set(differing(*pair)) - set(replaced.get(name, []))):
            raise ValueError(
                f"it also has {name!r} whole, and {len(other)} rows that are not trained, from "
                f"{other[0]} on, differ from those of the model. Copy them into the model first, "
                f"from {key!r} in {str(path)!r}"
            )
