"""The list of what fails with other versions of torch names tests that exist."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest

TESTS = Path(__file__).parent
LISTED = [
    test
    for reasons in tomllib.loads((TESTS / "versions.toml").read_text()).values()
    for tests in reasons.values()
    for test in tests
]


@pytest.mark.parametrize("listed", LISTED)
def test_each_listed_test_exists(listed: str):
    file, name = listed.split("::")
    function = name.split("[")[0]
    assert re.search(rf"^def {function}\(", (TESTS / file).read_text(), re.MULTILINE)


def test_none_is_listed_twice():
    assert len(set(LISTED)) == len(LISTED)
