"""Merging into a checkpoint on disk: copy its files, and write k rows into the copies."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any, TypeAlias

from ttfunc.disk import rows_file
from ttfunc.disk.atomic import copy_file, make_directory, stage, sync_directory
from ttfunc.disk.folder import INDEX, Checkpoint, check_copyable, open_checkpoint, warn_of_copies
from ttfunc.disk.matrices import StoredMatrix, check_finite, find_matrices, holds, under_names
from ttfunc.disk.resizing import Changes, changes
from ttfunc.disk.tensors import path_of
from ttfunc.disk.tokenizer import (
    check_tokenizer,
    save_tokenizer,
    vocabulary_of,
    warn_of_end,
    warn_of_removed,
    warn_of_unknown,
)
from ttfunc.merging.merge import check_originals
from ttfunc.rows.deltas import TokenDeltas, check_type

AnyPath: TypeAlias = "str | os.PathLike[str]"
Progress: TypeAlias = Callable[[int, int], None]

_ORDER = (
    "merge_checkpoint(source, params, destination), the same for unmerge_checkpoint, and "
    "MODEL ROWS MERGED on the command line"
)


def merge_checkpoint(
    source: AnyPath,
    params_or_path: TokenDeltas | AnyPath,
    destination: AnyPath,
    *,
    names: Mapping[str, str] | None = None,
    tokenizer: Any = None,
    progress: Progress | None = None,
) -> None:
    """Copy a checkpoint, with the trained rows in the copy, without building the model.

    The bytes are those of `ttfunc.merge` on the loaded tensors. With new tokens the matrices get
    longer, and so do their sizes in the index of the shards and in `config.json`. All else is
    copied byte for byte, and memory does not grow with the checkpoint. The source is only read; the
    destination appears whole or not at all. The copy has the permissions of the source.

    Args:
        source: a Hugging Face folder with `.safetensors` files, sharded or not, or one such file.
        params_or_path: with `(k, D)` deltas, which are cast to the dtype of each matrix; or the
            path of a file that `ttfunc.save` wrote. (A PEFT adapter does not say what is tied: give
            what `load_peft` returns for the model.)
        destination: the path of the copy. Nothing may have this name yet.
        names: a mapping from the model's name of a matrix to the checkpoint's, where that is
            neither the same nor the name under which transformers saves it.
        tokenizer: with the new tokens; its `save_pretrained` writes it into the copy. Or the folder
            where it is saved already. By default the copy has the files of the source.
        progress: a function that is called with the bytes copied so far, and all of the
            checkpoint's.

    Raises:
        KeyError: the checkpoint has none of the names of a matrix, or lacks the one in `names`.
        ValueError: a matrix of another shape, or quantised; one matrix in the checkpoint that was
            several when the rows were made; new rows for only a part of what the config gives one
            size; a config of another size; rows that are not finite in the matrix's dtype; a broken
            file; a destination inside the source; a `tokenizer` that would overwrite files of the
            model.
        FileExistsError: something has the name of the destination.
        FileNotFoundError: there is no source.
        OSError: the copy fails, as on a full disk.

    Warns:
        UserWarning: the rows in the checkpoint are not the originals, so `unmerge_checkpoint` would
            not give them back; the tokenizer does not have the new tokens, or ends a text with a
            trained token that the folder's `eos_token_id` does not have; other files seem to hold
            the same weights; or the checkpoint has only one of two matrices, and its config does
            not say whether they are tied.
    """
    checkpoint = _opened(source, destination)
    params = _given(params_or_path, checkpoint, names)
    matrices = find_matrices(checkpoint, params, params.deltas)
    for stored in matrices:
        check_finite(stored)
        originals = params.originals[stored.key]
        if not originals.is_meta and not holds(checkpoint.root, stored, originals.cpu()):
            warnings.warn(
                f"the rows of {stored.name!r} in {str(checkpoint.root / stored.file)!r} "
                f"({stored.dtype}) are not the originals ({originals.dtype}) of the "
                "parameters, and unmerge_checkpoint will not give them back. Is it another model, "
                "or was it merged into before? Keep this checkpoint.",
                stacklevel=2,
            )
    trained = {token for stored in matrices for token in stored.spec.indices.ids}
    new = [token for s in matrices for token in s.spec.indices.ids if token >= s.spec.shape[0]]
    vocabulary = vocabulary_of(tokenizer, checkpoint.root)
    warn_of_unknown(vocabulary, new)
    warn_of_end(vocabulary, checkpoint.root, trained)
    heights = {s.name: max(s.entry.shape[0], max(s.spec.indices.ids) + 1) for s in matrices}
    _write_copy(checkpoint, matrices, heights, Path(destination), tokenizer, progress)


def unmerge_checkpoint(
    source: AnyPath,
    params_or_path: TokenDeltas | AnyPath,
    destination: AnyPath,
    *,
    names: Mapping[str, str] | None = None,
    tokenizer: Any = None,
    progress: Progress | None = None,
) -> None:
    """Copy a merged checkpoint, with the original rows back in place, byte for byte.

    This is the inverse of `merge_checkpoint`. It writes the originals that the rows were made with.

    Args:
        source: the merged checkpoint, which is only read.
        params_or_path: the rows that were merged, or the path of their file.
        destination: the path of the copy. Nothing may have this name yet.
        names: as for `merge_checkpoint`.
        tokenizer: as it was before the new tokens, or its folder. By default the copy has the files
            of the source, as they are.
        progress: as for `merge_checkpoint`.

    Raises:
        ValueError: the originals have no values, or are of a dtype that cannot give back the bytes
            of the checkpoint; and as `merge_checkpoint`.
        KeyError, FileExistsError, FileNotFoundError, OSError: as `merge_checkpoint`.

    Warns:
        UserWarning: the rows in the checkpoint are not those that a merge writes; the tokenizer
            still has the new tokens; or other files seem to hold the same weights.
    """
    checkpoint = _opened(source, destination)
    params = _given(params_or_path, checkpoint, names)
    matrices = find_matrices(checkpoint, params, params.originals, merged=True)
    for stored in matrices:
        check_originals(stored.name, stored.dtype, stored.rows.dtype)
        deltas = params.deltas[stored.key].detach()
        if not deltas.is_meta and not holds(checkpoint.root, stored, deltas.cpu()):
            warnings.warn(
                f"the rows of {stored.name!r} in {str(checkpoint.root / stored.file)!r} are not "
                "those that merging these parameters writes. Was it merged with other parameters? "
                "The originals replace them anyway.",
                stacklevel=2,
            )
    heights = {s.name: s.entry.shape[0] - s.spec.grown for s in matrices}
    if shrunk := [heights[s.name] for s in matrices if s.spec.grown]:
        warn_of_removed(vocabulary_of(tokenizer, checkpoint.root), min(shrunk))
    _write_copy(checkpoint, matrices, heights, Path(destination), tokenizer, progress)


def _given(
    params_or_path: TokenDeltas | AnyPath, checkpoint: Checkpoint, names: Mapping[str, str] | None
) -> TokenDeltas:
    if isinstance(params_or_path, (str, os.PathLike)):
        params_or_path = rows_file.read(params_or_path)
    check_type(params_or_path, _ORDER)
    return under_names(checkpoint, params_or_path, names)


def _opened(source: AnyPath, destination: AnyPath) -> Checkpoint:
    """The checkpoint at `source`. Raises if the destination cannot be made."""
    root, new = path_of(source, _ORDER), path_of(destination, _ORDER)
    for path in (root, new):
        if rows_file.is_of_rows(path):
            raise ValueError(f"{str(path)!r} is a file of rows. The order is {_ORDER}.")
    if os.path.lexists(new):
        raise FileExistsError(
            f"the destination {str(new)!r} exists, and is never overwritten. Give a new name, or "
            "remove it first."
        )
    if not new.parent.is_dir():
        raise FileNotFoundError(
            f"there is no folder {str(new.parent)!r} in which to make {new.name!r}. Create the "
            "folder first."
        )
    parent = Path(os.path.realpath(new.parent))  # for a loop, Path.resolve raises various errors
    if Path(os.path.realpath(root)) in (parent, *parent.parents):
        raise ValueError(
            f"the destination {str(new)!r} is inside of the source {str(root)!r}, which must not "
            "change. Give a path outside of the source."
        )
    check_copyable(root)
    return open_checkpoint(root)


def _write_copy(
    checkpoint: Checkpoint,
    matrices: Sequence[StoredMatrix],
    heights: Mapping[str, int],
    destination: Path,
    tokenizer: Any,
    progress: Progress | None,
) -> None:
    if tokenizer is not None:
        check_tokenizer(tokenizer, checkpoint.root)
    warn_of_copies(checkpoint)
    changed = changes(checkpoint, matrices, heights)

    def make(partial: Path) -> None:
        # The folder itself comes first; a checkpoint that is a single file has none.
        folders = ["", *checkpoint.folders] if checkpoint.root.is_dir() else []
        for name in folders:
            make_directory(checkpoint.root / name, partial / name)
        _copy_files(checkpoint, partial, changed, progress or (lambda done, total: None))
        if tokenizer is not None:
            save_tokenizer(tokenizer, partial, {*checkpoint.headers, INDEX, "config.json"})
        for name in reversed(folders):
            sync_directory(partial / name)
        checkpoint.check_unchanged()  # so all of the copy is from one point in time

    stage(destination, make)


def _copy_files(
    checkpoint: Checkpoint, partial: Path, changed: Changes, progress: Progress
) -> None:
    done, total = 0, checkpoint.size
    for name, stamp in checkpoint.files.items():
        end = done + stamp.size
        edits, pieces = changed.edits.get(name, ()), changed.pieces.get(name)
        copying = copy_file(checkpoint.root / name, partial / name, edits, pieces)
        with closing(copying):  # also where `progress` raises: that is no error of the file
            for count in copying:
                done += count
                progress(done, total)
        if done < end:  # some bytes were not copied, but written anew
            done = end
            progress(done, total)
