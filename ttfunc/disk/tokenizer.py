"""The tokenizer beside a merged checkpoint, so that a loader finds both in one folder."""

from __future__ import annotations

import importlib
import os
import secrets
import shutil
import warnings
from collections.abc import Callable, Collection, Iterable
from pathlib import Path
from reprlib import repr as shown
from typing import Any

from ttfunc.disk.atomic import sync_directory, sync_file
from ttfunc.disk.header import read_json

# The files of a tokenizer that say the ids of tokens, and where.
_IDS: dict[str, Callable[[Any], Iterable[Any]]] = {
    "tokenizer.json": lambda read: [
        *_numbered(read["model"]["vocab"]),
        *(token["id"] for token in read["added_tokens"]),
    ],
    "tokenizer_config.json": lambda read: map(int, read["added_tokens_decoder"]),
    "added_tokens.json": lambda read: read.values(),
    "vocab.json": lambda read: read.values(),
}


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


def warn_of_unknown(tokenizer: Any, root: Path, new: Iterable[int]) -> None:
    """Warn if the tokenizer, or without one that in the folder `root`, lacks these new tokens.

    Nothing is said of a folder without a tokenizer, or with one that does not say its ids.
    """
    if tokenizer is None or isinstance(tokenizer, (str, os.PathLike)):
        where = Path(root if tokenizer is None else tokenizer)
        ids, who = _ids_in(where), f"the tokenizer in {str(where)!r}"
    else:
        inner = getattr(tokenizer, "tokenizer", tokenizer)  # of a processor
        ids = list(getattr(inner, "get_vocab", dict)().values())
        who = f"this {type(tokenizer).__name__}"
    unknown = sorted(set(new) - set(ids)) if ids else []
    if unknown and unknown[-1] > max(ids):
        warnings.warn(
            f"{who} does not have the new tokens {shown(unknown)}: no text becomes one of them. "
            "Give the tokenizer that they were added to: tokenizer=... (--tokenizer on the command "
            "line).",
            stacklevel=3,
        )


def warn_of_end(tokenizer: Any, root: Path, new: Collection[int]) -> None:
    """Warn if a tokenizer ends texts with a new token, and the model in `root` with others.

    `model.generate` reads the ids to stop at in the model's files, and not in the tokenizer's.
    """
    end, text = _end_in(tokenizer)
    for name in ("generation_config.json", "config.json"):
        try:
            ends = read_json(root / name).get("eos_token_id")
        except (OSError, ValueError, AttributeError):
            continue
        if end in new and end != ends and not (isinstance(ends, list) and end in ends):
            warnings.warn(
                f"the tokenizer ends a text with the new token {end} ({text!r}), and {name!r} of "
                f"the copy with {ends}: generate does not stop at the new one. Set eos_token_id "
                f"to {end} in {name!r} of the copy, or of the source before the merge.",
                stacklevel=3,
            )
        return


def warn_of_left(root: Path, gone: Collection[int]) -> None:
    """Warn if the tokenizer in `root`, which is copied as it is, has tokens that are gone."""
    if left := sorted(set(gone).intersection(_ids_in(root))):
        warnings.warn(
            f"the copy of the tokenizer in {str(root)!r} keeps the tokens {shown(left)}, for which "
            "the matrices have no row any more. Give the tokenizer as it was before them: "
            "tokenizer=... (--tokenizer on the command line).",
            stacklevel=3,
        )


def tokenizer_in(folder: Path) -> Any:
    """The tokenizer of transformers that was saved in a folder; nothing of the hub is asked.

    Raises FileNotFoundError if there is no folder, and ValueError if it has no tokenizer.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"there is no folder of a tokenizer at {str(folder)!r}.")
    try:
        classes = importlib.import_module("transformers")
    except ImportError:
        raise ValueError(
            "reading a tokenizer needs transformers: pip install transformers"
        ) from None
    try:
        return classes.AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # each tokenizer has its own
        raise ValueError(
            f"transformers cannot load a tokenizer from {str(folder)!r}: {error}"
        ) from error


def has_tokenizer(folder: Path) -> bool:
    """Whether it has one of the files that tokenizers have."""
    return any((folder / name).is_file() for name in _IDS)


def _ids_in(folder: Path) -> list[int]:
    """The ids that a folder's tokenizer has tokens for, as far as its files say them."""
    found: list[int] = []
    for name, ids in _IDS.items():
        try:
            found += [i for i in ids(read_json(folder / name)) if type(i) is int]
        except (OSError, ValueError, LookupError, TypeError, AttributeError):
            continue  # it is not there, or of a form of its own: loaders decide on that
    return found


def _end_in(tokenizer: Any) -> tuple[int | None, str | None]:
    """The id and the text of the token that ends a text; None for what is not said."""
    if not isinstance(tokenizer, (str, os.PathLike)):
        inner = getattr(tokenizer, "tokenizer", tokenizer)  # of a processor
        return getattr(inner, "eos_token_id", None), getattr(inner, "eos_token", None)
    try:
        end = read_json(Path(tokenizer) / "tokenizer_config.json")["eos_token"]
        text = end["content"] if isinstance(end, dict) else end
        added = read_json(Path(tokenizer) / "tokenizer.json")["added_tokens"]
        return next((token["id"], text) for token in added if token["content"] == text)
    except (OSError, ValueError, LookupError, TypeError, AttributeError, StopIteration):
        return None, None  # of a form of its own


def _numbered(vocabulary: Any) -> Iterable[Any]:
    """The ids of a vocabulary: of most tokenizers a mapping, of Unigram's a list."""
    return vocabulary.values() if isinstance(vocabulary, dict) else range(len(vocabulary))


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
    names = [path.relative_to(scratch).as_posix() for path in scratch.rglob("*") if path.is_file()]
    if wrong := sorted(name for name in names if name in taken or _is_in_the_way(folder, name)):
        raise ValueError(
            f"tokenizer would write {wrong} over that of the model: give the tokenizer alone, or "
            "the folder that its save_pretrained wrote."
        )
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (scratch / name).replace(folder / name)
        sync_file(folder / name)
        sync_directory((folder / name).parent)
    shutil.rmtree(scratch)


def _is_in_the_way(folder: Path, name: str) -> bool:
    """Whether a folder has the name of this file, or a file that of its folder."""
    return (folder / name).is_dir() or any((folder / up).is_file() for up in Path(name).parents)
