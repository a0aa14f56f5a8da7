"""Files of safetensors, written byte by byte."""

from __future__ import annotations

import json

from ttfunc.disk.header import BITS


def blob(header: str | bytes | dict, data: bytes = b"abcd", length: int | None = None) -> bytes:
    """A safetensors file with that header, whatever it is."""
    if isinstance(header, dict):
        header = json.dumps(header)
    raw = header.encode() if isinstance(header, str) else header
    return (len(raw) if length is None else length).to_bytes(8, "little") + raw + data


def entry(dtype="F32", shape=(1,), offsets=(0, 4)) -> dict:
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


def as_bytes(raw: bytes, found: dict) -> bytes:
    """The same file, with tensors of unknown dtypes declared as what they are to us: bytes."""
    base = 8 + int.from_bytes(raw[:8], "little")
    header = {
        n: entry(e.dtype, e.shape, (e.start - base, e.end - base))
        if e.dtype in BITS
        else entry("U8", (e.end - e.start,), (e.start - base, e.end - base))
        for n, e in found.items()
    }
    return blob(header, raw[base:])
