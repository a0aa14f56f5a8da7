"""The reference is made from the docstrings as they are now, and they fit the signatures."""

from __future__ import annotations

import logging
import re

import pytest

import ttfunc
from tests.helpers.reference import PAGE, documented, package, reference


@pytest.fixture(scope="module")
def read():
    return package()


def test_the_page_is_current_and_the_same_in_each_run(caplog):
    with caplog.at_level(logging.DEBUG, logger="griffe"):
        text = reference()
    told = [one.getMessage() for one in caplog.records if one.levelno >= logging.WARNING]
    assert told == []  # parameters that are not there, sections that cannot be read
    assert text == reference()
    again = "run python -m tests.helpers.reference"
    assert PAGE.read_text(encoding="utf-8") == text, again


def test_the_page_has_all_public_names_and_no_private_ones():
    headings = re.findall(r"^#{3,4} (?:class )?`([\w.]+)`$", PAGE.read_text("utf-8"), re.M)
    assert [name for name in headings if "." not in name] == ttfunc.__all__
    assert not [name for name in headings if "_" in (name[0], name.rpartition(".")[2][0])]
    assert "TokenModule.to" not in headings  # nn.Module's
    assert {"TokenModule.params", "Exportable.inputs", "TokenDeltas.tied"} <= set(headings)


@pytest.mark.parametrize("name", ttfunc.__all__)
def test_the_docstring_names_each_parameter_and_no_other(read, name: str):
    for one in documented(read[name].final_target):
        sections = {section.kind.value: section.value for section in one.docstring.parsed}
        summary = one.docstring.value.splitlines()[0]
        assert summary.endswith(".")
        if "parameters" not in sections:
            continue
        told = [item.name.lstrip("*") for item in sections["parameters"]]
        assert told == [item.name for item in one.parameters if item.name != "self"]


def test_what_takes_arguments_says_so(read):
    """Methods of a class that only pass on what the model takes say nothing of it."""
    for name in ttfunc.__all__:
        found = read[name].final_target
        if found.is_function:
            kinds = {section.kind.value for section in found.docstring.parsed}
            assert {"parameters", "raises"} <= kinds, name
            assert found.annotation == "None" or "returns" in kinds, name
