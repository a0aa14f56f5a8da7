"""What is written outlives an interrupt at any bytecode: old or new, and no litter."""

from __future__ import annotations

import pytest

from tests.helpers.interrupts import at_each_bytecode
from tests.helpers.works import KINDS


# Of a file that is open for one bytecode before `with` has it, and is closed all the same.
@pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning")
@pytest.mark.parametrize("kind", KINDS)
def test_an_interrupt_at_each_bytecode(kind: str, tmp_path):
    work, seen = KINDS[kind](tmp_path), set()
    for _ in at_each_bytecode(work.act):
        seen.add(work.state())
        assert not work.litter()
        work.next()
    assert work.state() == "new"
    assert seen == {"old", "new"}
