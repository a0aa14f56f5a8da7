"""Patterns out of a file: what `re` says, in bounded time, or refused."""

from __future__ import annotations

import re
import warnings

import hypothesis
import pytest
from hypothesis import strategies as st

from ttfunc.pattern import MOST, matching

NAMES = [
    "", "embed_tokens", "lm_head", "model.embed_tokens", "model.layers.0.mlp",
    "model.layers.17.mlp", "model_embed", "modelxembed_tokens", "a|b", "a.b", "a]b",
    "a-b", "ab\n", "aab", "ä", "{1}",
]  # fmt: skip


@pytest.mark.parametrize(
    "pattern",
    [
        "", "lm_head", r"model\.embed_tokens", r"model\.embed_tokens|lm_head", r"a\|b|lm_head",
        ".*embed_tokens", r".*\.(embed_tokens|lm_head)", r"(?:.*\.)?embed_tokens$",
        r"^model\.layers\.\d+\.mlp$", r"model\.layers\.(0|1[0-9]|2)\.mlp", r"[a-z_.]+", r"[^.]*",
        r"a[]]b", r"a[^]]b", r"a[\]x-]b", "a+b", "a{2}b", "a{1,2}b", "a{,2}b", "a{3,}b", "a*?b",
        "(a|)b|a.b", "(a*)*b", "(a|aa)+b", "(a?){20}b\n?", "ab$", "ab$\n", "x^", "^$", "(^|.)ab\n",
        r"\w+", r"\W*", r"\S+\s", "ä", ".*.*.*.*", "((a))+b\\\n", "a{1}a{1}b",
    ],
)  # fmt: skip
def test_it_agrees_with_re(pattern: str):
    assert matching(pattern, NAMES) == [name for name in NAMES if re.fullmatch(pattern, name)]


ATOMS = st.sampled_from(["a", "b", ".", r"\.", r"\w", "[ab]", "[^a]", "^", "$", r"[\].]", r"\|"])
TIMES = st.sampled_from(["", "", "", "*", "+", "?", "*?", "{2}", "{1,2}", "{,2}", "{2,}"])
PATTERNS = st.recursive(
    st.tuples(ATOMS, TIMES).map("".join),
    lambda inner: st.one_of(
        st.tuples(inner, inner).map("".join),
        st.tuples(inner, inner).map("|".join),
        st.tuples(inner, TIMES).map(lambda both: f"({both[0]}){both[1]}"),
        st.tuples(inner, TIMES).map(lambda both: f"(?:{both[0]}){both[1]}"),
    ),
    max_leaves=6,
)


@hypothesis.given(PATTERNS, st.lists(st.text("ab.\n|]", max_size=6), max_size=4))
@hypothesis.settings(max_examples=500)
def test_any_pattern_agrees_with_re(pattern: str, names: list[str]):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            compiled = re.compile(pattern)
        except re.error:  # such as a repeated anchor
            with pytest.raises(ValueError, match="is no pattern"):
                matching(pattern, names)
        else:
            expected = [name for name in names if compiled.fullmatch(name)]
            assert matching(pattern, names) == expected


@pytest.mark.parametrize(
    "pattern",
    [
        ".*" * 100 + "z", "(.*)*z", "(([a-z_.0-9]+)+)+!", "(a|a)*" * 30 + "z", "(a*)*" * 20 + "z",
        "(((a?){9}){9})z", "(" * 50 + "a" + "*)" * 50 + "z",
    ],
)  # fmt: skip
def test_what_would_keep_re_for_ever(pattern: str):
    names = ["a" * 200 + "." + "model" * 20] * 20
    assert matching(pattern, names) == []


@pytest.mark.parametrize(
    "pattern",
    [
        r"(a)\1", "(?=a)b", "(?<!a)b", "(?i)a", "(?P<n>a)", "(?>a*)b", "a*+b", r"\bab", r"\x61",
        "a{5000}", "(a{99}){99}", "." * (MOST + 1), r"\Aa", "a{b}",
    ],
)  # fmt: skip
def test_what_is_more_than_can_be_followed(pattern: str):
    with pytest.raises(ValueError, match="may take for ever, or too long a one: name the modules"):
        matching(pattern, NAMES)


@pytest.mark.parametrize("pattern", ["(", "a)", "[", "*", "a**", "(" * 10**5, "a{2,1}", "\\"])
def test_what_is_no_pattern(pattern: str):
    with pytest.raises(ValueError, match="is no pattern"):
        matching(pattern, NAMES)


def test_any_number_of_escaped_names():
    names = [f"model.layers.{i}.embed-tokens" for i in range(5000)]
    assert matching("|".join(map(re.escape, names)), [*names, "model"]) == names
