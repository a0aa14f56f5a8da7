"""The names of a TokenModule's parameters, and of the entries of its state dict."""

from __future__ import annotations


def key(part: str, name: str) -> str:
    """The name of a parameter, which must have no dot. (The escapes are those of RFC 6901.)"""
    escaped = name.replace("~", "~0").replace("/", "~1")
    return f"{part}/{escaped.replace('.', '/')}"


def name_in(entry: str, part: str) -> str | None:
    """The name that `key` has made an entry of; None for an entry of another part."""
    first, _, rest = entry.partition("/")
    if first != part or not rest or "." in rest:
        return None
    return rest.replace("/", ".").replace("~1", "/").replace("~0", "~")
