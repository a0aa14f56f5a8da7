"""Writing what ttfunc trained as a PEFT adapter."""

from __future__ import annotations

import contextlib
import os
import re
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save as serialized
from torch import Tensor, nn

from ttfunc.disk.tensors import (
    check_rows,
    cpu_copy,
    differing,
    path_of,
    prefix_errors,
)
from ttfunc.model.given import refuse_token_module
from ttfunc.model.names import innermost
from ttfunc.peft.adapter import (
    INDICES,
    NO_LAYERS,
    PREFIX,
    SUFFIX,
    read_json,
)
from ttfunc.peft.lora import lora_beside
from ttfunc.peft.rules import check_ends, check_ties
from ttfunc.peft.writer import write_adapter
from ttfunc.rows.deltas import RowSpec, TokenDeltas, check_type


def save_peft(
    params: TokenDeltas,
    directory: str | os.PathLike[str],
    *,
    base_model: str | os.PathLike[str] | nn.Module | None = None,
    adapter: nn.Module | None = None,
) -> None:
    """Write an adapter that `peft.PeftModel.from_pretrained` loads, and `load_peft` too.

    Matrices with the same token ids become a TRAINABLE_TOKENS adapter; others become a LORA adapter
    without layers, with ids for each module. With `adapter`, the rows go into the adapter of that
    LoRA. They are `(k, D)` float32, in the order of the ids.

    Args:
        params: with deltas whose values are exact in float32. They are not changed.
        directory: is made if needed. An adapter there that has only token rows is replaced; other
            files stay. A README.md, a card for the hub, is written unless there is another.
        base_model: the folder or the hub name of the model, or the model itself. PEFT's
            AutoPeftModel classes need the model or a local folder, which tell the model's class.
        adapter: a PeftModel over the same model. PEFT's own `save_pretrained` writes its one active
            LoRA, beside the rows.

    Raises:
        TypeError: `adapter` is not a PeftModel.
        ValueError: deltas of another shape, without values, or not exact in float32; a matrix that
            is not the `weight` of a module, which PEFT cannot train; one name for two matrices; two
            names with different ids, one of them the end of the other; a `base_model` whose ties
            differ from its config, which PEFT reads; an `adapter` that is no LoRA, is not the only
            active one, is for another model, or trains a matrix that has rows.
        FileExistsError: the directory has another adapter, or is a file.
        OSError: it cannot be written, or the disk is full. No partial adapter is left.
    """
    directory = path_of(directory, order := "save_peft(params, directory)")
    tensors: dict[str, Tensor] = {}
    targets: dict[str, list[int]] = {}
    check_type(params, order)
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
    write_adapter(directory, serialized({**lora, **keyed}, {"format": "pt"}), config)


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
