"""A checkpoint in which some tensors get another number of tokens: its files, piece by piece.

The header of a file is written anew, and all that lies behind a tensor moves. To give the original
bytes back, only headers in the form that the safetensors library writes are taken.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from ttfunc.disk.atomic import Piece, open_file
from ttfunc.disk.config_file import kind_of, with_sizes
from ttfunc.disk.folder import Checkpoint
from ttfunc.disk.header import BITS, TensorEntry
from ttfunc.disk.matrices import StoredMatrix
from ttfunc.model.beside import bias_names
from ttfunc.model.sizes import Entry
from ttfunc.rows.new_tokens import config_entries


class Tail(NamedTuple):
    """What becomes of the end of a tensor: its size in one dimension, and the bytes that follow."""

    dim: int
    size: int
    more: bytes

    def longer(self, entry: TensorEntry) -> int:
        """How many bytes the tensor gains."""
        old = entry.shape[self.dim]
        return (entry.end - entry.start) // old * (self.size - old)


@dataclass
class Resizing:
    """What is to have another size in a checkpoint.

    sizes: of the vocabulary, from the old to the new one. config: the text with these. tails: of
    the tensors in each file. headers: of these files the new one, and where each tensor begins in
    the new file.
    """

    sizes: dict[int, int] = field(default_factory=dict)
    config: str = ""
    tails: dict[str, dict[str, Tail]] = field(default_factory=dict)
    headers: dict[str, tuple[bytes, dict[str, int]]] = field(default_factory=dict)

    def moved(self, stored: StoredMatrix) -> int:
        """By how many bytes the matrix begins later in the new file."""
        if stored.file not in self.headers:
            return 0
        return self.headers[stored.file][1][stored.name] - stored.entry.start

    def pieces(self, checkpoint: Checkpoint, name: str) -> list[Piece] | None:
        """What a file consists of; None for one that stays as it is."""
        if name in self.tails:
            return self._of_tensors(checkpoint, name)
        beside = "/" not in name and self.sizes
        if beside and name == "config.json":
            return [self.config.encode()]
        if beside and name.endswith(".safetensors.index.json"):
            return [self._index(checkpoint, _text(checkpoint, name)).encode()]
        return None

    def _of_tensors(self, checkpoint: Checkpoint, name: str) -> list[Piece]:
        pieces: list[Piece] = [self.headers[name][0]]
        entries, tails = checkpoint.headers[name], self.tails[name]
        for tensor, entry in _in_order(entries):
            tail = tails.get(tensor)
            longer = 0 if tail is None else tail.longer(entry)
            pieces.append(range(entry.start, entry.end + min(0, longer)))
            if tail is not None:
                pieces.append(tail.more)
        return pieces

    def _index(self, checkpoint: Checkpoint, text: str) -> str:
        """The index of the shards, with the new sizes in its metadata."""
        more = {"total_size": 0, "total_parameters": 0}
        for name, tails in self.tails.items():
            for tensor, tail in tails.items():
                entry = checkpoint.headers[name][tensor]
                more["total_size"] += tail.longer(entry)
                more["total_parameters"] += tail.longer(entry) * 8 // BITS[entry.dtype]
        for key, count in more.items():
            found = re.search(rf'"{key}"\s*:\s*(\d+)', text)
            if found:
                total = str(int(found[1]) + count)
                text = text[: found.start(1)] + total + text[found.end(1) :]
        return text


def resizing(
    checkpoint: Checkpoint, matrices: Sequence[StoredMatrix], heights: Mapping[str, int]
) -> Resizing:
    """What a merge, or its inverse, resizes: each matrix to its height, and its biases with it.

    heights: by the name of the matrix; one that has that height already stays as it is.
    """
    found = Resizing()
    shapes = {name: entry.shape for name, entry in checkpoint.tensors.items()}
    for stored in matrices:
        old, new = stored.entry.shape[0], heights[stored.name]
        if old == new:
            continue
        found.sizes[old] = new
        own = found.tails.setdefault(stored.file, {})
        own[stored.name] = Tail(0, new, stored.tail(old) if new > old else b"")
        known = stored.spec.origin.biases_among(shapes)
        for bias in bias_names(shapes, stored.spec.names, old, known):
            for file, header in checkpoint.headers.items():
                if bias in header:
                    width = BITS[header[bias].dtype] // 8
                    tails = found.tails.setdefault(file, {})
                    tails[bias] = Tail(-1, new, bytes(max(0, new - old) * width))
    if found.sizes and "config.json" in checkpoint.files:
        text = _text(checkpoint, "config.json")
        found.config = with_sizes(text, _entries(text, matrices, heights), found.sizes)
    for name, tails in found.tails.items():
        found.headers[name] = _resized_header(checkpoint, name, tails)
    return found


def _entries(
    text: str, matrices: Sequence[StoredMatrix], heights: Mapping[str, int]
) -> dict[str, Entry] | None:
    """What changes in the config, if it is one of the model that the rows are of."""
    changed = [s for s in matrices if s.entry.shape[0] != heights[s.name]]
    specs = {stored.key: stored.spec for stored in changed}
    kind = kind_of(text)
    if any(spec.origin.kind != kind for spec in specs.values()):
        return None
    return config_entries(specs, any(s.entry.shape[0] > heights[s.name] for s in changed))


def _resized_header(
    checkpoint: Checkpoint, name: str, tails: Mapping[str, Tail]
) -> tuple[bytes, dict[str, int]]:
    header = _own_form(checkpoint, name)
    starts: dict[str, int] = {}
    at = 0
    for tensor, entry in _in_order(checkpoint.headers[name]):
        shape, size = list(entry.shape), entry.end - entry.start
        if tensor in tails:
            shape[tails[tensor].dim] = tails[tensor].size
            size += tails[tensor].longer(entry)
        starts[tensor] = at
        at += size
        header[tensor].update(shape=shape, data_offsets=[starts[tensor], at])
    raw = _serialized(header)
    return raw, {tensor: len(raw) + start for tensor, start in starts.items()}


def _in_order(entries: Mapping[str, Any]) -> list[tuple[str, Any]]:
    return sorted(entries.items(), key=lambda item: (item[1].start, item[1].end))


def _own_form(checkpoint: Checkpoint, name: str) -> dict[str, Any]:
    """The header as it is. Raises ValueError if it could not be given back to the byte."""
    with open_file(checkpoint.root / name) as file:
        first = file.read(8)
        raw = first + file.read(int.from_bytes(first, "little"))
    header: dict[str, Any] = json.loads(raw[8:])
    if _serialized(header) != raw:
        raise ValueError(
            f"{str(checkpoint.root / name)!r} has a header that the safetensors library would "
            "write in other bytes, which unmerge_checkpoint could not give back once a tensor is "
            "longer. Load the model and save it again with model.save_pretrained(folder)."
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
            f"{str(checkpoint.root / name)!r} is not UTF-8, as JSON is: {error}. Its sizes follow "
            "the number of tokens: save it as UTF-8 first."
        ) from None
