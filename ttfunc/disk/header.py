"""The header of a safetensors file: which tensor lies at which bytes. No tensor is read."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from reprlib import repr as shown
from typing import Any, BinaryIO

import torch

from ttfunc.disk.atomic import open_file

# The format's own limit, and far above what any index of shards needs.
LONGEST = 100_000_000

FLOATS = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E4M3FNUZ": torch.float8_e4m3fnuz,
    "F8_E5M2FNUZ": torch.float8_e5m2fnuz,
}
_OTHERS = {
    **dict.fromkeys(["F4"], 4),
    **dict.fromkeys(["F6_E2M3", "F6_E3M2"], 6),
    **dict.fromkeys(["BOOL", "U8", "I8", "F8_E8M0"], 8),
    **dict.fromkeys(["U16", "I16"], 16),
    **dict.fromkeys(["U32", "I32"], 32),
    **dict.fromkeys(["U64", "I64", "C64"], 64),
}
BITS = {name: 8 * dtype.itemsize for name, dtype in FLOATS.items()} | _OTHERS


@dataclass(frozen=True)
class TensorEntry:
    """One tensor of a file: its dtype as the file names it, and its bytes `[start, end)` there."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int


def read_header(path: Path) -> dict[str, TensorEntry]:
    """The tensors of a safetensors file by name, in the order of its header.

    The safetensors library accepts every file that this function accepts, with the same bytes for
    each tensor. The exception is a dtype that the library does not know: such tensors are only
    copied.

    Raises ValueError, naming the file and the reason, for anything else.
    """
    with open_file(path) as file:
        return parse_header(file, os.fstat(file.fileno()).st_size, str(path))


def parse_header(file: BinaryIO, size: int, label: str) -> dict[str, TensorEntry]:
    """What `read_header` does, for an open file of `size` bytes that errors call `label`."""
    first = file.read(8)
    if first == b"version ":
        raise ValueError(f"{label!r} is a pointer of Git LFS, not the file. Run git lfs pull.")
    length = int.from_bytes(first, "little")
    if len(first) < 8 or length > min(LONGEST, size - 8):
        raise ValueError(
            f"{label!r} is no safetensors file, or a truncated one: its {size} bytes cannot hold a "
            f"header of {length} (at most {LONGEST}). Download or save it again."
        )
    try:
        entries = _entries(parse_json(file.read(length)), 8 + length)
        _check_coverage(entries, 8 + length, size)
    except ValueError as error:
        raise ValueError(
            f"{label!r} has a broken safetensors header: {error}. Download or save it again."
        ) from None
    return entries


def read_json(path: Path) -> Any:
    """The JSON in a file, as `parse_json` reads it. A file that is too long is a ValueError too."""
    with open_file(path) as file:
        raw = file.read(LONGEST + 1)
    if len(raw) > LONGEST:
        raise ValueError(f"it is longer than {LONGEST} bytes")
    return parse_json(raw)


def parse_json(raw: bytes) -> Any:
    """JSON that has one meaning: UTF-8, no repeated keys. Raises ValueError with the reason."""
    try:
        return json.loads(
            raw.decode(), object_pairs_hook=_object, parse_int=_integer, parse_constant=_refuse
        )
    except UnicodeError:
        raise ValueError("it is not UTF-8") from None
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"it is not JSON ({error})") from None


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    members = dict(pairs)
    if len(members) != len(pairs):
        raise ValueError("a key is in it more than once")
    for text in (*members, *(value for value in members.values() if isinstance(value, str))):
        text.encode()  # raises for half of a surrogate pair, which is no character
    return members


def _integer(digits: str) -> int | float:
    # The checks of sizes reject floats, so they reject a negative integer, and "-0" too.
    return float(digits) if digits.startswith("-") else int(digits)


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is not JSON")


def _entries(header: Any, base: int) -> dict[str, TensorEntry]:
    if not isinstance(header, dict):
        raise ValueError(f"it is a {type(header).__name__}, not an object")
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise ValueError("its __metadata__ is not a mapping of strings")
    return {name: _entry(name, fields, base) for name, fields in header.items()}


def _entry(name: str, fields: Any, base: int) -> TensorEntry:
    if not isinstance(fields, dict) or fields.keys() != {"dtype", "shape", "data_offsets"}:
        raise ValueError(f"{name!r} needs dtype, shape and data_offsets, and nothing else")
    dtype, shape, offsets = fields["dtype"], fields["shape"], fields["data_offsets"]
    if not isinstance(dtype, str):
        raise ValueError(f"the dtype of {name!r} is {shown(dtype)}, not a string")
    if not _are_sizes(shape) or not _are_sizes(offsets) or len(offsets) != 2:
        raise ValueError(
            f"{name!r} has shape {shown(shape)} and data_offsets {shown(offsets)}: a list of "
            "sizes and a pair of offsets are needed"
        )
    start, end = offsets
    if dtype in BITS and (end - start) * 8 != _numel(name, shape) * BITS[dtype]:
        raise ValueError(
            f"{name!r} has {end - start} bytes, which are not those of shape {shown(shape)} "
            f"in {dtype}"
        )
    return TensorEntry(dtype, tuple(shape), base + start, base + end)


def _numel(name: str, shape: list[int]) -> int:
    # The library refuses an overflow even if another dimension is 0, so a 0 counts as 1 at first.
    count = 1
    for size in shape:
        count *= size or 1
        if count >= 2**57:  # in bits it must fit an int64
            raise ValueError(f"{name!r} has the impossible shape {shown(shape)}")
    return 0 if 0 in shape else count


def _are_sizes(value: Any) -> bool:
    return isinstance(value, list) and all(type(n) is int and 0 <= n < 2**63 for n in value)


def in_order(entries: Mapping[str, TensorEntry]) -> list[tuple[str, TensorEntry]]:
    """The tensors with their names, as they lie in the file."""
    return sorted(entries.items(), key=lambda item: (item[1].start, item[1].end))


def _check_coverage(entries: Mapping[str, TensorEntry], position: int, size: int) -> None:
    """Raise ValueError unless each byte after the header belongs to exactly one tensor."""
    for name, entry in in_order(entries):
        if entry.start != position or entry.end < position:
            raise ValueError(f"{name!r} does not begin where the tensor before it ends")
        position = entry.end
    if position != size:
        raise ValueError(f"its tensors end at byte {position}, and the file at {size}")
