"""The trained rows in one safetensors file: `deltas/…`, `token_indices/…` and `originals/…`.

The names and the shape of each matrix are in the metadata, as JSON under one key; so is what
the model said of it, which a reader may leave out.
"""

from __future__ import annotations

import json
import os
import warnings
from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from reprlib import repr as shown
from typing import Any

import torch
from safetensors.torch import save as serialized
from torch import Tensor, nn

from ttfunc.deltas import RowSpec, TokenDeltas, check_type
from ttfunc.disk.atomic import writable, write_file
from ttfunc.disk.header import parse_json
from ttfunc.disk.origins import as_json, from_json
from ttfunc.disk.tensors import (
    check_model,
    check_rows,
    cpu_copy,
    opened,
    other_base,
    path_of,
    prefix_errors,
    rows_device,
    tensor_of,
)
from ttfunc.indices import token_indices
from ttfunc.init import check_ends
from ttfunc.model.matrix import Matrix
from ttfunc.model.origin import origin_of
from ttfunc.model.shards import rows_at
from ttfunc.names import advice, matrix_named, names_of, renamed
from ttfunc.torch_private import outside_of_modes

FORMAT = 2
KEY = "ttfunc"
PARTS = ("deltas", "token_indices", "originals")


def save(
    params: TokenDeltas,
    path: str | os.PathLike[str],
    *,
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Write `params` to one `.safetensors` file; `load` and `read` give back the same bits.

    The file appears whole or not at all: a file that was at `path` is replaced at the very end, and
    is kept if anything fails. Its permissions stay, and so does a symlink to it. `params` are not
    changed.

    Args:
        params: with `(k, D)` deltas of any float dtype, on any device.
        path: of the file; its folder exists.
        metadata: strings of your own. `safetensors.safe_open(path, "pt").metadata()` returns them,
            together with ttfunc's own under `"ttfunc"`.

    Raises:
        ValueError: deltas of another shape (also stacked ones), of a dtype that is no float of
            safetensors, or without values (`meta`, or traced by a transform); one name for two
            matrices.
        TypeError, ValueError: `params` is not a TokenDeltas; metadata that are not strings, or that
            use the key `"ttfunc"`.
        OSError: the folder cannot be written, or the disk is full.
    """
    tensors: dict[str, Tensor] = {}
    described = []
    path = writable(path_of(path, "save(params, path)"))
    check_type(params)
    with prefix_errors(f"{str(path)!r} cannot be written"):
        for name, spec in params.specs.items():
            ids = spec.indices.on(torch.device("cpu")).ids
            values = (params.deltas[name], ids, spec.originals)
            for part, tensor in zip(PARTS, values, strict=True):
                if part != "token_indices":
                    check_rows(tensor, len(spec.indices), spec.shape[1], f"the {part} of {name!r}")
                tensors[f"{part}/{spec.names[0]}"] = cpu_copy(tensor, f"the {part} of {name!r}")
            entry = {"names": list(spec.names), "shape": list(spec.shape)}
            described.append({**entry, "grown": spec.grown} if spec.grown else entry)
        # Rows of tokens that the matrix had are what the first version was made for.
        version = FORMAT if any("grown" in entry for entry in described) else 1
        origins = [as_json(spec.origin) for spec in params.specs.values()]
        own = json.dumps({"format": version, "matrices": described, "origins": origins})
        _checked_metadata(own)
    write_file(Path(os.path.realpath(path)), serialized(tensors, {**_strings(metadata), KEY: own}))


def load(
    path: str | os.PathLike[str],
    model: nn.Module,
    *,
    names: Mapping[str, str] | None = None,
    requires_grad: bool = False,
) -> TokenDeltas:
    """The parameters that `save` wrote, put on `model`, which is not changed.

    Args:
        path: of the file.
        model: with the matrices that they were trained on.
        names: a mapping from the name of a matrix in the file to its name in `model`, where the two
            differ (as with a wrapper around the model).
        requires_grad: makes the deltas leaves for `torch.optim`; `torch.func` does not need it.

    Returns:
        TokenDeltas with the deltas and originals of the file, bit for bit and in its dtypes. They
        are on the device of the matrix; for a model on `meta` they are on the CPU, so that they can
        be merged into real weights. Warns where the model's rows are not the originals of the file:
        `unmerge` writes those of the file; and where most others are not those of the model that
        was trained. On a matrix of another height the ids decide: those past
        its end are new tokens, and new tokens that it has by now are replaced ones.

    Raises:
        KeyError: the model has no parameter with a name in the file, or in `names`.
        ValueError: the model has the matrix in another width, without room for the ids, or tied to
            other names than in the file; the rows are new tokens of one end of the model alone; or
            the file cannot be `read`.
        FileNotFoundError: there is no file.
    """
    path = path_of(path, "load(path, model)")
    check_model(model, "load(path, model)")
    params = _called(read(path), model, names, path)
    deltas, specs = {}, {}
    told, grown = [], []
    for name, spec in params.specs.items():
        matrix = _same_matrix(model, spec, path)
        spec = _at_height_of(matrix, spec, path)
        weight, first = matrix.tensor, matrix.names[0]
        with outside_of_modes():
            originals = spec.originals.to(rows_device(weight))
            delta = params.deltas[name].to(rows_device(weight))
            deltas[first] = delta.requires_grad_(requires_grad)
        origin = origin_of(model, matrix, spec.indices.ids).joined(spec.origin)
        specs[first] = loaded = replace(
            spec, names=matrix.names, originals=originals, matrix=matrix, origin=origin
        )
        told.append(other_base(matrix, loaded, spec.origin, path))
        grown += [(matrix, loaded.indices)] * bool(loaded.grown)
    if grown:
        with prefix_errors(f"{str(path)!r} has rows that are new tokens on this model"):
            check_ends(model, grown)
    for message in filter(None, told):
        warnings.warn(message, stacklevel=2)
    return TokenDeltas(deltas, specs)


def read(path: str | os.PathLike[str]) -> TokenDeltas:
    """The parameters that `save` wrote, on the CPU and without a model, as after unpickling.

    They can be merged into a state dict or a checkpoint; `patch` needs what `load` gives.

    Raises:
        FileNotFoundError: there is no file.
        ValueError: it is damaged, of a newer format or not from `save`; the message names the file.
    """
    path = path_of(path, "read(path)")
    deltas, specs = {}, {}
    with opened(path) as file, prefix_errors(f"{str(path)!r} cannot be loaded"):
        own = (file.metadata() or {}).get(KEY)
        if own is None:
            raise ValueError("it has no metadata of ttfunc. For a PEFT adapter use load_peft")
        matrices = _checked_metadata(own)
        origins = from_json(json.loads(own).get("origins"), len(matrices))
        expected = {f"{part}/{names[0]}" for names, *_ in matrices for part in PARTS}
        if wrong := expected ^ set(file.keys()):
            raise ValueError(f"tensors are missing, or unknown: {sorted(wrong)[:4]}")
        for (names, shape, grown), origin in zip(matrices, origins, strict=True):
            delta, ids, originals = (tensor_of(file, f"{part}/{names[0]}") for part in PARTS)
            if ids.dtype != torch.int64:
                raise ValueError(f"the token indices of {names[0]!r} are {ids.dtype}, not int64")
            new = ids[ids >= shape[0]].tolist() if grown else []
            indices = token_indices(ids, shape[0], names[0], min(new, default=None))
            check_rows(delta, len(indices), shape[1], f"the deltas of {names[0]!r}")
            check_rows(originals, len(indices), shape[1], f"the originals of {names[0]!r}")
            deltas[names[0]] = delta
            specs[names[0]] = spec = RowSpec(names, shape, indices, originals, None, origin)
            if spec.grown != grown:
                raise ValueError(f"{names[0]!r} has {spec.grown} new tokens, and {grown} are told")
    return TokenDeltas(deltas, specs)


def _checked_metadata(own: str) -> list[tuple[tuple[str, ...], tuple[int, int], int]]:
    """Names and shape of each matrix, from ttfunc's own JSON."""
    described = parse_json(own.encode())
    version = described.get("format") if isinstance(described, dict) else None
    if type(version) is not int or version < 1:
        raise ValueError(f"its metadata have no format version: {shown(own)}")
    if version > FORMAT:
        raise ValueError(f"it has format {version}, and this ttfunc knows {FORMAT}. Upgrade ttfunc")
    entries = described.get("matrices")
    if not isinstance(entries, list) or not all(map(_is_matrix, entries)) or not entries:
        raise ValueError(f"its metadata must give names and a shape for each matrix: {shown(own)}")
    names = Counter(name for entry in entries for name in entry["names"])
    if twice := [name for name, times in names.items() if times > 1]:
        raise ValueError(f"{twice[:4]} are given twice: a name belongs to one matrix")
    return [(tuple(e["names"]), (e["shape"][0], e["shape"][1]), e.get("grown", 0)) for e in entries]


def _is_matrix(entry: Any) -> bool:
    if not isinstance(entry, dict) or entry.keys() - {"grown"} != {"names", "shape"}:
        return False
    grown = entry.get("grown", 1)
    if type(grown) is not int or grown < 1:
        return False
    names, shape = entry["names"], entry["shape"]
    if not isinstance(names, list) or not isinstance(shape, list):
        return False
    named = len(names) > 0 and all(isinstance(name, str) and name for name in names)
    return named and len(shape) == 2 and all(type(size) is int and size > 0 for size in shape)


def _strings(metadata: Mapping[str, str] | None) -> dict[str, str]:
    if metadata is not None and not isinstance(metadata, Mapping):
        raise TypeError(f"metadata must map strings to strings, got {shown(metadata)}.")
    strings = dict(metadata or {})
    if wrong := [item for item in strings.items() if not all(isinstance(s, str) for s in item)]:
        raise TypeError(
            f"metadata must map strings to strings, got {shown(wrong)}. "
            "Convert other values to strings, for example with json.dumps."
        )
    if KEY in strings:
        raise ValueError(f"the metadata key {KEY!r} is ttfunc's own. Choose another name.")
    return strings


def _called(
    params: TokenDeltas, model: nn.Module, names: Mapping[str, str] | None, path: Path
) -> TokenDeltas:
    """The parameters under the names of `model`."""
    held, known = names_of(model), [name for spec in params.specs.values() for name in spec.names]
    missing = f"this {type(model).__name__} has no such parameter."
    params = renamed(
        params, names, held, f"this {type(model).__name__}", lambda spec, other: missing
    )
    called = [name for spec in params.specs.values() for name in spec.names]
    absent = [name for name in called if name not in held]
    if absent and names is None and (told := advice(known, held)):
        raise KeyError(
            f"{type(model).__name__} has no parameter {absent[0]!r}, for which {str(path)!r} has "
            f"rows.{told} Or use the model that the rows were trained on, without a wrapper."
        )
    return params


def _same_matrix(model: nn.Module, spec: RowSpec, path: Path) -> Matrix:
    """The matrix of `model` that has the names, the shape and the ties of the file."""
    matrix = matrix_named(model, spec.names[0], path)
    shape = matrix.shape
    if shape[1:] != spec.shape[1:]:
        raise ValueError(
            f"{str(path)!r} has rows of a matrix {spec.names[0]!r} of shape {spec.shape}, but in "
            f"this {type(model).__name__} its shape is {shape}. Use the model that was trained."
        )
    if set(matrix.names) != set(spec.names):
        raise ValueError(
            f"{str(path)!r} was trained on a model where exactly {spec.names} were one matrix, but "
            f"in this {type(model).__name__} it is {matrix.names}. Tie the model as it was."
        )
    return matrix


def _at_height_of(matrix: Matrix, spec: RowSpec, path: Path) -> RowSpec:
    """The rows on a matrix that has more rows by now, or fewer: what was new may be there."""
    weight, height = matrix.tensor, matrix.shape[0]
    if height == spec.shape[0]:
        return spec
    with prefix_errors(f"{str(path)!r} was trained on a matrix of {spec.shape[0]} rows"):
        token_indices(spec.indices.ids, height, matrix.names[0], height)
    shape = (height, spec.shape[1])
    there = [i for i, token in enumerate(spec.indices.ids) if spec.shape[0] <= token < shape[0]]
    if not there:
        return replace(spec, shape=shape)
    if weight.is_meta:
        raise ValueError(
            f"{str(path)!r} has new rows for {matrix.names[0]!r} at tokens that this model has by "
            "now, and on meta there are no values to keep of them. Load onto the real model."
        )
    ids = [spec.indices.ids[i] for i in there]
    with outside_of_modes():
        originals = spec.originals.clone()
        found = rows_at(weight, torch.tensor(ids, device=weight.device))
        originals[there] = found.to(originals.device, originals.dtype)
    return replace(spec, shape=shape, originals=originals)
