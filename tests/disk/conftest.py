"""A checkpoint, and a file of rows."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import transformers

import tests.helpers.checkpoints as checkpoints
from tests.helpers.llama import llama
from tests.helpers.models import make
from tests.helpers.rows import random_rows
from tests.helpers.rows_files import IDX
from tests.helpers.tokenizers import tokenizer
from ttfunc import TokenDeltas, save


@pytest.fixture(autouse=True)
def quiet():
    transformers.utils.logging.disable_progress_bar()


@pytest.fixture
def tied(tmp_path) -> tuple[Path, TokenDeltas]:
    """The folder of a tied Llama, and rows for it."""
    model = llama()
    return checkpoints.saved(model, tmp_path / "source"), random_rows(model)


@pytest.fixture
def saved(tmp_path) -> Path:
    """A file of rows of a tied toy."""
    save(random_rows(make("tied"), IDX), tmp_path / "rows.safetensors")
    return tmp_path / "rows.safetensors"


@pytest.fixture
def lesson(tmp_path):
    """A model and its tokenizer in a folder, the tokenizer with new tokens, and their rows."""
    before = tokenizer("byte-level BPE")
    model = llama(vocabulary=len(before))
    model.save_pretrained(tmp_path / "model")
    before.save_pretrained(tmp_path / "model")
    after = copy.deepcopy(before)
    new = ["<call>", "</call>"]
    after.add_tokens(new, special_tokens=True)
    params = random_rows(model, after.convert_tokens_to_ids(new), grow=True)
    return model, before, after, params
