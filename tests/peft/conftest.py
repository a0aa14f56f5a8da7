"""An adapter on disk."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.helpers.peft_reference import IDX, toy
from tests.helpers.rows import random_rows
from ttfunc import save_peft


@pytest.fixture
def saved(tmp_path) -> Path:
    save_peft(random_rows(toy("llama_tied"), IDX), tmp_path / "adapter")
    return tmp_path / "adapter"
