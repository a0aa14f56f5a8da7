"""Regular expressions out of a file, matched in bounded time.

`re` backtracks: a pattern of thirty characters can keep it for ever. So a pattern is read here, as
far as it is regular in the strict sense, into an automaton that follows all ways at once. A single
character is left to `re`, which cannot backtrack there.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import TypeAlias

# The states that a pattern may have: each step costs as many at most.
MOST = 500

_ATOM = re.compile(r"\\[dDsSwW]|\\[^0-9A-Za-z]|\[\^?\]?(?:\\.|[^\]\\])*\]|[^\\\[\](){}*+?|]", re.S)
_TIMES = re.compile(r"([*+?]|\{(\d{1,4}),?(\d{0,4})\}|\{,(\d{1,4})\})(\??)(?![*+?{])")
_LITERAL = re.compile(r"(?:\\\W|[^\\.^$*+?{}\[\]()])*", re.S)

Set: TypeAlias = "frozenset[int]"


def matching(pattern: str, names: Iterable[str]) -> list[str]:
    """Those of `names` that `re.fullmatch` finds `pattern` in, in time linear in their length.

    Raises ValueError for what is no pattern, or is more than an automaton can follow: references
    back, looking ahead or behind, flags, possessive repeats, more than MOST states.
    """
    if _LITERAL.fullmatch(pattern):  # escaped names, as PEFT and save_peft write them
        wanted = _alternatives(pattern)
        return [name for name in names if name in wanted]
    try:
        re.compile(pattern)
    except (re.error, RecursionError, OverflowError) as error:
        raise ValueError(f"{pattern!r} is no pattern: {error}") from None
    automaton = _Automaton()
    try:
        rest, ends = automaton.choice(pattern, 0, [0])
    except (_Beyond, RecursionError):
        rest, ends = -1, []
    if rest != len(pattern):
        raise ValueError(
            f"{pattern!r} is a pattern that may take for ever, or too long a one: name the modules"
        )
    return [name for name in names if automaton.matches(name, ends)]


def _alternatives(pattern: str) -> set[str]:
    found = [""]
    for piece in re.findall(r"\\\W|.", pattern, re.S):
        if piece == "|":
            found.append("")
        else:
            found[-1] += piece[-1]
    return set(found)


class _Beyond(Exception):  # noqa: N818 (never leaves this module)
    """What no automaton of this kind can follow."""


@dataclass
class _Automaton:
    """States by number: 0 is the start. free: ways that take no character, on a condition."""

    free: list[list[tuple[str, int]]] = field(default_factory=lambda: [[]])
    steps: list[list[tuple[re.Pattern[str], int]]] = field(default_factory=lambda: [[]])
    known: dict[tuple[Set, str], Set] = field(default_factory=dict)
    spread: dict[tuple[Set, bool, bool], Set] = field(default_factory=dict)

    def choice(self, text: str, at: int, begins: list[int]) -> tuple[int, list[int]]:
        """Adds `a|b|…` of `text` from `at` on; where it stopped, and the states that end it."""
        ends = []
        while True:
            at, new = self.sequence(text, at, begins)
            ends += new
            if text[at : at + 1] != "|":
                return at, ends
            at += 1

    def sequence(self, text: str, at: int, begins: list[int]) -> tuple[int, list[int]]:
        """Adds what comes up to a `|` or a bracket that closes."""
        while at < len(text) and text[at] not in "|)":
            after = self.extent(text, at)
            least, most, end = _times(text, after)
            for count in range(least if most is None else most):
                ends = self.part(text, at, begins)
                # From here on the rest may be left out.
                begins = ends if count + 1 <= least else [*begins, *ends]
            if most is None:
                begins = self.loop(text, at, begins)
            at = end
        return at, begins

    def loop(self, text: str, at: int, begins: list[int]) -> list[int]:
        """Adds a part that may come any number of times."""
        again = self.state(begins)
        for end in self.part(text, at, [again]):
            self.free[end].append(("", again))
        return [again]

    def state(self, begins: list[int], condition: str = "") -> int:
        """A new one, which can be had from each of `begins` without a character."""
        if len(self.free) >= MOST:
            raise _Beyond
        self.free.append([])
        self.steps.append([])
        for begin in begins:
            self.free[begin].append((condition, len(self.free) - 1))
        return len(self.free) - 1

    def part(self, text: str, at: int, begins: list[int]) -> list[int]:
        """Adds a character, an anchor or a group."""
        if text[at] in "^$":
            return [self.state(begins, text[at])]
        begin = self.state(begins)
        if text[at] == "(":
            inside = at + 3 if text.startswith("(?:", at) else at + 1
            return [self.state(self.choice(text, inside, [begin])[1])]
        found = _ATOM.match(text, at)
        if found is None:
            raise _Beyond
        end = self.state([])
        self.steps[begin].append((re.compile(found[0]), end))
        return [end]

    def extent(self, text: str, at: int) -> int:
        """Where the part that begins at `at` ends."""
        if text[at] != "(":
            found = _ATOM.match(text, at)
            if found is None:
                raise _Beyond
            return found.end()
        if text.startswith("(?", at) and text[at + 2 : at + 3] != ":":
            raise _Beyond
        depth = 0
        for piece, end in _pieces(text, at):
            depth += (piece == "(") - (piece == ")")
            if not depth:
                return end
        raise _Beyond

    def matches(self, name: str, ends: list[int]) -> bool:
        """Whether the whole name leads to one of `ends`."""
        states = self.closed(frozenset([0]), name, 0)
        for place, character in enumerate(name):
            states = self.closed(self.step(states, character), name, place + 1)
            if not states:
                return False
        return not states.isdisjoint(ends)

    def step(self, states: Set, character: str) -> Set:
        """The states after a character; kept, as names have beginnings in common."""
        if (states, character) not in self.known:
            ways = (way for state in states for way in self.steps[state])
            after = frozenset(end for one, end in ways if one.fullmatch(character))
            self.known[states, character] = after
        return self.known[states, character]

    def closed(self, states: Set, name: str, place: int) -> Set:
        """All that can be had from `states` without a character."""
        last = place == len(name) or (place == len(name) - 1 and name[place] == "\n")
        key = states, place == 0, last
        if key not in self.spread:
            self.spread[key] = self.reached(states, {"": True, "^": place == 0, "$": last})
        return self.spread[key]

    def reached(self, states: Set, holds: dict[str, bool]) -> Set:
        found, pending = set(states), list(states)
        while pending:
            for condition, state in self.free[pending.pop()]:
                if holds[condition] and state not in found:
                    found.add(state)
                    pending.append(state)
        return frozenset(found)


def _pieces(text: str, at: int) -> Iterator[tuple[str, int]]:
    """Brackets, and what may have one in it, as one token each; with its end."""
    while at < len(text):
        found = _ATOM.match(text, at)
        end = found.end() if found else at + 1
        if text[at] == "\\" and found is None:
            raise _Beyond
        yield text[at:end], end
        at = end


def _times(text: str, at: int) -> tuple[int, int | None, int]:
    """How often what ends at `at` is repeated, at least and at most, and where that is said."""
    if at == len(text) or text[at] not in "*+?{":
        return 1, 1, at
    found = _TIMES.match(text, at)
    if found is None:
        raise _Beyond
    sign, least, most, only, _ = found.groups()
    if sign in "*+?":
        return int(sign == "+"), 1 if sign == "?" else None, found.end()
    if only is not None:
        return 0, int(only), found.end()
    return int(least), int(most) if most else None if "," in sign else int(least), found.end()
