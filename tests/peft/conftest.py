"""An adapter on disk."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.helpers.peft_reference import IDX, toy
from tests.helpers.rows import random_rows
from ttfunc import save_peft

HERE = Path(__file__).parent


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """PEFT's default is the input embedding alone, also of an untied model: it is meant here."""
    for item in items:
        if item.path.is_relative_to(HERE):
            item.add_marker(pytest.mark.filterwarnings("ignore:rows of .* alone are trained"))


@pytest.fixture
def saved(tmp_path) -> Path:
    save_peft(random_rows(toy("llama_tied"), IDX), tmp_path / "adapter")
    return tmp_path / "adapter"
