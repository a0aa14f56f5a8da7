"""What is done to its end, whatever interrupts."""

from __future__ import annotations

import _thread
import time

import pytest

from tests.helpers.interrupts import at_each_bytecode, by_signals
from ttfunc.disk.atomic import to_the_end


def fail() -> None:
    raise ValueError("no")


def test_it_returns_and_raises_what_is_done():
    assert to_the_end(lambda: 3) == 3
    with pytest.raises(ValueError, match="^no$"):
        to_the_end(fail)


def test_it_is_done_once_and_whole_at_each_bytecode():
    done: list[str] = []

    def act() -> None:
        done.append("begun")
        done.append("ended")

    seen = set()
    for _ in at_each_bytecode(lambda: to_the_end(act)):
        time.sleep(0.001)  # where the interrupt was that of a start, which nobody waits for
        assert done in ([], ["begun", "ended"])
        seen.add(len(done))
        done.clear()
    assert seen == {0, 2}


@pytest.mark.parametrize("error", [None, OSError("full")])
def test_an_interrupt_is_raised_at_the_end(error):
    ended = []

    def slow() -> None:
        time.sleep(0.05)
        ended.append(True)
        if error:
            raise error

    for hit in by_signals(lambda: to_the_end(slow), iter([0.01])):
        assert hit
        assert ended


def test_without_threads(monkeypatch):
    def none(*_: object) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(_thread, "start_new_thread", none)
    assert to_the_end(lambda: 3) == 3
    with pytest.raises(ValueError, match="^no$"):
        to_the_end(fail)
