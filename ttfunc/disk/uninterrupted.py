"""Doing something to its end, whatever interrupts.

Python runs signal handlers, and so raises KeyboardInterrupt, between any two bytecodes of the main
thread: within `finally` and `except` as well, so that no order of statements there is safe. What
must not be left half done is done in a thread of its own, where no handler runs.
"""

from __future__ import annotations

import _thread  # threading's own start holds locks of Python while it may be interrupted
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")


def to_the_end(act: Callable[[], T]) -> T:
    """`act()`, done once and whole; what interrupts meanwhile is raised when it has ended.

    So it should be short, and wait for nobody. Returns and raises what `act` does.
    """
    claim, ended = _thread.allocate_lock(), _thread.allocate_lock()
    outcome: list[tuple[Callable[[], T], BaseException | None]] = []

    def work() -> None:
        if not claim.acquire(blocking=False):  # it was started twice
            return
        try:
            result = act()
            outcome.append((lambda: result, None))
        except BaseException as error:
            outcome.append((act, error))
        ended.release()

    ended.acquire()
    interrupt: BaseException | None = None
    while not outcome:
        try:
            _thread.start_new_thread(work, ())
            while not outcome:
                # An interrupt may come when the lock is taken already: it is asked for once more.
                ended.acquire(timeout=0.1)
        except BaseException as error:
            if isinstance(error, RuntimeError) and claim.acquire(blocking=False):
                return act()  # no thread can be started here
            interrupt = error
    result, failure = outcome.pop()
    if interrupt is not None:
        raise interrupt from failure
    if failure is not None:
        raise failure
    return result()
