"""Patterns out of a file: what `re` says, in bounded time, or refused."""

from __future__ import annotations

import re

import pytest

from ttfunc.peft.rules import matching

NAMES = [
    "", "embed_tokens", "lm_head", "model.embed_tokens", "model.layers.0.mlp",
    "model.layers.17.mlp", "model_embed", "modelxembed_tokens", "a|b", "a.b", "a]b",
    "a-b", "ab\n", "aab", "ä", "{1}",
]  # fmt: skip


@pytest.mark.parametrize(
    "pattern",
    [
        "", "lm_head", r"model\.embed_tokens", r"model\.embed_tokens|lm_head", r"a\|b|lm_head",
        ".*embed_tokens", r".*\.(embed_tokens|lm_head)", r"(?:.*\.)?embed_tokens$", r"\|",
        r"^model\.layers\.\d+\.mlp$", r"model\.layers\.(0|1[0-9]|2)\.mlp", r"[a-z_.]+", r"[^.]*",
        r"a[]]b", r"a[^]]b", r"a[\]x*+-]b", "a+b", "a{2}b", "a{1,2}b", "a{,2}b", "a*?b",
        "(a|)b|a.b", "ab$", "ab$\n", "x^", "^$", r"\w+", r"\W*", r"\S+\s", "ä", ".*.*.*", r"\*\+",
    ],
)  # fmt: skip
def test_it_agrees_with_re(pattern: str):
    assert matching(pattern, NAMES) == [name for name in NAMES if re.fullmatch(pattern, name)]


@pytest.mark.parametrize(
    "pattern",
    [
        ".*" * 4 + "z", ".*" * 100 + "z", "(.*)*z", "(([a-z_.0-9]+)+)+!", "(a|a)*" * 30 + "z",
        "(a?)" * 30 + "z", "(((a?){9}){9})z", "(a|aa)(a|aa)(a|aa)(a|aa)z", "(?=a)b", "(?<!a)b",
        "(?i)a", "(?P<n>a)", "(?>a)b",
    ],
)  # fmt: skip
def test_what_might_keep_re_for_ever_is_refused(pattern: str):
    with pytest.raises(ValueError, match="may take for ever: .*Name the modules"):
        matching(pattern, NAMES)


@pytest.mark.parametrize("pattern", ["(", "a)", "[", "*", "a**", "(" * 10**5, "a{2,1}", "\\"])
def test_what_is_no_pattern(pattern: str):
    with pytest.raises(ValueError, match="is no pattern"):
        matching(pattern, NAMES)


def test_the_worst_that_is_allowed_ends():
    names = ["a" * 60 + "." + "model" * 8] * 400
    for pattern in (".*.*.*!", ".*a*(.|a)!", ".{0,99}.{0,99}.{0,99}!", "(.*|a*)!"):
        assert matching(pattern, names) == []


def test_any_number_of_escaped_names():
    names = [f"model.layers.{i}.embed-tokens" for i in range(5000)]
    assert matching("|".join(map(re.escape, names)), [*names, "model"]) == names
