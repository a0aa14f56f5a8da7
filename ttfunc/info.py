"""What a file of rows, an adapter or a checkpoint holds, for a person: `python -m ttfunc info`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TypeAlias

import torch

from ttfunc.disk import rows_file
from ttfunc.disk.folder import Checkpoint, open_checkpoint
from ttfunc.disk.inspected import changed_rows, highest, matrix_in, rows_of_module
from ttfunc.disk.matrices import under_names
from ttfunc.disk.rows_file import file_of
from ttfunc.disk.tokenizer import has_tokenizer, tokenizer_in
from ttfunc.model.memory import same_bits
from ttfunc.peft.adapter import CONFIG, read_adapter
from ttfunc.rows.deltas import TokenDeltas
from ttfunc.rows.inspecting import LEGEND, UNKNOWN, Inspected, table, text_with
from ttfunc.rows.summary import size

# What is said of one matrix, and its rows.
Entry: TypeAlias = tuple[list[str], Inspected]

_OPTIONS = (
    "--tokenizer FOLDER adds the text of each token and how far its row moved; "
    "--model FOLDER how far and how long it is beside the model's rows, and its nearest tokens"
)


def info(path: Path, tokenizer: Path | None = None, model: Path | None = None) -> Iterator[str]:
    """The lines: what is at a path, and with one of the folders a table of its trained rows.

    Of the model the matrices of these rows are read, some rows at a time, and nothing else.
    """
    if model is not None and rows_file.is_of_rows(model):
        raise ValueError(
            f"{str(model)!r} is a file of rows. The order is info ROWS --model FOLDER, the model's."
        )
    base = None if model is None else open_checkpoint(model)
    if tokenizer is None and model is not None:
        # A merged folder's own tokenizer has the new tokens, which that of the model before lacks.
        tokenizer = next(filter(has_tokenizer, (path, model)), None)
    text = None if tokenizer is None else text_with(tokenizer_in(tokenizer))
    lines, entries = _held(path, base)
    if text is None and base is None:
        yield from lines
        yield from (line for told, _ in entries for line in told)
        yield from [_OPTIONS] if entries else []
        return
    if not entries:
        raise ValueError(
            f"{str(path)!r} is a checkpoint, which does not say which of its rows were trained. "
            + ("Give the model from before, --model FOLDER." if base is None else "None differ.")
        )
    yield from lines
    for told, rows in entries:
        yield from told
        if base is None:
            found = table(rows, text)
        else:
            with matrix_in(base, rows.names, rows.rows.shape[1]) as matrix:
                found = table(rows, text, matrix)
        yield from (f"    {line}" for line in found)
    yield from LEGEND if base is not None else LEGEND[:1]
    if text is not None and any(text(i) == UNKNOWN for _, rows in entries for i in rows.ids):
        yield (
            f"{UNKNOWN}: the tokenizer in {str(tokenizer)!r} lacks it; give the one that the new "
            "tokens were added to, as the merged folder's: --tokenizer FOLDER"
        )


def _held(path: Path, base: Checkpoint | None) -> tuple[list[str], Sequence[Entry]]:
    """What is said of the whole, and of each matrix of which rows are known to be trained."""
    if rows_file.is_of_rows(path):
        params = rows_file.read(path)
        rows = sum(len(spec.indices) for spec in params.specs.values())
        head = f"{path}: {rows} trained rows ({size(path.stat().st_size)})"
        params = params if base is None else under_names(base, params, None)
        return [head], list(of_params(params))
    if (path / CONFIG).exists():
        return _adapter(path)
    if path.is_dir() and has_tokenizer(path) and not any(path.glob("*.safetensors")):
        raise ValueError(
            f"{str(path)!r} has a tokenizer, and no rows. The order is "
            "info ROWS --tokenizer FOLDER."
        )
    checkpoint = open_checkpoint(path)
    found: Iterable[Inspected] = ()
    if file_of(path).is_file():
        found = rows_of_module(file_of(path))
    if base is not None and not found:
        found = changed_rows(checkpoint, base)
    entries = [([f"  {one.names[0]}", *_of_rows(one)], one) for one in found]
    return list(_checkpoint(path, checkpoint)), entries


def of_params(params: TokenDeltas) -> Iterator[Entry]:
    """What is said of each matrix of the parameters."""
    for key, spec in params.specs.items():
        delta, originals = params.deltas[key], params.originals[key]
        one = Inspected(spec.names, spec.indices.ids, delta, originals)
        told = f"    originals {_kind(originals)}"
        yield [f"  {' = '.join(spec.names)}", *_of_rows(one, spec.counted), told], one


def _adapter(path: Path) -> tuple[list[str], list[Entry]]:
    adapter = read_adapter(path)
    entries: list[Entry] = []
    for module, ids, rows in adapter.rows:
        # PEFT writes the rows of tied modules under the name of each.
        alike = [
            f"{other.module}.weight"
            for other in adapter.rows
            if other.indices == ids and same_bits(other.rows, rows)
        ]
        if alike[0] == f"{module}.weight":
            one = Inspected(tuple(alike), ids, rows, torch.zeros_like(rows))
            names = " = ".join(name.removesuffix(".weight") for name in alike)
            entries.append(([f"  {names}", *_of_rows(one)], one))
    lines = [f"{path}: an adapter of PEFT's, {adapter.config['peft_type']}"]
    if others := [*adapter.weights.values(), *adapter.other_keys]:
        lines.append(f"  and {len(others)} other tensors, such as {others[0]}")
    return lines, entries


def _of_rows(given: Inspected, counted: str = "") -> list[str]:
    _, ids, rows, _ = given
    listed = ", ".join(map(str, ids[:8])) + (", …" if len(ids) > 8 else "")
    return [
        f"    rows      {counted or f'{len(ids):,}'} × {rows.shape[1]:,}: {listed}",
        f"    deltas    {_kind(rows)}",
    ]


def _checkpoint(path: Path, checkpoint: Checkpoint) -> Iterator[str]:
    headers, entries = checkpoint.headers, checkpoint.tensors
    count = sum(map(len, headers.values()))
    yield (
        f"{path}: {count} tensors in {len(headers)} .safetensors files; {size(checkpoint.size)} in "
        f"{len(checkpoint.files)} files"
    )
    weight: Counter[str] = Counter()
    for entry in entries.values():
        weight[entry.dtype] += entry.end - entry.start
    yield from (f"  {dtype:10} {size(total)}" for dtype, total in weight.most_common())
    for name in highest(checkpoint):
        entry = entries[name]
        yield (
            f"  {name}  {entry.shape[0]:,} × {entry.shape[1]:,} {entry.dtype}, "
            f"{size(entry.end - entry.start)}"
        )


def _kind(tensor: torch.Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')}, {size(tensor.nbytes)}"
