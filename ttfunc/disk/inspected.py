"""Trained rows of files that do not say where they started, and the matrix of a model's folder."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

from ttfunc.disk.folder import Checkpoint
from ttfunc.disk.header import FLOATS
from ttfunc.disk.rows_file import is_of_module
from ttfunc.disk.tensors import differing, opened, tensor_of
from ttfunc.model.names import through_wrappers
from ttfunc.rows.inspecting import Base, Inspected
from ttfunc.rows.renaming import key, name_in

_MOST = 10_000  # rows that differ; a model that was trained whole has more


def highest(checkpoint: Checkpoint) -> list[str]:
    """The names of the matrices that have the most rows."""
    heights = {n: e.shape[0] for n, e in checkpoint.tensors.items() if len(e.shape) == 2}
    most = max(heights.values(), default=0)
    return [name for name, height in heights.items() if height == most]


@contextlib.contextmanager
def matrix_in(checkpoint: Checkpoint, names: Sequence[str], width: int) -> Iterator[Base]:
    """The matrix of a checkpoint that has one of these names; slices of it read its rows.

    Raises KeyError where there is none, and ValueError for another width or another dtype.
    """
    files = {name: file for file, header in checkpoint.headers.items() for name in header}
    exact = [name for name in names if name in files]
    name = next(iter([*exact, *through_wrappers(names, files).values()]), None)
    if name is None:
        raise KeyError(
            f"the checkpoint {str(checkpoint.root)!r} has none of the names {tuple(names)}; its "
            f"matrices with the most rows are {highest(checkpoint)[:4]}. Is it of the same model?"
        )
    entry = checkpoint.tensors[name]
    if len(entry.shape) != 2 or entry.shape[1] != width or entry.dtype not in FLOATS:
        raise ValueError(
            f"{name!r} is {entry.dtype} of shape {entry.shape} in {str(checkpoint.root)!r}, and "
            f"floats of width {width} are needed. Give the model that the rows were trained on."
        )
    with opened(checkpoint.root / files[name]) as file:
        yield Base(file.get_slice(name), entry.shape[0])


def rows_of_module(path: Path) -> list[Inspected]:
    """The rows of a TokenModule that a trainer saved; none for another file."""
    with opened(path) as file:
        if not is_of_module(file):
            return []
        found = []
        for entry in sorted(file.keys()):
            if (name := name_in(entry, "deltas")) is not None:
                rows = tensor_of(file, entry)
                ids = tensor_of(file, key("token_indices", name)).tolist()
                found.append(Inspected((name,), tuple(ids), rows, torch.zeros_like(rows)))
        return found


def changed_rows(checkpoint: Checkpoint, base: Checkpoint) -> Iterator[Inspected]:
    """The rows in which the highest matrices of a checkpoint differ from those of its base.

    Raises ValueError where so many differ that it is another model.
    """
    for name in (name for name in highest(checkpoint) if name in base.tensors):
        width = checkpoint.tensors[name].shape[1]
        with (
            matrix_in(checkpoint, [name], width) as now,
            matrix_in(base, [name], width) as before,
        ):
            ids = tuple(_changed(now, before))
            if len(ids) > _MOST:
                raise ValueError(
                    f"{len(ids):,} of {now.height:,} rows of {name!r} are not those of "
                    f"{str(base.root)!r}: it is another model, or one that was trained whole."
                )
            if ids:
                rows = torch.cat([now.rows[token : token + 1] for token in ids])
                yield Inspected((name,), ids, rows, torch.zeros_like(rows))


def _changed(now: Base, before: Base) -> Iterator[int]:
    """The ids of the rows that differ, and of those that the base does not have."""
    both = min(now.height, before.height)
    for tokens, block in Base(now.rows, both).blocks():
        ids = tokens.tolist()
        rows = differing(block, before.rows[ids[0] : ids[-1] + 1])
        yield from (ids[row] for row in rows)
    yield from range(both, now.height)
