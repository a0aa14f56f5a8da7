"""The names of a TokenModule's parameters, and of the entries of its state dict."""

from __future__ import annotations


def key(kind: str, name: str) -> str:
    """The entry of this kind for a name. It has no dot, which a parameter's name must not have.

    >>> key("deltas", "model.embed_tokens.weight")
    'deltas/model/embed_tokens/weight'
    """
    escaped = name.replace("~", "~0").replace("/", "~1")  # as RFC 6901 does
    return f"{kind}/{escaped.replace('.', '/')}"


def name_in(entry: str, kind: str) -> str | None:
    """The name that `key` has made this entry of; None for an entry of another kind."""
    first, _, rest = entry.partition("/")
    if first != kind or not rest or "." in rest:
        return None
    return rest.replace("/", ".").replace("~1", "/").replace("~0", "~")
