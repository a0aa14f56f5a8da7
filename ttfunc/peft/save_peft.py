"""Writing what ttfunc trained as a PEFT adapter."""

from __future__ import annotations

import contextlib
import os
import re
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save as serialized
from torch import Tensor, nn

from ttfunc.disk.tensors import (
    check_rows,
    cpu_copy,
    differing,
    opened,
    path_of,
    prefix_errors,
    tensor_of,
)
from ttfunc.model.given import refuse_token_module
from ttfunc.model.names import PEFT_PREFIX, innermost
from ttfunc.peft.adapter import (
    CONFIG,
    INDICES,
    NO_LAYERS,
    SUFFIX,
    WEIGHTS,
    read_json,
)
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
    check_type(params, order)
    refuse_token_module(base_model, "base_model=module.base")
    refuse_token_module(adapter, "adapter=module.base")
    with prefix_errors("these parameters cannot be saved for PEFT"):
        tensors, targets = _by_module(params)
    first, *others = targets.values()
    same = adapter is None and all(ids == first for ids in others)
    kind = "TRAINABLE_TOKENS" if same else "LORA"
    lora: dict[str, Tensor] = {}
    if adapter is None:
        config = {"peft_type": kind, **_targets_in_config(kind, targets), **_base(base_model)}
    else:
        lora, config = _lora_beside(params, tensors, adapter)
        check_ties(params, innermost(adapter))
        config |= {INDICES[kind]: targets, **({} if base_model is None else _base(base_model))}
    if kind == "LORA":  # a LORA adapter keeps the rows of tied modules once
        tensors = {module: tensors[module] for module in targets}
        check_ends(targets)
    if isinstance(base_model, nn.Module):
        check_ties(params, base_model)
    keyed = {f"{PEFT_PREFIX}{module}{SUFFIX[kind]}": rows for module, rows in tensors.items()}
    write_adapter(directory, serialized({**lora, **keyed}, {"format": "pt"}), config)


def _by_module(params: TokenDeltas) -> tuple[dict[str, Tensor], dict[str, list[int]]]:
    """The rows of each module, tied ones too; and the ids, by the first of the tied modules."""
    tensors: dict[str, Tensor] = {}
    targets: dict[str, list[int]] = {}
    for name, spec in params.specs.items():
        rows = _float32(params.deltas[name], spec, name)
        modules = [_module_of(alias) for alias in spec.names]
        if tensors.keys() & modules:
            raise ValueError(f"a name belongs to two matrices in {params}")
        tensors.update({module: rows.clone() for module in modules})
        targets[modules[0]] = list(spec.indices.ids)
    if not targets:
        raise ValueError(f"there are no rows in {params}")
    return tensors, targets


def _module_of(name: str) -> str:
    module, _, attribute = name.removeprefix(PEFT_PREFIX).rpartition(".")
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


def _lora_beside(
    params: TokenDeltas, modules: Iterable[str], adapter: nn.Module
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors and the config of the LoRA that is to stand beside the rows of these modules.

    Raises:
        TypeError: `adapter` is not a PeftModel.
        ValueError: more than one adapter is active; it is no LoRA, has tokens of its own, is for
            another model, or trains one of the modules too.
    """
    _check_base(params, adapter)
    save = getattr(adapter, "save_pretrained", None)
    if not hasattr(adapter, "peft_config") or not callable(save):
        raise TypeError(
            f"adapter must be a peft.PeftModel with a LoRA, got {type(adapter).__name__}."
        )
    active: Any = adapter.active_adapters
    if len(active) != 1:
        raise ValueError(
            f"the adapters {list(active)} are active, and one directory is one adapter. Choose one "
            "with adapter.set_adapter(name)."
        )
    with tempfile.TemporaryDirectory(prefix="ttfunc-") as scratch:
        save(scratch, selected_adapters=list(active), save_embedding_layers=False)
        folder = Path(scratch) if active[0] == "default" else Path(scratch, active[0])
        config = read_json(folder / CONFIG)
        _check_kind(config)
        with opened(folder / WEIGHTS) as file:
            tensors = {key: tensor_of(file, key) for key in file.keys()}  # noqa: SIM118
    _check_apart(tensors, modules)
    return tensors, config


def _check_kind(config: Mapping[str, Any]) -> None:
    if config["peft_type"] != "LORA":
        raise ValueError(
            f"the adapter is a {config['peft_type']}, and only a LORA holds token rows beside it. "
            "Save the two apart: adapter.save_pretrained and ttfunc.save."
        )
    if config.get(INDICES["LORA"]) is not None:
        raise ValueError(
            f"the LoRA has token rows of its own, {INDICES['LORA']}={config[INDICES['LORA']]}. "
            "Make it without them: the rows are in params."
        )


def _check_apart(lora: Iterable[str], modules: Iterable[str]) -> None:
    """Raise ValueError if the LoRA also trains a module that has rows."""
    for module in modules:
        if found := [key for key in lora if key.startswith(f"{PEFT_PREFIX}{module}.")]:
            raise ValueError(
                f"the adapter has {found[0]!r} for {module!r}, which also has rows: PEFT trains a "
                "matrix by a LoRA, as a whole (modules_to_save), or by rows. Leave it out of the "
                "LoRA's config."
            )


def _check_base(params: TokenDeltas, adapter: nn.Module) -> None:
    """Raise ValueError if the rows belong to another model than the LoRA."""
    held = {id(one) for one in adapter.parameters()}
    for name, spec in params.specs.items():
        if spec.matrix is not None and id(spec.matrix.tensor) not in held:
            raise ValueError(
                f"the rows of {name!r} were made from another model than the one in this "
                f"{type(adapter).__name__}. Use init_deltas, or load, on this one."
            )
