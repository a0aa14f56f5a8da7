"""The tokenizer beside a merged checkpoint, so that a loader finds both in one folder."""

from __future__ import annotations

import contextlib
import importlib
import os
import secrets
import shutil
import warnings
from collections.abc import Callable, Collection, Iterable
from pathlib import Path
from reprlib import repr as shown
from typing import Any, NamedTuple

from ttfunc.disk.atomic import sync_directory, sync_file
from ttfunc.disk.header import read_json

# The files of a tokenizer that have the ids of its tokens, and how each file has these pairs.
_TOKENS: dict[str, Callable[[Any], Iterable[tuple[Any, Any]]]] = {
    "tokenizer.json": lambda said: [
        *_numbered(said["model"]["vocab"]),
        *((token.get("content"), token["id"]) for token in said["added_tokens"]),
    ],
    "tokenizer_config.json": lambda said: (
        (token.get("content"), int(i)) for i, token in said["added_tokens_decoder"].items()
    ),
    "added_tokens.json": lambda said: said.items(),
    "vocab.json": lambda said: said.items(),
}
# The files that say which token ends a text; transformers 4 wrote the second one as well.
_SPECIAL = ("tokenizer_config.json", "special_tokens_map.json")
# What reading raises for a file that is missing or has another form; loaders judge such a file.
_NOT_SAID = (OSError, ValueError, LookupError, TypeError, AttributeError)


class Vocabulary(NamedTuple):
    """The ids of a tokenizer's tokens, and the id that ends a text, as far as they are known.

    owner: how messages name the tokenizer.
    """

    owner: str
    ids: frozenset[int]
    end: int | None


def vocabulary_of(tokenizer: Any, root: Path) -> Vocabulary:
    """The vocabulary of a tokenizer, given or in its folder; without one, of that in `root`."""
    if tokenizer is None or isinstance(tokenizer, (str, os.PathLike)):
        return _vocabulary_in(root if tokenizer is None else Path(tokenizer))
    inner = getattr(tokenizer, "tokenizer", tokenizer)  # of a processor
    tokens: dict[Any, int] = getattr(inner, "get_vocab", dict)()
    end = getattr(inner, "eos_token_id", None)
    owner = f"this {type(tokenizer).__name__}"
    return Vocabulary(owner, frozenset(tokens.values()), end if isinstance(end, int) else None)


def warn_of_unknown(vocabulary: Vocabulary, new: Iterable[int]) -> None:
    """Warn where a tokenizer lacks these new tokens, unless its ids are not known."""
    ids = vocabulary.ids
    unknown = sorted({*new} - ids) if ids else []
    if unknown and unknown[-1] > max(ids):
        warnings.warn(
            f"{vocabulary.owner} does not have the new tokens {shown(unknown)}: no text becomes "
            "one of them. Give the tokenizer that they were added to: tokenizer=... (--tokenizer "
            "on the command line).",
            stacklevel=3,
        )


def warn_of_end(vocabulary: Vocabulary, root: Path, trained: Collection[int]) -> None:
    """Warn where a trained token ends a text, and the model in `root` would not stop there."""
    # transformers does not ask config.json where there is a generation_config.json.
    files = (name for name in ("generation_config.json", "config.json") if (root / name).is_file())
    name = next(files, None)
    if name is None or vocabulary.end not in trained:
        return
    try:
        ends = read_json(root / name).get("eos_token_id")
    except (ValueError, AttributeError):  # loaders decide on that
        return
    if vocabulary.end not in (ends if isinstance(ends, list) else [ends]):
        warnings.warn(
            f"{str(root / name)!r} has eos_token_id {shown(ends)}, and {vocabulary.owner} ends a "
            f"text with token {vocabulary.end}, at which the merged model would not stop: the copy "
            f"keeps the file. Write {vocabulary.end} into {name} of the copy, or give it to each "
            f"generate(eos_token_id={vocabulary.end}).",
            stacklevel=3,
        )


def warn_of_removed(vocabulary: Vocabulary, height: int) -> None:
    """Warn where a tokenizer has tokens past the end of a matrix that loses its new rows."""
    if removed := sorted(token for token in vocabulary.ids if token >= height):
        warnings.warn(
            f"{vocabulary.owner} has the tokens {shown(removed)}, for which the unmerged matrices "
            f"have no rows (they have {height}): a text with one of them would be an error. Give "
            "the tokenizer as it was before the new tokens: tokenizer=... (--tokenizer on the "
            "command line).",
            stacklevel=3,
        )


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


def tokenizer_in(folder: Path) -> Any:
    """The tokenizer of transformers that was saved in a folder; this never asks the hub.

    Raises FileNotFoundError where there is no folder, and ValueError where it has no tokenizer.
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
    except Exception as error:  # each class of tokenizer raises errors of its own
        raise ValueError(
            f"transformers cannot load a tokenizer from {str(folder)!r}: {error}"
        ) from error


def has_tokenizer(folder: Path) -> bool:
    """Whether a folder has one of the files of a tokenizer."""
    return any((folder / name).is_file() for name in _TOKENS)


def _vocabulary_in(folder: Path) -> Vocabulary:
    """The vocabulary of the tokenizer in a folder, as its files have it."""
    known: list[tuple[Any, int]] = []
    for name, tokens in _TOKENS.items():
        with contextlib.suppress(*_NOT_SAID):
            known += [(text, i) for text, i in tokens(read_json(folder / name)) if type(i) is int]
    end = None
    for name in _SPECIAL:
        with contextlib.suppress(*_NOT_SAID):
            end = end or read_json(folder / name)["eos_token"]
    end = end.get("content") if isinstance(end, dict) else end
    end_id = next((i for text, i in known if text == end), None) if end else None
    ids = frozenset(i for _, i in known)
    return Vocabulary(f"the tokenizer in {str(folder)!r}", ids, end_id)


def _numbered(vocabulary: Any) -> Iterable[tuple[Any, Any]]:
    """The tokens of a vocabulary with their ids: most have a mapping, and Unigram a list."""
    if isinstance(vocabulary, dict):
        return vocabulary.items()
    return ((token, i) for i, (token, _) in enumerate(vocabulary))


def save_tokenizer(tokenizer: Any, folder: Path, taken: Collection[str]) -> None:
    """Write a tokenizer's files into a folder, over files of the same names, and sync them.

    Raises ValueError for one that would write a file in `taken`, as a whole model does.
    """
    # Into a folder of its own first, since nobody knows before which files it will write.
    scratch = folder / f".ttfunc-{secrets.token_hex(8)}.tokenizer"
    if isinstance(tokenizer, (str, os.PathLike)):
        shutil.copytree(tokenizer, scratch)
    else:
        tokenizer.save_pretrained(scratch)
    names = [path.relative_to(scratch).as_posix() for path in scratch.rglob("*") if path.is_file()]
    if wrong := sorted(name for name in names if name in taken or _is_in_the_way(folder, name)):
        raise ValueError(
            f"tokenizer would write {wrong} over that of the model: give the tokenizer alone, or "
            "the folder that tokenizer.save_pretrained wrote."
        )
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (scratch / name).replace(folder / name)
        sync_file(folder / name)
        sync_directory((folder / name).parent)
    shutil.rmtree(scratch)


def _is_in_the_way(folder: Path, name: str) -> bool:
    """Whether a folder has the name of this file, or a file has the name of its folder."""
    return (folder / name).is_dir() or any((folder / up).is_file() for up in Path(name).parents)
