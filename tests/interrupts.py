"""KeyboardInterrupts: at each bytecode in turn, and by real signals at random moments.

python -m tests.interrupts 10000 [folder]
"""

from __future__ import annotations

import collections
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType

import torch
from torch import nn

from tests.checkpoints import contents, leftovers, written
from ttfunc import init_deltas, load_peft, merge_checkpoint, save, save_peft, unmerge_checkpoint

NAME = "model.embed_tokens.weight"
A, B = [1, 2], [5, 6]  # the ids of two adapters, whose rows are full of the first of them


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


class Work:
    """What is interrupted, in a folder of its own, and what must hold after."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.model = nn.ModuleDict(
            {"model": nn.ModuleDict({"embed_tokens": nn.Embedding(200, 4)})}
        ).requires_grad_(False)
        self.params = [
            init_deltas(self.model, ids, init=torch.full((2, 4), float(ids[0]))) for ids in (A, B)
        ]
        self.turn = 0

    def act(self) -> None:
        raise NotImplementedError

    def state(self) -> str:
        """What is there: one of the names that may be, or AssertionError."""
        raise NotImplementedError

    def next(self) -> None:
        self.turn += 1


class SavePeft(Work):
    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.act()

    def act(self) -> None:
        save_peft(self.params[self.turn % 2], self.folder / "adapter")

    def state(self) -> str:
        return self.owner(load_peft(self.folder / "adapter", self.model))

    def owner(self, params) -> str:
        ids, values = params.token_indices[NAME].tolist(), params.deltas[NAME]
        assert ids in (A, B)
        assert (values == ids[0]).all(), f"mixed: rows {values[0, 0]} for the tokens {ids}"
        return "new" if ids == (A, B)[self.turn % 2] else "old"

    def litter(self) -> list[str]:
        return leftovers(self.folder / "adapter")


class Save(Work):
    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.act()
        self.turn += 1
        self.files = [(folder / "rows").read_bytes()]
        self.act()
        self.files.append((folder / "rows").read_bytes())
        self.turn += 1

    def act(self) -> None:
        save(self.params[self.turn % 2], self.folder / "rows")

    def state(self) -> str:
        found = self.files.index((self.folder / "rows").read_bytes())
        return "new" if found == self.turn % 2 else "old"

    def litter(self) -> list[str]:
        return leftovers(self.folder)


class Merge(Work):
    write = staticmethod(merge_checkpoint)

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.source = written(folder / "source", self.model.state_dict())
        (self.source / "deep").mkdir()
        (self.source / "deep" / "large.bin").write_bytes(bytes(2**16))
        if self.write is unmerge_checkpoint:
            merge_checkpoint(self.source, self.params[0], folder / "merged")
            self.source = folder / "merged"
        self.before = contents(self.source)
        self.act()
        self.whole = contents(self.folder / "out")
        shutil.rmtree(self.folder / "out")

    def act(self) -> None:
        self.write(self.source, self.params[0], self.folder / "out")

    def state(self) -> str:
        assert contents(self.source) == self.before, "the source was changed"
        if not (self.folder / "out").exists():
            return "old"
        assert contents(self.folder / "out") == self.whole, "half a destination"
        return "new"

    def litter(self) -> list[str]:
        return leftovers(self.folder)

    def next(self) -> None:
        if (self.folder / "out").exists():
            shutil.rmtree(self.folder / "out")


class Unmerge(Merge):
    write = staticmethod(unmerge_checkpoint)


KINDS: dict[str, type[Work]] = {
    "save_peft": SavePeft,
    "save": Save,
    "merge_checkpoint": Merge,
    "unmerge_checkpoint": Unmerge,
}


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
