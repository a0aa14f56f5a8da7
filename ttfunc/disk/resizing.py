"""What changes in the files of a checkpoint where its matrices get rows, and may get longer.

In a file with a resized tensor the header is written anew, and all tensors after that one move. The
header must be in the form that the safetensors library writes, so that an unmerge can give its
bytes back.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from ttfunc.disk.atomic import Piece, open_file
from ttfunc.disk.config_file import kind_of, with_sizes
from ttfunc.disk.folder import Checkpoint
from ttfunc.disk.header import BITS, TensorEntry, in_order
from ttfunc.disk.matrices import StoredMatrix
from ttfunc.model.beside import bias_names
from ttfunc.model.sizes import Entry
from ttfunc.rows.new_tokens import config_entries


class Tail(NamedTuple):
    """The new end of a tensor: its size in one dimension, and the bytes that are added."""

    dim: int
    size: int
    added: bytes

    def growth(self, entry: TensorEntry) -> int:
        """How many bytes the tensor gains; negative where it loses some."""
        old = entry.shape[self.dim]
        return (entry.end - entry.start) // old * (self.size - old)


Tails = dict[str, dict[str, Tail]]  # by the file and the name of a tensor


class Changes(NamedTuple):
    """How a copy of a checkpoint differs from it, by the names of the files.

    edits: the offsets at which rows are written, and their bytes. pieces: the contents of a file
    that changes its size, to which the edits come.
    """

    edits: dict[str, list[tuple[int, memoryview]]]
    pieces: dict[str, list[Piece]]


def changes(
    checkpoint: Checkpoint, matrices: Sequence[StoredMatrix], heights: Mapping[str, int]
) -> Changes:
    """What changes where the matrices get their rows and new heights, and their biases with them.

    heights: the new heights by the names of the matrices; one may have its height already.
    """
    found = Changes({}, {})
    moved: dict[str, dict[str, int]] = {}
    resized = [stored for stored in matrices if stored.entry.shape[0] != heights[stored.name]]
    tails = _tails(checkpoint, resized, heights)
    if resized and "config.json" in checkpoint.files:
        text = _text(checkpoint, "config.json")
        sizes = {stored.entry.shape[0]: heights[stored.name] for stored in resized}
        text = with_sizes(text, _entries(text, resized, heights), sizes)
        found.pieces["config.json"] = [text.encode()]
    for name in checkpoint.files if resized else ():
        if "/" not in name and name.endswith(".safetensors.index.json"):
            found.pieces[name] = [_index(checkpoint, _text(checkpoint, name), tails).encode()]
    for name, ends in tails.items():
        found.pieces[name], moved[name] = _weights(checkpoint, name, ends)
    for stored in matrices:
        later = moved.get(stored.file, {}).get(stored.name, 0)
        edits = stored.edits(stored.rows, heights[stored.name], later)
        found.edits.setdefault(stored.file, []).extend(edits)
    return found


def _tails(
    checkpoint: Checkpoint, resized: Sequence[StoredMatrix], heights: Mapping[str, int]
) -> Tails:
    """The new ends of these matrices, and of the biases with an entry for each of their rows."""
    tails: Tails = {}
    shapes = {name: entry.shape for name, entry in checkpoint.tensors.items()}
    for stored in resized:
        old, new = stored.entry.shape[0], heights[stored.name]
        added = stored.tail(old) if new > old else b""
        tails.setdefault(stored.file, {})[stored.name] = Tail(0, new, added)
        known = stored.spec.origin.biases_among(shapes)
        for bias in bias_names(shapes, stored.spec.names, old, known):
            for file, header in checkpoint.headers.items():
                if bias in header:
                    zeros = bytes(max(0, new - old) * BITS[header[bias].dtype] // 8)
                    tails.setdefault(file, {})[bias] = Tail(-1, new, zeros)
    return tails


def _entries(
    text: str, resized: Sequence[StoredMatrix], heights: Mapping[str, int]
) -> dict[str, Entry] | None:
    """The sizes that change in a config; None where the rows are not of a model of its kind."""
    specs = {stored.key: stored.spec for stored in resized}
    kind = kind_of(text)
    if any(spec.origin.kind != kind for spec in specs.values()):
        return None
    return config_entries(specs, any(s.entry.shape[0] > heights[s.name] for s in resized))


def _index(checkpoint: Checkpoint, text: str, tails: Tails) -> str:
    """The index of the shards, with the new sizes in its metadata."""
    growth = {"total_size": 0, "total_parameters": 0}
    for file, ends in tails.items():
        for tensor, tail in ends.items():
            entry = checkpoint.headers[file][tensor]
            growth["total_size"] += tail.growth(entry)
            growth["total_parameters"] += tail.growth(entry) * 8 // BITS[entry.dtype]
    for key, count in growth.items():
        if found := re.search(rf'"{key}"\s*:\s*(\d+)', text):
            total = str(int(found[1]) + count)
            text = text[: found.start(1)] + total + text[found.end(1) :]
    return text


def _weights(
    checkpoint: Checkpoint, name: str, tails: Mapping[str, Tail]
) -> tuple[list[Piece], dict[str, int]]:
    """The pieces of a file of weights, and how many bytes later each of its tensors begins."""
    header, entries = _header(checkpoint, name), checkpoint.headers[name]
    pieces: list[Piece] = []
    starts: dict[str, int] = {}
    at = 0
    for tensor, entry in in_order(entries):
        growth = 0
        pieces.append(range(entry.start, entry.end))
        if tail := tails.get(tensor):
            growth = tail.growth(entry)
            header[tensor]["shape"][tail.dim] = tail.size
            pieces[-1:] = [range(entry.start, entry.end + min(0, growth)), tail.added]
        starts[tensor] = at
        at += entry.end - entry.start + growth
        header[tensor]["data_offsets"] = [starts[tensor], at]
    raw = _serialized(header)
    moved = {tensor: len(raw) + start - entries[tensor].start for tensor, start in starts.items()}
    return [raw, *pieces], moved


def _header(checkpoint: Checkpoint, name: str) -> dict[str, Any]:
    """The header of a file. Raises ValueError where unmerge could not give its bytes back."""
    with open_file(checkpoint.root / name) as file:
        first = file.read(8)
        raw = first + file.read(int.from_bytes(first, "little"))
    header: dict[str, Any] = json.loads(raw[8:])
    if _serialized(header) != raw:
        raise ValueError(
            f"{str(checkpoint.root / name)!r} has a header that the safetensors library would "
            "write in other bytes. New tokens change the header, and unmerge_checkpoint could not "
            "give these bytes back. Load the model and save it again with "
            "model.save_pretrained(folder)."
        )
    return header


def _serialized(header: Mapping[str, Any]) -> bytes:
    raw = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    raw += b" " * (-len(raw) % 8)
    return len(raw).to_bytes(8, "little") + raw


def _text(checkpoint: Checkpoint, name: str) -> str:
    with open_file(checkpoint.root / name) as file:
        raw = file.read()
    try:
        return raw.decode()
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{str(checkpoint.root / name)!r} is not UTF-8, as JSON must be: {error}. The new "
            "tokens change sizes in it: save it as UTF-8 first."
        ) from None
