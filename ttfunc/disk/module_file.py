"""What a trainer saved of a TokenModule: the safetensors file of its state dict.

It has the rows and their token ids, under the keys of `module_keys`, and what was trained beside
them. The rest is the model's: the names, the shape and the rows as they were.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from ttfunc.disk.tensors import check_rows, opened, prefix_errors, rows_device, tensor_of
from ttfunc.engines.shards import rows_or_zeros
from ttfunc.model.names import check_names, matrix_named
from ttfunc.rows.deltas import RowSpec, TokenDeltas
from ttfunc.rows.given import token_indices
from ttfunc.rows.renaming import key, name_in

KEY = "ttfunc"  # of the metadata in files of ttfunc's own
FILE = "model.safetensors"  # in the folder of a checkpoint


def file_of(path: Path) -> Path:
    """The file in a folder that a trainer wrote; any other path as it is."""
    return path / FILE if path.is_dir() and (path / FILE).is_file() else path


def is_of_module(file: Any) -> bool:
    """Whether the tensors of an open file are those of a TokenModule's state dict."""
    keys = [*file.keys()]
    if KEY in (file.metadata() or {}) or any(one.startswith("originals/") for one in keys):
        return False
    return any(name_in(one, "deltas") is not None for one in keys)


def of_trainer(path: Path, model: nn.Module, names: Mapping[str, str] | None) -> TokenDeltas | None:
    """The rows in such a file, on `model`, with originals of the model as it is.

    None for another file. Raises as `load`; warns of tensors that are not rows.
    """
    deltas, specs = {}, {}
    with opened(path) as file, prefix_errors(f"{str(path)!r} does not fit {type(model).__name__}"):
        if not is_of_module(file):
            return None
        if names is not None:
            check_names(names)
        keys = set(file.keys())
        given = [name for one in sorted(keys) if (name := name_in(one, "deltas")) is not None]
        if wrong := (names or {}).keys() - set(given):
            raise ValueError(f"names has {sorted(wrong)}, and the rows are for {given}")
        for name in given:
            found = _rows(file, keys, name, (names or {}).get(name, name), model, path)
            deltas[found[0].names[0]], specs[found[0].names[0]] = found[1], found[0]
    if len(specs) < len(given):
        raise ValueError(
            f"{str(path)!r} has rows of {given}, which are one matrix in this "
            f"{type(model).__name__}. Use the model that was trained, which does not tie them."
        )
    if keys:
        warnings.warn(
            f"only the token rows of {str(path)!r} are loaded, and {len(keys)} other tensors are "
            f"not, such as {min(keys)!r}, which were trained beside them (a LoRA?). To load all: "
            "TokenModule(model, params, train_base=True).load_state_dict("
            "safetensors.torch.load_file(path)).",
            stacklevel=3,
        )
    return TokenDeltas(deltas, specs)


def _rows(
    file: Any, keys: set[str], name: str, called: str, model: nn.Module, path: Path
) -> tuple[RowSpec, Tensor]:
    """The rows of a matrix, of which the names are taken out of the keys that are left."""
    pair = [key(part, name) for part in ("deltas", "token_indices")]
    if missing := [one for one in pair if one not in keys]:
        raise ValueError(f"it has {pair[0]!r} and lacks {missing}")
    keys.difference_update(pair)
    delta, ids = (tensor_of(file, one) for one in pair)
    matrix = matrix_named(model, called, path)
    weight, height = matrix.tensor, matrix.shape[0]
    if weight.is_meta:
        raise ValueError("on meta there are no rows as they were. Load onto the real model")
    if ids.is_floating_point() or ids.ndim != 1:
        raise ValueError(f"{pair[1]!r} are {ids.dtype} of shape {tuple(ids.shape)}")
    first_new = min((token for token in ids.tolist() if token >= height), default=None)
    indices = token_indices(ids, height, matrix.names[0], first_new)
    check_rows(delta, len(indices), matrix.shape[1], f"the rows {pair[0]!r}")
    originals = rows_or_zeros(weight, indices.on(weight.device).ids)
    spec = RowSpec(matrix.names, matrix.shape, indices, originals, matrix)
    return spec, delta.to(rows_device(weight))
