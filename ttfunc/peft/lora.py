"""A LoRA and the rows beside it as one adapter, which PEFT loads as one."""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from ttfunc.disk.tensors import opened, tensor_of
from ttfunc.peft.adapter import CONFIG, INDICES, PREFIX, WEIGHTS, read_json
from ttfunc.rows.deltas import TokenDeltas


def lora_beside(
    params: TokenDeltas, modules: Iterable[str], adapter: nn.Module
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors and the config of the LoRA that is to stand beside the rows of these modules.

    Raises:
        TypeError: `adapter` is not a PeftModel.
        ValueError: more than one adapter is active; it is no LoRA, has tokens of its own, is for
            another model, or trains one of the modules too.
    """
    _check_base(params, adapter)
    tensors, config = _saved(adapter)
    _check_apart(tensors, modules)
    return tensors, config


def _saved(adapter: nn.Module) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """What PEFT saves for the one active adapter of a PeftModel."""
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
            # Copies, because the file is gone in a moment.
            tensors = {key: tensor_of(file, key).clone() for key in file.keys()}  # noqa: SIM118
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
    """Raise ValueError where the LoRA also trains a module that has rows."""
    for module in modules:
        if found := [key for key in lora if key.startswith(f"{PREFIX}{module}.")]:
            raise ValueError(
                f"the adapter has {found[0]!r} for {module!r}, which also has rows: PEFT trains a "
                "matrix by a LoRA, as a whole (modules_to_save), or by rows. Leave it out of the "
                "LoRA's config."
            )


def _check_base(params: TokenDeltas, adapter: nn.Module) -> None:
    """Raise ValueError where the rows belong to another model than the LoRA."""
    held = {id(one) for one in adapter.parameters()}
    for name, spec in params.specs.items():
        if spec.matrix is not None and id(spec.matrix.tensor) not in held:
            raise ValueError(
                f"the rows of {name!r} were made from another model than the one in this "
                f"{type(adapter).__name__}. Use init_deltas, or load, on this one."
            )
