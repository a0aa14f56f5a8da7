"""Running a function to its end, whatever interrupts.

Python runs signal handlers, and so raises KeyboardInterrupt, between any two bytecodes of the main
thread. This includes `finally` and `except`, so no order of statements there is safe. Work that
must not be left half done runs in a thread of its own, where no handler runs.
"""

from __future__ import annotations

import _thread  # threading's own start may be interrupted while it holds locks of Python
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")


def to_the_end(act: Callable[[], T]) -> T:
    """Run `act()` once and completely; an interrupt meanwhile is raised when it has ended.

    So `act` should be short, and should wait for nothing. Returns and raises what `act` does.
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
                # An interrupt may come when the lock is already taken: then ask for it again.
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
