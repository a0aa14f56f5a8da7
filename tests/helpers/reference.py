"""Writes `ttfunc/REFERENCE.md` from the docstrings: python -m tests.helpers.reference

griffe reads them, and griffe2md renders each public name, in the order of the package's docstring.
Links between the names are made here, with the anchors that GitHub gives to headings.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import griffe
import griffe2md

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "ttfunc" / "REFERENCE.md"
_HEAD = """\
# Reference

All public names of ttfunc, by task. `python -m tests.helpers.reference` makes this page from the
docstrings, which `help(ttfunc.patch)` shows too: change those.

In all of it W is a token matrix, `(V, D)`: V tokens, D the width of the model. R are the k trained
rows, `(k, D)`, of the token ids S. *Deltas* are these rows themselves, not differences.
"""
_OPTIONS: Any = {"returns_named_value": False, "returns_multiple_items": False}
_CONFIG: Any = {
    "heading_level": 3,
    "inherited_members": False,
    "line_length": 88,
    "members_order": "source",
    "show_bases": False,
    "show_if_no_docstring": False,
    "show_object_full_path": False,
    "show_root_full_path": False,
    "show_root_members_full_path": False,
    "show_signature_annotations": True,
    "summary": False,
}


_FENCED = r"```pycon\n\g<0>\n```"
_OPAQUE = {"PatchedWeight"}  # its members are for ttfunc's own modules


class Task(NamedTuple):
    """A task of the package's docstring, and the names listed under it, with a line on each."""

    title: str
    names: dict[str, str]


def tasks(docstring: str) -> Iterator[Task]:
    """The tasks of the package's docstring, in its order."""
    for title, lines in re.findall(r"^(\w.*)\n((?:    \w+ {2,}.*\n)+)", docstring, re.M):
        yield Task(title, dict(re.findall(r"^    (\w+) +(.*)", lines, re.M)))


def package() -> Any:
    """What griffe reads in the sources of ttfunc. It logs what does not fit, such as parameters."""
    loader = griffe.GriffeLoader(
        docstring_parser=griffe.Parser.google,
        docstring_options=_OPTIONS,
        search_paths=[ROOT],
        allow_inspection=False,
    )
    read = loader.load("ttfunc")
    loader.resolve_aliases()
    return read


def reference() -> str:
    """The text of the page."""
    read = package()
    listed = list(tasks(read.docstring.value))
    kinds = {name: read[name].final_target for _, names in listed for name in names}
    headings = {name: f"{'class ' * one.is_class}`{name}`" for name, one in kinds.items()}
    parts = [_HEAD]
    for title, names in listed:
        parts += [f"- {title}", *(f"  - `{name}`: {line}" for name, line in names.items())]
    for title, names in listed:
        parts += [f"\n## {title}\n"]
        for name in names:
            text = re.sub(r"^#### `", f"#### `{name}.", _rendered(kinds[name]), flags=re.M)
            parts += [text.replace(f"### `{name}`", f"### {headings[name]}", 1)]
    text = _linked("\n".join(parts), headings)
    return re.sub(r"\n{3,}", "\n\n", text).rstrip() + "\n"


def documented(found: Any) -> list[Any]:
    """A function or a class, and the public members of the class that have a docstring."""
    members = found.members.values() if found.is_class and found.name not in _OPAQUE else ()
    return [found, *(one for one in members if one.is_public and one.docstring)]


def _rendered(found: Any) -> str:
    for one in documented(found):
        for section in one.docstring.parsed:
            if section.kind.value == "text":
                section.value = re.sub(r"^>>> .*(?:\n.+)*", _FENCED, section.value, flags=re.M)
                continue
            for item in section.value:
                item.description = " ".join(item.description.split())
                if section.kind.value in ("parameters", "attributes", "returns"):
                    item.annotation = None  # the signature has it
    members = False if found.name in _OPAQUE else None
    text = griffe2md.render_object_docs(found, {**_CONFIG, "members": members})
    text = re.sub(r"\[([^\s\]]+)\]\(#[\w.]+\)", r"\1", text)  # its links need anchors of its own
    text = re.sub(r"<code>\(?(.*?)\)?</code>", r"`\1`", text)
    text = text.replace("**Returns:**\n\n-  – ", "**Returns:** ")
    return text.replace(") -> None\n", ")\n", 1) if found.is_class else text


def _linked(text: str, headings: Mapping[str, str]) -> str:
    """The page with a link on each public name, but in code, headings and its own section."""
    lines, own, code = [], None, False

    def link(found: re.Match[str]) -> str:
        heading = headings.get(found[2])
        if heading is None or heading == own:
            return found[0]
        return f"[{found[0]}](#{heading.lower().replace(' ', '-').replace('`', '')})"

    for line in text.splitlines():
        own = line.removeprefix("### ").strip() if line.startswith("### ") else own
        code ^= line.startswith("```")
        if not (code or line.startswith("#")):
            line = re.sub(r"`(ttfunc\.)?(\w+)`", link, line)
        lines.append(line.rstrip())
    return "\n".join(lines)


if __name__ == "__main__":
    logging.basicConfig()
    PAGE.write_text(reference(), encoding="utf-8")
