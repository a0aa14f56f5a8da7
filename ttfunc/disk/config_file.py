"""The sizes of a vocabulary in the text of a `config.json`, whose other bytes stay as they are.

So that an unmerge can give back each byte, a merge leaves a note where it must: one tab before the
colon of an entry that already had the new size, and two where it has added the entry. JSON gives
such white space no meaning.
"""

from __future__ import annotations

import json
import re
import warnings
from collections.abc import Mapping
from typing import NamedTuple

from ttfunc.model.sizes import USUAL, Entry

_HAD_IT, _ADDED = "\t", "\t\t"
_VALUE = json.JSONDecoder()
_TABS = re.compile("\t*")
_SPACE = re.compile(r"[ \t\r\n]*")


def kind_of(text: str) -> object:
    """The `model_type` in the text of a config; None where it has none."""
    try:
        config = json.loads(text)
    except ValueError:
        return None
    return config.get("model_type") if isinstance(config, dict) else None


def with_sizes(text: str, entries: Mapping[str, Entry] | None, by_value: Mapping[int, int]) -> str:
    """The text of a config with the new sizes in these entries, which it has by their paths.

    Where the entries are not known (None), each usual entry with an old size of `by_value` gets the
    new one.

    Warns where this is a guess, or where an unmerge could not give the bytes back. Raises
    ValueError where an entry has another value than in the model, or where it has no place.
    """
    if entries is None and sum(len(_usual(size).findall(text)) for size in by_value) > 1:
        warnings.warn(
            f"config.json has the size {[*by_value]} in several places, and all of them are "
            "changed, although one may be of another part of the model. Rows that load() has put "
            "on the model know which ones to change.",
            stacklevel=5,
        )
    changed = _changed(text, entries, by_value)
    back = None if entries is None else {path: entry.back for path, entry in entries.items()}
    if _changed(changed, back, {new: old for old, new in by_value.items()}) != text:
        warnings.warn(
            f"config.json has the sizes {[*by_value.values()]} in a form that cannot be given back "
            "to the byte. Keep this checkpoint.",
            stacklevel=5,
        )
    return changed


def _changed(text: str, entries: Mapping[str, Entry] | None, by_value: Mapping[int, int]) -> str:
    if entries is not None:
        done = set()
        for path, entry in entries.items():
            objects = _objects(text, path)
            # In an older form of the config, several paths may lead to one entry.
            found = (*path.split(".")[: len(objects) - 1], path.rpartition(".")[2])
            if found not in done:
                done.add(found)
                text = _with_entry(text, objects, path, entry)
        return text
    for old, new in by_value.items():
        had_it = new if new > old else old
        if new > old:
            text = _usual(new).sub(rf"\g<1>{_HAD_IT}\g<2>{had_it}", text)
        text = _usual(old).sub(rf"\g<1>\g<2>{new}", text)
        if new < old:
            text = _usual(old, note=True).sub(rf"\g<1>\g<2>{had_it}", text)
    return text


def _usual(size: int, note: bool = False) -> re.Pattern[str]:
    """A pattern of the usual entries that have this size.

    note: those with a note that they had it before the merge, and else those without it.
    """
    noted = r"\t(?!\t)" if note else r"(?!\t(?!\t))"
    return re.compile(rf'("(?:{"|".join(USUAL)})"){noted}(\s*:\s*){size}(?=\s*[,}}])')


class _Member(NamedTuple):
    """A member of an object in JSON: where its key ends, and where its value starts and ends."""

    key: int
    start: int
    end: int


def _objects(text: str, path: str) -> list[int]:
    """The positions at which the objects around the entry at a path begin, the outermost first.

    An older form of the config may have the entry further out, and then the inner ones are left
    out.
    """
    *outer, key = path.split(".")
    objects = [_after(text, 0)]
    for part in outer:
        inner = _members(text, objects[-1]).get(part)
        if inner is None or text[inner.start] != "{":
            break
        objects.append(inner.start)
    if len(objects) > len(outer):
        return objects
    while objects and key not in _members(text, objects[-1]):
        objects.pop()
    if not objects:
        raise ValueError(
            f"config.json has no place for {path!r}, the height of the matrix in the model that "
            "the rows were made from. Save that model with model.save_pretrained(folder), and "
            "merge into this folder."
        )
    return objects


def _with_entry(text: str, objects: list[int], path: str, entry: Entry) -> str:
    """The text with the new number in the innermost of the objects, where the entry may be new."""
    key = path.rpartition(".")[2]
    if member := _members(text, objects[-1]).get(key):
        return _with_number(text, objects[-1], member, path, entry)
    if entry.new == entry.start:
        return text
    # transformers leaves out an entry that has the default of its class.
    at = objects[-1] + 1
    comma = "" if text[_after(text, at)] == "}" else ","
    return f"{text[:at]}{json.dumps(key)}{_ADDED}:{entry.new}{comma}{text[at:]}"


def _with_number(text: str, begin: int, member: _Member, path: str, entry: Entry) -> str:
    """The text with the new number in a member of the object that begins at `begin`."""
    key, start, end = member
    found, note = json.loads(text[start:end]), _TABS.match(text, key)[0]  # type: ignore[index]
    if found not in (entry.old, entry.new):
        raise ValueError(
            f"config.json has {found!r} for {path!r}, and the model that the rows were made from "
            f"has {entry.old}. Use the folder of that model."
        )
    if found == entry.new:
        had_it = _HAD_IT if entry.new > entry.old and not note.startswith(_HAD_IT) else ""
        return f"{text[:key]}{had_it}{text[key:]}"
    if note == _HAD_IT and entry.new < entry.old:
        return f"{text[:key]}{text[key + len(note) :]}"
    if note == _ADDED and entry.new == entry.start:
        return text[: begin + 1] + text[end + text.startswith(",", end) :]
    return f"{text[:start]}{entry.new}{text[end:]}"


def _members(text: str, begin: int) -> dict[str, _Member]:
    """The members of the object that begins at `begin`, by their keys."""
    members: dict[str, _Member] = {}
    at = _after(text, begin + 1)
    while text[at] != "}":
        name, key = _VALUE.raw_decode(text, at)
        start = _after(text, _after(text, key) + 1)
        _, end = _VALUE.raw_decode(text, start)
        members[name] = _Member(key, start, end)
        at = _after(text, end)
        at = _after(text, at + 1) if text[at] == "," else at
    return members


def _after(text: str, at: int) -> int:
    """The position after the white space that begins at `at`."""
    return _SPACE.match(text, at).end()  # type: ignore[union-attr]
