"""Settings of the suite; the models are in models.py, the reference in oracle.py."""

from __future__ import annotations

import os

# A test never reaches for a hub.
os.environ["HF_HUB_OFFLINE"] = "1"

import hypothesis
import pytest
import torch

torch.set_num_threads(1)

hypothesis.settings.register_profile("default", deadline=None, print_blob=True)
hypothesis.settings.load_profile("default")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--full", action="store_true", help="test every architecture of transformers")
