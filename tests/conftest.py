"""Settings of the suite; what the tests share is in helpers/."""

from __future__ import annotations

import os

# Read when torch and transformers are imported, here and in the processes that tests start: a test
# never reaches for a hub, and each of the processes, one for a core, computes in one thread.
os.environ.update({"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"})

import importlib.metadata
import re
import tomllib
from pathlib import Path

import hypothesis
import pytest
import torch
from packaging.requirements import Requirement

pytest.register_assert_rewrite("tests.helpers")  # their failures show values, too

torch.set_num_threads(1)  # also where a plugin of pytest has imported it before

# The suite draws the same cases in every run, so that a change is red or green for what it changes.
# `pytest --hypothesis-profile=explore` draws new ones.
hypothesis.settings.register_profile("suite", deadline=None, print_blob=True, derandomize=True)
hypothesis.settings.register_profile("explore", deadline=None, print_blob=True)
hypothesis.settings.load_profile("suite")


torch.manual_seed(0)  # for what the test modules draw when they are imported


@pytest.fixture(autouse=True)
def seed() -> None:
    """Each test draws the same numbers, whichever run before it."""
    torch.manual_seed(0)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Expect the failures that versions.toml lists for the versions that are installed here."""
    known = tomllib.loads((Path(__file__).parent / "versions.toml").read_text())
    for requirement, reasons in known.items():
        wanted = Requirement(requirement)
        if not wanted.specifier.contains(importlib.metadata.version(wanted.name)):
            continue
        for reason, tests in reasons.items():
            expected = pytest.mark.xfail(reason=f"{requirement}: {reason}", strict=True)
            parts = "|".join(re.escape(test).replace(r"\*", ".*") for test in tests)
            pattern = re.compile(rf"tests/(?:{parts})(?:\[.*)?")
            for item in items:
                if pattern.fullmatch(item.nodeid):
                    item.add_marker(expected)
