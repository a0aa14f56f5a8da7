"""Where the rows of token matrices lie in a checkpoint on disk, and whether they can go there."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from reprlib import repr as shown

import torch
from torch import Tensor

from ttfunc.deltas import TokenDeltas, TokenRows
from ttfunc.disk.atomic import open_file
from ttfunc.disk.folder import Checkpoint
from ttfunc.disk.header import FLOATS, Entry
from ttfunc.disk.tensors import cpu_copy
from ttfunc.names import renamed


@dataclass(frozen=True)
class Place:
    """One token matrix in one file of a checkpoint, and the `(k, D)` rows to write there.

    key: of the matrix in the parameters. name: one of its names, and the file's for this entry.
    """

    file: str
    key: str
    name: str
    entry: Entry
    row: TokenRows
    rows: Tensor

    @property
    def dtype(self) -> torch.dtype:
        """That of the file."""
        return FLOATS[self.entry.dtype]

    def edits(self, rows: Tensor) -> Iterator[tuple[int, memoryview]]:
        """`rows` in the dtype of the file, with the byte at which each of them begins."""
        stride = self.row.shape[1] * self.dtype.itemsize
        # The cast is that of ttfunc.merge.
        blocks = rows.to(self.dtype).contiguous().view(torch.uint8).numpy()
        for token, block in zip(self.row.indices.ids, blocks, strict=True):
            yield self.entry.start + token * stride, memoryview(block)


def under_names(
    checkpoint: Checkpoint, params: TokenDeltas, names: Mapping[str, str] | None
) -> TokenDeltas:
    """`params` with the names of the tensors in `checkpoint`: see `renamed`."""
    stored = _shapes(checkpoint)
    return renamed(
        params, names, stored, "the checkpoint", lambda row, other: _missing(checkpoint, row, other)
    )


def find_places(
    checkpoint: Checkpoint, params: TokenDeltas, values: Mapping[str, Tensor]
) -> list[Place]:
    """Every tensor of `checkpoint` that `values`, `(k, D)` for each key of `params`, are for.

    Raises KeyError for a matrix that is not there under any of its names; ValueError where it has
    another shape, or cannot take rows.
    """
    places = []
    for key, row in params.rows.items():
        rows = cpu_copy(values[key], f"the rows of {key!r}")
        found = [
            Place(file, key, name, header[name], row, rows)
            for file, header in checkpoint.headers.items()
            for name in row.names
            if name in header
        ]
        if not found:
            missing = _missing(checkpoint, row, *row.names)
            raise KeyError(
                f"{missing} Where it is stored under another name, say so "
                "in names (--name on the command line)."
            )
        for place in found:
            _check_rows(place)
            _check_matrix(checkpoint, place)
        places += found
    return places


def holds(root: Path, place: Place, rows: Tensor) -> bool:
    """Whether the file has these `rows`, cast to its dtype, at the place."""
    with open_file(root / place.file) as file:
        for offset, block in place.edits(rows):
            file.seek(offset)
            if file.read(len(block)) != block:
                return False
    return True


def check_finite(place: Place) -> None:
    """Raises ValueError for rows that the file's dtype cannot hold: NaN, infinite or too large."""
    rows, limits = place.rows.double(), torch.finfo(place.dtype)
    # Some casts to float8 saturate; what only rounds to the largest number is fine.
    fits = rows.abs() <= limits.max * (1 + limits.eps / 2)
    fine = (fits & rows.to(place.dtype).double().isfinite()).all(dim=1).tolist()
    if bad := [i for i, good in zip(place.row.indices.ids, fine, strict=True) if not good]:
        raise ValueError(
            f"the rows of tokens {shown(bad)} for {place.name!r} are not finite in {place.dtype}, "
            f"or beyond its {limits.max:g}. Train with a smaller step, or merge into a checkpoint "
            "of a wider dtype."
        )


def _check_rows(place: Place) -> None:
    row = place.row
    needed = (len(row.indices), row.shape[1])
    if tuple(place.rows.shape) != needed or not place.rows.is_floating_point():
        raise ValueError(
            f"the rows of {place.key!r} are {place.rows.dtype} of shape {tuple(place.rows.shape)}, "
            f"and floats of {needed} are needed. Merge stacked adapters one at a time."
        )
    if wrong := [token for token in row.indices.ids if not 0 <= token < row.shape[0]]:
        raise ValueError(
            f"token indices {shown(wrong)} of {place.key!r} are outside of its {row.shape[0]} rows."
        )


def _check_matrix(checkpoint: Checkpoint, place: Place) -> None:
    entry, row = place.entry, place.row
    # Scales and the like, as weight_scale_inv and weight.absmax.
    parts = (f"{place.name}_", f"{place.name}.")
    beside = [name for name in _shapes(checkpoint) if name.startswith(parts)]
    if entry.dtype.startswith("F8"):
        module = place.name.rpartition(".")[0]
        beside += [n for n in _shapes(checkpoint) if n.startswith(f"{module}.") and "scale" in n]
    if entry.dtype not in FLOATS or beside:
        scales = f", with {shown(beside)} beside it" if beside else ""
        raise ValueError(
            f"{place.name!r} is {entry.dtype} in the checkpoint{scales}: float rows cannot be "
            "written to a quantised matrix. Merge the checkpoint that it was made from, and "
            "quantise the result."
        )
    if entry.shape != row.shape:
        raise ValueError(
            f"{place.name!r} has shape {entry.shape} in the checkpoint, and the parameters were "
            f"made for {row.shape}. Use the checkpoint of that model, whole matrices in it (not "
            "split for tensor parallelism)."
        )


def _shapes(checkpoint: Checkpoint) -> dict[str, tuple[int, ...]]:
    return {name: e.shape for header in checkpoint.headers.values() for name, e in header.items()}


def _missing(checkpoint: Checkpoint, row: TokenRows, *names: str) -> str:
    shapes = _shapes(checkpoint)
    alike = [name for name, shape in shapes.items() if shape == row.shape] or list(shapes)
    # A file may have any number of names, of any length, and to compare them takes time.
    few = [name for name in alike if len(name) <= 300][:1000]
    close = difflib.get_close_matches(names[0], few, n=5, cutoff=0.0)
    nearest = ", ".join(f"{name!r} {shapes[name]}" for name in close) or "no tensor at all"
    return (
        f"the checkpoint {str(checkpoint.root)!r} has none of the names {names} for the token "
        f"matrix {row.shape}. Nearest: {nearest}. Is it of the same model?"
    )
