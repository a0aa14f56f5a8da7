"""Settings of the suite; what the tests share is in helpers/."""

from __future__ import annotations

import os

# Read when torch and transformers are imported, here and in the processes that tests start: a test
# never reaches for a hub, and each of the processes, one for a core, computes in one thread.
os.environ.update({"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"})

import hypothesis
import pytest
import torch

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
