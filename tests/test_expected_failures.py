"""The lists of what fails with other versions, and on other devices, name tests that exist."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest

TESTS = Path(__file__).parent
LISTS = {
    file: [
        test
        for reasons in tomllib.loads((TESTS / file).read_text()).values()
        for tests in reasons.values()
        for test in tests
    ]
    for file in ("versions.toml", "devices.toml")
}


@pytest.mark.parametrize("listed", sorted({test for tests in LISTS.values() for test in tests}))
def test_each_listed_test_exists(listed: str):
    file, _, name = listed.partition("::")
    function = name.split("[")[0]
    assert not name or re.search(rf"^def {function}\(", (TESTS / file).read_text(), re.MULTILINE)
    assert (TESTS / file).is_file()


@pytest.mark.parametrize("file", LISTS)
def test_none_is_listed_twice(file: str):
    assert len(set(LISTS[file])) == len(LISTS[file])
