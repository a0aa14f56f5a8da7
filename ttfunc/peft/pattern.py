"""Regular expressions out of a file, matched in bounded time.

`re` backtracks: a pattern of thirty characters can take for ever. Each choice in a pattern
multiplies the time by the length of a name, so only a few choices are allowed.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

# For n characters, three repeats take some n³ / 6 steps: a few milliseconds for the longest name.
MOST = 3

_LITERAL = re.compile(r"(?:\\\W|[^\\.^$*+?{}\[\]()])*", re.S)
_ESCAPE_OR_CLASS = re.compile(r"\\.|\[\^?\]?(?:\\.|[^\]\\])*\]", re.S)
_CHOICE = re.compile(r"[*+{|]|(?<!\()\?")
_BEYOND = re.compile(r"\)[*+{]|\(\?[^:]")  # groups that repeat, look around, or change flags


def matching(pattern: str, names: Iterable[str]) -> list[str]:
    """The `names` that `pattern` matches as a whole, as with `re.fullmatch`.

    Raises ValueError for an invalid pattern, for a group that repeats, for looking around, and for
    more than MOST repeats and alternatives. (Alternatives of escaped names may be any number.)
    """
    if _LITERAL.fullmatch(pattern):  # as PEFT and save_peft write them
        wanted = {re.sub(r"\\(\W)", r"\1", one) for one in pattern.split("|")}
        if r"\|" not in pattern:
            return [name for name in names if name in wanted]
    try:
        compiled = re.compile(pattern)
    except (re.error, RecursionError, OverflowError) as error:
        raise ValueError(f"{pattern!r} is no pattern: {error}") from None
    bare = _ESCAPE_OR_CLASS.sub("x", pattern)
    if _BEYOND.search(bare) or len(_CHOICE.findall(bare)) > MOST:
        raise ValueError(
            f"{pattern!r} is a pattern that may take for ever: it repeats a group, looks around, "
            f"or has more than {MOST} repeats and alternatives. Name the modules"
        )
    return [name for name in names if compiled.fullmatch(name)]
