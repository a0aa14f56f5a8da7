"""The tokenizer beside a merged checkpoint, so that a loader finds both in one folder."""

from __future__ import annotations

import os
import secrets
import shutil
from collections.abc import Collection
from pathlib import Path
from typing import Any

from ttfunc.disk.atomic import sync_directory


def check_tokenizer(tokenizer: Any, root: Path) -> None:
    """Raise unless this is a tokenizer, or its folder, that can go into a copy of `root`."""
    if root.is_file():
        raise ValueError(
            f"{str(root)!r} is one file, and a tokenizer needs a folder: merge the folder of the "
            "model, or leave tokenizer out."
        )
    if isinstance(tokenizer, (str, os.PathLike)):
        if not Path(tokenizer).is_dir():
            raise FileNotFoundError(
                f"there is no folder of a tokenizer at {os.fspath(tokenizer)!r}. Give the folder "
                "that tokenizer.save_pretrained wrote."
            )
    elif not callable(getattr(tokenizer, "save_pretrained", None)):
        raise TypeError(
            f"tokenizer is a {type(tokenizer).__name__} without save_pretrained: give a tokenizer "
            "of transformers, or the folder that its save_pretrained wrote."
        )


def save_tokenizer(tokenizer: Any, folder: Path, taken: Collection[str]) -> None:
    """Write a tokenizer's files into a folder, over those of the same names; synced.

    Raises ValueError for one that would write a file in `taken`, as a whole model does.
    """
    # First elsewhere: what save_pretrained writes over is not known before.
    scratch = folder / f".ttfunc-{secrets.token_hex(8)}.tokenizer"
    if isinstance(tokenizer, (str, os.PathLike)):
        shutil.copytree(tokenizer, scratch)
    else:
        tokenizer.save_pretrained(scratch)
    names = [str(path.relative_to(scratch)) for path in scratch.rglob("*") if path.is_file()]
    if wrong := sorted(name for name in names if name in taken or _is_in_the_way(folder, name)):
        raise ValueError(
            f"tokenizer would write {wrong} over that of the model: give the tokenizer alone, or "
            "the folder that its save_pretrained wrote."
        )
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (scratch / name).replace(folder / name)
        _sync(folder / name)
        sync_directory((folder / name).parent)
    shutil.rmtree(scratch)


def _is_in_the_way(folder: Path, name: str) -> bool:
    """Whether a folder has the name of this file, or a file that of its folder."""
    return (folder / name).is_dir() or any((folder / up).is_file() for up in Path(name).parents)


def _sync(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())
