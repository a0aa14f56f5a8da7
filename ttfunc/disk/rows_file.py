"""Token rows in one safetensors file: `deltas/…`, `token_indices/…` and `originals/…`.

The metadata have the names and the shape of each matrix, as JSON under one key. They also have what
the model said of the matrix (its `Origin`), which a reader may leave out.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import fields
from pathlib import Path
from reprlib import repr as shown
from typing import Any

import torch
from safetensors.torch import save as serialized
from torch import Tensor

from ttfunc.disk.atomic import writable, write_file
from ttfunc.disk.header import FLOATS, parse_json
from ttfunc.disk.tensors import (
    check_rows,
    cpu_copy,
    opened,
    path_of,
    prefix_errors,
    tensor_of,
)
from ttfunc.model.origin import Origin, Sample
from ttfunc.rows.deltas import RowSpec, TokenDeltas, check_type
from ttfunc.rows.given import token_indices
from ttfunc.rows.renaming import name_in

KEY = "ttfunc"  # of the metadata
FILE = "model.safetensors"  # in the folder of a checkpoint that a trainer wrote
FORMAT = 2
PARTS = ("deltas", "token_indices", "originals")


def save(
    params: TokenDeltas,
    path: str | os.PathLike[str],
    *,
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Write the rows to one `.safetensors` file, from which `load` gives back the same bits.

    The file appears whole or not at all: a file that was at `path` is replaced at the very end, and
    stays if anything fails. The new file keeps its permissions, and a symlink to it stays one.

    Args:
        params: with `(k, D)` deltas of any float dtype, on any device. They are not changed.
        path: of the file, in a folder that exists.
        metadata: strings of your own. `safetensors.safe_open(path, "pt").metadata()` returns them,
            together with ttfunc's own under `"ttfunc"`.

    Raises:
        ValueError: deltas of another shape (also stacked ones), of a float dtype that safetensors
            does not have, or without values (`meta`, or traced by a transform); one name for two
            matrices; metadata with the key `"ttfunc"`.
        TypeError: `params` is not a TokenDeltas; metadata that are not strings.
        OSError: the folder cannot be written, or the disk is full.
    """
    tensors: dict[str, Tensor] = {}
    described = []
    path = writable(path_of(path, order := "save(params, path)"))
    check_type(params, order)
    with prefix_errors(f"{str(path)!r} cannot be written"):
        for name, spec in params.specs.items():
            ids = spec.indices.ids_on(torch.device("cpu"))
            values = (params.deltas[name], ids, spec.originals)
            for part, tensor in zip(PARTS, values, strict=True):
                if part != "token_indices":
                    check_rows(tensor, len(spec.indices), spec.shape[1], f"the {part} of {name!r}")
                tensors[f"{part}/{spec.names[0]}"] = cpu_copy(tensor, f"the {part} of {name!r}")
            entry = {"names": list(spec.names), "shape": list(spec.shape)}
            described.append({**entry, "grown": spec.grown} if spec.grown else entry)
        # An earlier ttfunc can read a file without new tokens.
        version = FORMAT if any("grown" in entry for entry in described) else 1
        origins = [_origin_as_json(spec.origin) for spec in params.specs.values()]
        text = json.dumps({"format": version, "matrices": described, "origins": origins})
        _matrices_in(text)  # which refuses what `read` would refuse
    all_metadata = {**_strings(metadata), KEY: text}
    write_file(Path(os.path.realpath(path)), serialized(tensors, all_metadata))


def is_of_rows(path: Path) -> bool:
    """Whether `save` wrote what is at a path."""
    with contextlib.suppress(OSError, ValueError), opened(path) as file:
        return KEY in (file.metadata() or {})
    return False


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
        text = (file.metadata() or {}).get(KEY)
        if is_of_module(file):
            raise ValueError(
                "a trainer saved it, and it does not say what the rows were before: give what "
                "load(path, model) returns"
            )
        if text is None:
            raise ValueError("it has no metadata of ttfunc. For a PEFT adapter use load_peft")
        matrices = _matrices_in(text)
        origins = _origins(json.loads(text).get("origins"), len(matrices))
        expected = {f"{part}/{names[0]}" for names, *_ in matrices for part in PARTS}
        if wrong := expected ^ set(file.keys()):
            raise ValueError(f"tensors are missing, or unknown: {sorted(wrong)[:4]}")
        for (names, shape, grown), origin in zip(matrices, origins, strict=True):
            delta, ids, originals = (tensor_of(file, f"{part}/{names[0]}") for part in PARTS)
            if ids.dtype != torch.int64:
                raise ValueError(f"the token indices of {names[0]!r} are {ids.dtype}, not int64")
            new = ids[ids >= shape[0]].tolist() if grown else []
            first_new = min(new, default=None)
            indices = token_indices(ids, shape[0], names[0], first_new)
            check_rows(delta, len(indices), shape[1], f"the deltas of {names[0]!r}")
            check_rows(originals, len(indices), shape[1], f"the originals of {names[0]!r}")
            deltas[names[0]] = delta
            specs[names[0]] = spec = RowSpec(names, shape, indices, originals, None, origin)
            if spec.grown != grown:
                raise ValueError(
                    f"{names[0]!r} has {spec.grown} new tokens, but its metadata says {grown}"
                )
    return TokenDeltas(deltas, specs)


def file_of(path: Path) -> Path:
    """The file in the folder that a trainer wrote; any other path stays as it is."""
    return path / FILE if path.is_dir() and (path / FILE).is_file() else path


def is_of_module(file: Any) -> bool:
    """Whether an open file has the state dict of a TokenModule."""
    keys = [*file.keys()]
    if KEY in (file.metadata() or {}) or any(one.startswith("originals/") for one in keys):
        return False
    return any(name_in(one, "deltas") is not None for one in keys)


def _matrices_in(text: str) -> list[tuple[tuple[str, ...], tuple[int, int], int]]:
    """The names, the shape and the number of new tokens of each matrix, from ttfunc's own JSON."""
    described = parse_json(text.encode())
    version = described.get("format") if isinstance(described, dict) else None
    if type(version) is not int or version < 1:
        raise ValueError(f"its metadata have no format version: {shown(text)}")
    if version > FORMAT:
        raise ValueError(f"it has format {version}, and this ttfunc knows {FORMAT}. Upgrade ttfunc")
    entries = described.get("matrices")
    if not isinstance(entries, list) or not all(map(_is_matrix, entries)) or not entries:
        raise ValueError(f"its metadata must give names and a shape for each matrix: {shown(text)}")
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
    if not _are_strings(names) or not names or not all(names):
        return False
    is_pair = isinstance(shape, list) and len(shape) == 2
    return is_pair and all(type(size) is int and size > 0 for size in shape)


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


def _origin_as_json(origin: Origin) -> dict[str, Any]:
    """What a model said of a matrix, without the fields that have their defaults."""
    values = {field.name: getattr(origin, field.name) for field in fields(Origin)}
    values = {name: value for name, value in values.items() if value != getattr(Origin(), name)}
    if (sample := values.pop("sample", None)) is not None:
        numbers = sample.numbers.cpu().double()
        (dtype,) = (name for name, one in FLOATS.items() if one == sample.numbers.dtype)
        if numbers.isfinite().all():
            rows = list(sample.rows)
            values["sample"] = {"rows": rows, "numbers": numbers.tolist(), "dtype": dtype}
    return values


def _origins(entries: object, count: int) -> list[Origin]:
    """What the model said of each matrix. Raises ValueError for what no version writes."""
    if entries is None:  # a file of an earlier version
        return [Origin()] * count
    if not isinstance(entries, list) or len(entries) != count or not all(map(_is_origin, entries)):
        raise ValueError(f"its metadata say of the model what no version does: {shown(entries)}")
    return [
        Origin(**{n: restored(entry[n]) for n, (_, restored) in _ORIGIN.items() if n in entry})
        for entry in entries
    ]


def _sample(entry: dict[str, Any]) -> Sample:
    numbers = torch.tensor(entry["numbers"], dtype=torch.float64, device="cpu")
    return Sample(tuple(entry["rows"]), numbers.to(FLOATS[entry["dtype"]]))


def _is_origin(entry: Any) -> bool:
    # A later version may write further keys.
    return isinstance(entry, dict) and all(
        fits(entry[name]) for name, (fits, _) in _ORIGIN.items() if name in entry
    )


def _is_string(found: Any) -> bool:
    return isinstance(found, str)


def _are_strings(found: Any) -> bool:
    return isinstance(found, list) and all(isinstance(one, str) for one in found)


def _are_sizes(found: Any) -> bool:
    return isinstance(found, dict) and all(type(one) is int and one >= 0 for one in found.values())


def _are_renamed(found: Any) -> bool:
    return isinstance(found, dict) and _are_strings(list(found.values()))


def _is_sample(found: Any) -> bool:
    if not isinstance(found, dict) or found.get("dtype") not in FLOATS:
        return False
    rows, numbers = found.get("rows"), found.get("numbers")
    if not isinstance(rows, list) or not isinstance(numbers, list) or len(rows) != len(numbers):
        return False
    whole = all(type(row) is int and 0 <= row < 2**63 for row in rows)
    return whole and all(type(one) is float for one in numbers)


# For each field of an Origin: whether a value in a file is valid, and what it becomes.
_ORIGIN: dict[str, tuple[Callable[[Any], bool], Callable[[Any], Any]]] = {
    **dict.fromkeys(["model", "kind"], (_is_string, str)),
    **dict.fromkeys(["shared", "biases", "apart", "beside"], (_are_strings, tuple)),
    **{"sizes": (_are_sizes, dict), "saved_as": (_are_renamed, dict)},
    "sample": (_is_sample, _sample),
}
