"""Putting a PEFT adapter into a directory, in place of the one that was there.

An adapter is two files, and no file system replaces two at once. A directory without the config
holds no adapter. So the old config is removed first, and the new one is put there last: a process
that is killed in between leaves no adapter, never a mixed one. An interrupt or an error leaves the
old adapter or the new one. The model card goes along.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import secrets
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ttfunc.disk.atomic import replacement, sync_directory, to_the_end
from ttfunc.disk.tensors import opened
from ttfunc.peft.adapter import CONFIG, INDICES, PICKLE, SUFFIX, WEIGHTS, read_json

try:
    import fcntl
except ImportError:  # not on Windows
    fcntl = None  # type: ignore[assignment]

README = "README.md"
_PAUSE = 0.01  # seconds between two tries at a directory while another thread or process writes

# What may be the name of a repository on the hub; the hub refuses a card with a path instead.
_REPOSITORY = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?", re.ASCII)


def write_adapter(directory: Path, weights: bytes, config: Mapping[str, Any]) -> None:
    """Make the directory, or replace the adapter in it; on failure it is as it was.

    A card is written too, but over no other than the one that the last adapter was given. Waits
    while another thread or process saves there.

    Raises:
        FileExistsError: it has what would be lost, or is no directory.
        OSError: it cannot be written.
    """
    text = json.dumps(config, indent=2, sort_keys=True).encode()
    files = {README: card_of(config), WEIGHTS: weights, CONFIG: text}  # the config comes last
    while not to_the_end(lambda: _written(directory, files)):
        time.sleep(_PAUSE)  # here, where it can be interrupted


def _written(directory: Path, files: Mapping[str, bytes]) -> bool:
    """Write the adapter. Returns whether it did; False while another writer is at work there."""
    if directory.exists() and not directory.is_dir():
        raise FileExistsError(f"{str(directory)!r} is a file. Name a directory for the adapter.")
    made = not directory.exists()
    directory.mkdir(parents=True, exist_ok=True)
    try:
        with _locked(directory) as alone:
            if alone:
                _check_replaceable(directory)
                own = _has_own_card(directory)
                _replace({directory / n: b for n, b in files.items() if own or n != README})
    except BaseException:
        if made:
            with contextlib.suppress(OSError):  # something else was put there
                directory.rmdir()
        raise
    return alone


@contextlib.contextmanager
def _locked(directory: Path) -> Iterator[bool]:
    """Whether no other writer is at work there, nor begins meanwhile; on Windows nobody knows."""
    if fcntl is None:
        yield True
        return
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        yield _lock(descriptor, directory)
    finally:
        os.close(descriptor)  # this also releases the lock


def _lock(descriptor: int, directory: Path) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    # Another writer that failed may have removed the directory that it had made.
    there = directory.stat() if directory.exists() else None
    return there is not None and os.path.samestat(os.fstat(descriptor), there)


def _replace(files: dict[Path, bytes]) -> None:
    """Put these files there in their order; what was there is put aside before, in reverse."""
    directory = next(iter(files)).parent
    with contextlib.ExitStack() as stack:
        new = {path: stack.enter_context(replacement(path, data)) for path, data in files.items()}
        aside: dict[Path, Path | None] = {}  # where the old files are meanwhile
        try:
            for path in reversed(files):
                aside[path] = _set_aside(path)
            sync_directory(directory)  # so a loss of power leaves no old file beside a new one
            for path, file in new.items():
                file.replace(path)
            sync_directory(directory)
        except BaseException:
            for path in aside:
                path.unlink(missing_ok=True)
            for path, old in reversed(aside.items()):
                if old is not None:
                    old.rename(path)
            raise
        for old in filter(None, aside.values()):
            old.unlink()


def _has_own_card(directory: Path) -> bool:
    """Whether a card may be written: there is none, or the one of the adapter that is there."""
    card = directory / README
    if not os.path.lexists(card):
        return True
    if card.is_symlink() or not card.is_file() or not (directory / CONFIG).exists():
        return False
    return card.read_bytes() == card_of(read_json(directory / CONFIG))


def _set_aside(path: Path) -> Path | None:
    if not os.path.lexists(path):
        return None
    return path.rename(path.with_name(f".ttfunc-{secrets.token_hex(8)}.old"))


def _check_replaceable(directory: Path) -> None:
    """Raises FileExistsError if more than token rows would be lost.

    A partial adapter that an interrupted save has left counts as token rows too, or as nothing.
    """
    for name in (CONFIG, WEIGHTS):
        if (directory / name).exists() and not (directory / name).is_file():
            raise FileExistsError(
                f"{str(directory / name)!r} is no regular file, and is not replaced. Remove it, or "
                "choose another directory."
            )
    try:
        alone = _is_of_rows(directory)
    except ValueError as error:
        raise FileExistsError(
            f"{str(directory)!r} has an adapter that cannot be read, and would be lost: {error} "
            "Remove it, or choose another directory."
        ) from None
    if not alone:
        raise FileExistsError(
            f"{str(directory)!r} has an adapter that is not of token rows alone, and would be "
            "lost. Choose another directory."
        )


def _is_of_rows(directory: Path) -> bool:
    if (directory / CONFIG).exists():
        config = read_json(directory / CONFIG)
        kind = config.get("peft_type")
        if not isinstance(kind, str) or config.get(INDICES.get(kind, "")) is None:
            return False
    if not (directory / WEIGHTS).exists():
        return not (directory / PICKLE).exists()
    with opened(directory / WEIGHTS) as file:
        return all(key.endswith(tuple(SUFFIX.values())) for key in file.keys())  # noqa: SIM118


def card_of(config: Mapping[str, Any]) -> bytes:
    """The card of the adapter that has this config: the same for the same config."""
    base = config.get("base_model_name_or_path")
    known = isinstance(base, str) and _REPOSITORY.fullmatch(base) is not None
    is_lora = config.get("peft_type") == "LORA"
    head = [f"base_model: {json.dumps(base)}"] if known else []
    tags = [*["lora"] * is_lora, "ttfunc", *[f"base_model:adapter:{base}"] * known]
    lines = ["---", *head, "library_name: peft", "tags:", *(f"- {json.dumps(tag)}" for tag in tags)]
    model = json.dumps(base) if known else "the folder or the name of the base model"
    text = _AS_LORA if is_lora and config.get(INDICES["LORA"]) is None else _ROWS
    return "\n".join([*lines, "---", "", text.format(model=model)]).encode()


_LOAD = """
```python
from peft import PeftModel
from transformers import AutoModelForCausalLM

base = AutoModelForCausalLM.from_pretrained({model})
model = PeftModel.from_pretrained(base, "the folder or the name of this adapter")
```
"""

_ROWS = f"""# Trained tokens

This adapter has trained rows of the base model's token matrices. `adapter_config.json` says of
which tokens.
{_LOAD}
`ttfunc.load_peft` reads the rows too.
"""

_AS_LORA = f"""# Trained tokens, as a LoRA

This adapter has trained rows of the base model's token matrices in the form of a LoRA. Keep it
beside the base. If the base ties its head to its embedding, `merge_and_unload` adds both parts to
the one matrix, and the result is wrong: merge the rows themselves (`ttfunc.merge_checkpoint`).
{_LOAD}"""
