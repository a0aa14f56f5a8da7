"""Law 9: what a feature promises it promises together with each other one."""

from __future__ import annotations

import hypothesis
import pytest
from hypothesis import strategies as st

from tests.engines.launch import launch, wrong
from tests.grid.cells import COMPILED, Cell, drawn, kinds
from tests.grid.outcomes import outcome


@hypothesis.settings(max_examples=1200)
@hypothesis.given(st.sampled_from(kinds()), st.integers(0, 2**16 - 1))
def test_a_cell_is_right_or_refused_for_a_known_reason(kind: Cell, seed: int):
    cell = Cell(**{**vars(kind), "seed": seed})
    assert not outcome(cell).startswith("wrong"), f"python -m tests.grid --cell {cell}"


@pytest.mark.parametrize("way", COMPILED)
def test_cells_that_are_compiled(way: str):
    found = {str(cell): outcome(cell) for cell in drawn(6, 0, [way])}
    assert {name: one for name, one in found.items() if one.startswith("wrong")} == {}


def test_cells_on_two_ranks(tmp_path):
    cells = drawn(40, 0, ["fsdp2"])
    found = launch("grid", 2, tmp_path, *map(str, cells))
    assert len(found) == len(cells)
    assert wrong(found) == {}


def test_a_cell_is_what_it_prints():
    for cell in drawn(20, 0):
        assert Cell.parse(str(cell)) == cell
