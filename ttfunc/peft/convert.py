"""Writing what ttfunc trained as a PEFT adapter, and reading what PEFT trained."""

from __future__ import annotations

import contextlib
import json
import os
import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save as serialized
from torch import Tensor, nn

from ttfunc.deltas import RowSpec, TokenDeltas, check_type
from ttfunc.disk.tensors import (
    check_rows,
    cpu_copy,
    differing,
    opened,
    path_of,
    prefix_errors,
    rows_device,
    tensor_of,
)
from ttfunc.indices import check_dtype, shortened, token_indices
from ttfunc.model.given import check_model, refuse_token_module
from ttfunc.model.owners import shape_of
from ttfunc.model.shards import rows_at, whole_of
from ttfunc.names import innermost, matrix_named
from ttfunc.peft.adapter import (
    DELTA,
    INDICES,
    NO_LAYERS,
    PREFIX,
    SUFFIX,
    WEIGHTS,
    AdapterRows,
    read_adapter,
    read_json,
    warn_of_other_keys,
)
from ttfunc.peft.lora import lora_beside
from ttfunc.peft.rules import bare, check_ends, check_targets, check_ties
from ttfunc.peft.writer import write_adapter
from ttfunc.torch_private import outside_of_modes


def save_peft(
    params: TokenDeltas,
    directory: str | os.PathLike[str],
    *,
    base_model: str | os.PathLike[str] | nn.Module | None = None,
    adapter: nn.Module | None = None,
) -> None:
    """Write the directory that `peft.PeftModel.from_pretrained` loads, and `load_peft` too.

    Matrices with the same token indices become a TRAINABLE_TOKENS adapter; others a LORA adapter
    without layers, which has indices for each module. With `adapter` the rows go into that LoRA's
    adapter, as one that PEFT loads. The rows are `(k, D)` float32 in the order of the indices.
    `params` are not changed.

    Args:
        params: with deltas whose numbers are exact in float32.
        directory: is made if needed. An adapter there that has only token rows is replaced, and
            other files stay.
        base_model: the folder or hub name of the model, or the model itself. For PEFT's
            AutoPeftModel… it must be a local folder or the model, because these tell the class.
        adapter: a PeftModel over the same model, of whose one active LoRA PEFT's own
            `save_pretrained` gives the rest.

    Raises:
        TypeError: `adapter` is not a PeftModel.
        ValueError: deltas of another shape, without values, or not exact in float32; a matrix that
            is not the `weight` of a module, which PEFT cannot train; one name for two matrices;
            a `base_model` given as a module whose ties differ from its config, which PEFT reads;
            two names with different indices, where one name is the end of the other; an adapter
            that is no LoRA, is not the only one that is active, is for another model, or trains a
            matrix that has rows.
        FileExistsError: the directory has another adapter, or is a file.
        OSError: it cannot be written, or the disk is full. No partial adapter is left.
    """
    directory = path_of(directory, "save_peft(params, directory)")
    tensors: dict[str, Tensor] = {}
    targets: dict[str, list[int]] = {}
    check_type(params)
    refuse_token_module(base_model, "base_model=module.base")
    refuse_token_module(adapter, "adapter=module.base")
    with prefix_errors("these parameters cannot be saved for PEFT"):
        for name, spec in params.specs.items():
            rows = _float32(params.deltas[name], spec, name)
            modules = [_module_of(alias) for alias in spec.names]
            if tensors.keys() & modules:
                raise ValueError(f"a name belongs to two matrices in {params}")
            tensors.update({module: rows.clone() for module in modules})
            targets[modules[0]] = list(spec.indices.ids)
        if not targets:
            raise ValueError(f"there are no rows in {params}")

    first, *others = targets.values()
    same = adapter is None and all(ids == first for ids in others)
    kind = "TRAINABLE_TOKENS" if same else "LORA"
    lora: dict[str, Tensor] = {}
    if adapter is None:
        config = {"peft_type": kind, **_targets_in_config(kind, targets), **_base(base_model)}
    else:
        lora, config = lora_beside(params, tensors, adapter)
        check_ties(params, innermost(adapter))
        config |= {INDICES[kind]: targets, **({} if base_model is None else _base(base_model))}
    if kind == "LORA":  # a LORA adapter keeps the rows of tied modules once
        tensors = {module: tensors[module] for module in targets}
        check_ends(targets)
    if isinstance(base_model, nn.Module):
        check_ties(params, base_model)
    keyed = {f"{PREFIX}{module}{SUFFIX[kind]}": rows for module, rows in tensors.items()}
    text = json.dumps(config, indent=2, sort_keys=True)
    write_adapter(directory, serialized({**lora, **keyed}, {"format": "pt"}), text.encode())


def _module_of(name: str) -> str:
    module, _, attribute = name.removeprefix(PREFIX).rpartition(".")
    if "modules_to_save" in module or module.endswith(".original_module"):
        raise ValueError(
            f"{name!r} is of a module that PEFT trains whole (modules_to_save). Leave it out"
        )
    if module.endswith(".base_layer"):
        raise ValueError(
            f"{name!r} is the matrix of a module that has a LoRA too, and PEFT trains a module by "
            "a LoRA or by rows. Leave it out of the LoRA's config"
        )
    if attribute != "weight" or not module:
        raise ValueError(
            f"PEFT trains the weight of a named module, and not {name!r}. Use ttfunc.save"
        )
    return module


def _float32(delta: Tensor, spec: RowSpec, name: str) -> Tensor:
    what = f"the deltas of {name!r}"
    check_rows(delta, len(spec.indices), spec.shape[1], what)
    rows = cpu_copy(delta, what)
    if rows.dtype == torch.float64 and differing(rows, rows.float().double()):
        raise ValueError(
            f"{what} are float64, with more digits than the float32 of PEFT. Round them first: "
            "optree.tree_map(lambda rows: rows.float(), params)"
        )
    return rows.float()


def _targets_in_config(kind: str, targets: dict[str, list[int]]) -> dict[str, Any]:
    if kind == "LORA":
        return {INDICES[kind]: targets, "target_modules": NO_LAYERS}
    # A pattern, because PEFT takes entries of a list as ends of names, and warns if they are tied.
    pattern = "|".join(map(re.escape, targets))
    ids = next(iter(targets.values()))
    return {INDICES[kind]: ids, "target_modules": pattern, "init_weights": True}


def _base(base_model: str | os.PathLike[str] | nn.Module | None) -> dict[str, Any]:
    """Which model the adapter is for, and the class that AutoPeftModel… builds it with."""
    name, kind, library = None, None, "transformers"
    if isinstance(base_model, nn.Module):
        name = getattr(base_model, "name_or_path", None) or None
        kind, library = type(base_model).__name__, type(base_model).__module__
    elif base_model is not None:
        name = os.fspath(base_model)
        with contextlib.suppress(OSError, ValueError, TypeError, LookupError):
            kind = read_json(Path(name, "config.json"))["architectures"][0]
    return {
        "auto_mapping": kind and {"base_model_class": kind, "parent_library": library},
        "base_model_name_or_path": name,
        **{"inference_mode": True, "revision": None, "task_type": None},
    }


def load_peft(
    directory: str | os.PathLike[str],
    model: nn.Module,
    *,
    dtype: torch.dtype | None = None,
    requires_grad: bool = False,
) -> TokenDeltas:
    """The token rows of a PEFT adapter, put on `model`, which is not changed.

    Takes TRAINABLE_TOKENS adapters, and LORA ones with `trainable_token_indices`; a warning says
    that a LoRA's own weights are not loaded. Ties are found in the model, by identity. The
    originals are the rows that the model has now.

    Args:
        directory: with `adapter_config.json` and `adapter_model.safetensors`.
        model: the model itself, or a PeftModel into which PEFT loads the rest of the adapter.
        dtype: of the deltas; by default that of the file.
        requires_grad: makes the deltas leaves for `torch.optim`; `torch.func` does not need it.

    Returns:
        TokenDeltas on the device of each matrix. For a model on `meta` they are on the CPU, with
        originals on `meta`.

    Raises:
        FileNotFoundError: there is no adapter.
        KeyError: it has rows for a module that the model does not have.
        TypeError: a `dtype` that is not a float; a TokenModule.
        ValueError: a PeftModel that has rows of tokens already; another kind of adapter; a damaged
            one; indices that are no token ids of the model; rows of another width; rows of tied
            modules that disagree; a target without rows or rows without a target; whole weights,
            beside the rows, that differ from the model's.
    """
    directory = path_of(directory, "load_peft(directory, model)")
    order = "load_peft(directory, model)"
    check_model(model, order, "load_peft(directory, module.base)")
    check_dtype(dtype)
    _check_has_none(model, directory)
    adapter = read_adapter(directory)
    deltas: dict[str, Tensor] = {}
    specs: dict[str, RowSpec] = {}
    with prefix_errors(f"{str(directory)!r} does not fit this {type(model).__name__}"):
        for found in adapter.rows:
            name, spec, delta = _placed(found, model, directory)
            if name in specs and (
                specs[name].indices != spec.indices or differing(deltas[name], delta)
            ):
                raise ValueError(
                    f"it has different rows or token indices for {spec.names}, which are tied here"
                )
            deltas[name], specs[name] = delta, spec
        check_targets(adapter.config, innermost(model), bare(specs))
        if innermost(model) is model:  # else PEFT is to load them
            _check_weights(directory / WEIGHTS, adapter.weights, model, specs)
    if innermost(model) is model:
        warn_of_other_keys(adapter.other_keys, directory)
    for name, delta in deltas.items():
        deltas[name] = delta.to(dtype or delta.dtype).requires_grad_(requires_grad)
    return TokenDeltas(deltas, specs)


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


def _placed(found: AdapterRows, model: nn.Module, source: Path) -> tuple[str, RowSpec, Tensor]:
    """The name of the matrix that the rows belong to, its rows as they are, and the new rows."""
    matrix = matrix_named(model, f"{found.module}.weight", source)
    weight, name, shape = matrix.tensor, matrix.names[0], shape_of(matrix.tensor)
    if len(shape) != 2 or shape[1] != found.rows.shape[1]:
        raise ValueError(
            f"its rows for {found.module!r} are {tuple(found.rows.shape)}, and the weight is "
            f"{tuple(shape)}"
        )
    if beyond := [token for token in found.indices if token >= shape[0]]:
        raise ValueError(
            f"token indices {shortened(beyond)} are past the end of {name!r}, which has {shape[0]} "
            "rows. Resize the model first: model.resize_token_embeddings(len(tokenizer)). (A file "
            "of ttfunc.save needs no resizing: load takes new tokens)"
        )
    indices = token_indices(found.indices, shape[0], name)
    with outside_of_modes():
        originals = rows_at(weight, indices.on(weight.device).ids)
        delta = found.rows.to(rows_device(weight))
    return name, RowSpec(matrix.names, matrix.shape, indices, originals, matrix), delta


def _check_weights(
    path: Path, keys: Mapping[str, str], model: nn.Module, specs: Mapping[str, RowSpec]
) -> None:
    """Raises ValueError where PEFT would write base weights that differ from the model's."""
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
