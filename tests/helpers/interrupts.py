"""KeyboardInterrupts: at each bytecode in turn, and by real signals at random moments.

python -m tests.helpers.interrupts 10000 [folder]
"""

from __future__ import annotations

import collections
import json
import os
import random
import signal
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType

import torch

from tests.helpers.works import KINDS

# Where something may be half done: what only reads, or makes bytes, can be interrupted anywhere.
WRITERS = ("contextlib.py", "adapter.py", "writer.py", "atomic.py", "uninterrupted.py")


def at_each_bytecode(act: Callable[[], object]) -> Iterator[int]:
    """Runs `act` again and again, interrupted one bytecode of WRITERS later each time, to its end.

    A signal handler of Python runs between two bytecodes of the main thread, and so does this.
    """
    for number in range(1_000_000):
        left, before = number, sys.gettrace()

        def trace(frame: FrameType, event: str, argument: object):
            nonlocal left
            frame.f_trace_opcodes = frame.f_code.co_filename.endswith(WRITERS)
            if event == "opcode":
                left -= 1
                if left < 0:
                    sys.settrace(None)
                    raise KeyboardInterrupt
            return trace

        sys.settrace(trace)
        try:
            act()
        except KeyboardInterrupt:
            sys.settrace(before)
            yield number
        else:
            sys.settrace(before)
            return


def by_signals(act: Callable[[], object], delays: Iterator[float]) -> Iterator[bool]:
    """Runs `act` for each delay, after which a real signal raises; whether it was interrupted."""
    before = signal.signal(signal.SIGALRM, _interrupt)
    try:
        for delay in delays:
            try:
                signal.setitimer(signal.ITIMER_REAL, delay)
                act()
                signal.setitimer(signal.ITIMER_REAL, 0)
            except KeyboardInterrupt:
                yield True
            else:
                yield False
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def _interrupt(*_: object) -> None:
    raise KeyboardInterrupt


def main(count: int, place: str | None) -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    rng = random.Random(0)  # noqa: S311
    for kind, work in KINDS.items():
        outcomes: collections.Counter[str] = collections.Counter()
        with tempfile.TemporaryDirectory(dir=place) as name:
            one = work(Path(name))
            start = time.perf_counter()
            for _ in range(30):
                one.act()
                one.next()
            longest = 1.1 * (time.perf_counter() - start) / 30
            # Enough tries for `count` of them to be hit.
            delays = (rng.uniform(0, longest) for _ in iter(int, 1))
            for hit in by_signals(one.act, delays):
                outcomes["interrupted" if hit else "in time"] += 1
                outcomes[one.state()] += hit
                outcomes["litter"] += bool(one.litter())
                one.next()
                if outcomes["interrupted"] == count:
                    break
        print(json.dumps({kind: outcomes}), flush=True)


if __name__ == "__main__":
    os.environ["HF_HUB_OFFLINE"] = "1"
    main(int(sys.argv[1]), *sys.argv[2:], *[None] * (3 - len(sys.argv)))
