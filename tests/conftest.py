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


def pytest_addoption(parser: pytest.Parser) -> None:
    told = "where tests make tensors: cuda, or pretend (tests/helpers/pretend_device.py)"
    parser.addoption("--device", default="cpu", help=told)


def pytest_configure(config: pytest.Config) -> None:
    """Make tensors on a device where a test does not name one, from its import on."""
    device = config.getoption("device")
    if device == "pretend":
        from tests.helpers import pretend_device

        pretend_device.register()
    if device != "cpu":
        torch.set_default_device(device)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Expect the failures that are listed for the installed versions, and for the device."""
    for requirement, reasons in _listed("versions.toml").items():
        wanted = Requirement(requirement)
        if wanted.specifier.contains(importlib.metadata.version(wanted.name)):
            _expect(items, reasons, requirement, strict=True)
    device = config.getoption("device")
    for named, reasons in _listed("devices.toml").items():
        if device != "cpu" and named in ("*", device):
            _expect(items, reasons, f"--device {device}", strict=False)


def _listed(file: str) -> dict[str, dict[str, list[str]]]:
    return tomllib.loads((Path(__file__).parent / file).read_text())


def _expect(
    items: list[pytest.Item], reasons: dict[str, list[str]], cause: str, *, strict: bool
) -> None:
    """Expect tests to fail: by file, by name, or by one case of it, with * for any text."""
    for reason, tests in reasons.items():
        expected = pytest.mark.xfail(reason=f"{cause}: {reason}", strict=strict)
        parts = "|".join(re.escape(test).replace(r"\*", ".*") for test in tests)
        pattern = re.compile(rf"tests/(?:{parts})(?:\[.*|::.*)?")
        for item in items:
            if pattern.fullmatch(item.nodeid):
                item.add_marker(expected)
