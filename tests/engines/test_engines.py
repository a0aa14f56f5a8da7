"""The same call on every engine: ranks that are processes, under torchrun, against one process."""

from __future__ import annotations

import pytest

from tests.engines.launch import launch, wrong

RANKS = {
    "data_parallel": 2,
    "fsdp": 2,
    "fsdp_models": 2,
    "fsdp_uses": 2,
    "tensor_parallel": 2,
    "two_meshes": 4,
    "zero3": 2,
    "pipeline": 2,
    "trainers": 2,
    "wire": 2,
}


@pytest.mark.parametrize("engine", RANKS)
def test_every_recipe_is_right_or_refused(engine: str, tmp_path):
    found = launch(engine, RANKS[engine], tmp_path)
    assert found
    assert wrong(found) == {}
