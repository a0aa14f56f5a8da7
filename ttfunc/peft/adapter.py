"""Reading the directory of a PEFT adapter with token rows, without a model and without PEFT.

Of the config are read: `peft_type`, `token_indices` or `trainable_token_indices`, and
`target_modules`. What else is in it says nothing of the token rows.
"""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from reprlib import repr as shown
from typing import Any, NamedTuple

from torch import Tensor

from ttfunc.disk.atomic import open_file
from ttfunc.disk.header import LONGEST
from ttfunc.disk.rows_file import FILE
from ttfunc.disk.tensors import check_rows, opened, prefix_errors, tensor_of
from ttfunc.model.names import PEFT_PREFIX
from ttfunc.rows.given import token_indices

CONFIG, WEIGHTS, PICKLE = "adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"
DELTA, WRAPPER = ".trainable_tokens_delta", ".token_adapter"
# For each kind of adapter, what comes after the name of a module, and where its indices are.
SUFFIX = {"TRAINABLE_TOKENS": DELTA, "LORA": WRAPPER + DELTA}
INDICES = {"TRAINABLE_TOKENS": "token_indices", "LORA": "trainable_token_indices"}
NO_LAYERS = "dummy-target-modules"  # PEFT's own word for a LoRA that has none


class AdapterRows(NamedTuple):
    """The `(k, D)` rows that an adapter has for a module, and their token ids in that order."""

    module: str
    indices: tuple[int, ...]
    rows: Tensor


class Adapter(NamedTuple):
    """A whole adapter: its config, its rows, the names of whole weights, and all other keys."""

    config: dict[str, Any]
    rows: list[AdapterRows]
    weights: dict[str, str]  # from their names in the model to their keys in the file
    other_keys: list[str]


def read_adapter(directory: Path) -> Adapter:
    """The adapter in a directory, without the values of whole weights."""
    if (directory / FILE).exists() and not (directory / CONFIG).exists():
        raise FileNotFoundError(
            f"there is no {CONFIG} in {str(directory)!r}. If a trainer saved a TokenModule there, "
            "ttfunc.load(directory, model) takes its rows."
        )
    config = read_json(directory / CONFIG)
    kind = config.get("peft_type")
    if not isinstance(kind, str) or kind not in SUFFIX:
        raise ValueError(
            f"{str(directory)!r} is an adapter of type {shown(kind)}, and only {list(SUFFIX)} have "
            "token rows. Load it with PEFT."
        )
    if config.get(INDICES[kind]) is None:
        raise ValueError(
            f"{str(directory)!r} has no token rows: {INDICES[kind]!r} is missing in its {CONFIG}. "
            "Load it with PEFT."
        )
    path = directory / WEIGHTS
    if (directory / PICKLE).exists() and not path.exists():
        raise ValueError(
            f"{str(directory / PICKLE)!r} is a pickle, which may run any code as it is loaded. If "
            "you trust it, load it with PEFT and save it again with save_pretrained."
        )
    adapter = Adapter(config, [], {}, [])
    with opened(path) as file, prefix_errors(f"{str(path)!r} cannot be loaded"):
        for key in file.keys():  # noqa: SIM118 (it is no mapping)
            _classify(file, key, adapter)
        if not adapter.rows:
            raise ValueError(f"it has no tensor {PEFT_PREFIX}<module>{SUFFIX[kind]}")
    if read_json(directory / CONFIG) != config:
        raise ValueError(f"{str(directory)!r} was written to while it was read. Load it again.")
    return adapter


def _classify(file: Any, key: str, adapter: Adapter) -> None:
    """Add a tensor of the file to what the adapter has."""
    name, kind = key.removeprefix(PEFT_PREFIX), adapter.config["peft_type"]
    if name == key or name.startswith(PEFT_PREFIX):
        raise ValueError(
            f"its key {key!r} does not begin with one {PEFT_PREFIX!r}: PEFT would load such an "
            "adapter as if untrained. Rename the keys"
        )
    if name.endswith(DELTA):
        module = name.removesuffix(SUFFIX[kind])
        if module == name or module.endswith(WRAPPER):
            raise ValueError(f"{key!r} is not what a {kind} adapter has: <module>{SUFFIX[kind]}")
        adapter.rows.append(_rows_of(file, key, module, adapter.config))
    elif name.endswith((".weight", ".bias")) and ".lora_" not in name:
        # A whole weight of the model, which PEFT saves when the vocabulary was resized.
        module, _, attribute = name.rpartition(".")
        module = module.removesuffix(".base_layer").removesuffix(WRAPPER)
        adapter.weights[f"{module}.{attribute}"] = key
    elif kind == "LORA":
        adapter.other_keys.append(key)
    else:
        raise ValueError(f"its key {key!r} belongs to no {kind} adapter")


def _rows_of(file: Any, key: str, module: str, config: dict[str, Any]) -> AdapterRows:
    given = config[INDICES[config["peft_type"]]]
    if isinstance(given, dict):  # PEFT's keys are the ends of names, whether at a dot or not
        matching = [ids for end, ids in given.items() if module.endswith(end)]
        if not matching or any(ids != matching[0] for ids in matching):
            raise ValueError(f"its config has {len(matching)} lists of indices for {module!r}")
        given = matching[0]
    if not isinstance(given, list):
        raise ValueError(f"the token indices of {module!r} are {shown(given)}, not a list")
    ids = token_indices(given, 2**63, module).ids
    rows = tensor_of(file, key)
    check_rows(rows, len(ids), rows.shape[-1] if rows.ndim else 0, f"the rows of {module!r}")
    return AdapterRows(module, ids, rows)


def warn_of_other_keys(keys: list[str], directory: Path) -> None:
    """Warn of what is not loaded. Only for a function that the user calls directly."""
    if keys:
        warnings.warn(
            f"only the token rows of {str(directory)!r} are loaded, and {len(keys)} other tensors "
            f"are not, such as {keys[0]!r}. Merge those into the model with PEFT.",
            stacklevel=3,
        )


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object. Raises FileNotFoundError, or ValueError for anything else."""
    if not path.exists():
        raise FileNotFoundError(f"there is no file {str(path)!r}.")
    with prefix_errors(f"{str(path)!r} cannot be read"):
        if not path.is_file() or path.stat().st_size > LONGEST:
            raise ValueError("it is no file of JSON")
        try:
            with open_file(path) as file:
                found = json.loads(file.read())
        except RecursionError:
            raise ValueError("it is nested too deeply") from None
        if not isinstance(found, dict):
            raise ValueError(f"it is a {type(found).__name__}, not an object")
    return found
