"""What is killed at random moments and lines, in forks of this process, which has no threads.

python -m tests.helpers.kills 1000 [merge_checkpoint | save_peft]
"""

from __future__ import annotations

import collections
import json
import math
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from fnmatch import fnmatch
from pathlib import Path
from types import FrameType

import torch
from torch import nn

import ttfunc
from tests.helpers.checkpoints import contents, leftovers, written
from tests.helpers.rows import random_rows
from tests.helpers.works import SavePeft
from ttfunc.disk.checkpoint import merge_checkpoint

TTFUNC = str(Path(ttfunc.__file__).parent)


def forked(act: Callable[[], object]) -> int:
    """The process that does `act` and ends."""
    child = os.fork()
    if not child:
        code = 1
        try:
            act()
            code = 0
        finally:
            os._exit(code)
    return child


def ended(child: int) -> None:
    """A process that was killed, or that had done all it had to before."""
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == 0, "it failed"


def killed_after(act: Callable[[], object], delay: float) -> None:
    """In a fork, killed after `delay` seconds."""
    child = forked(act)
    time.sleep(delay)
    os.kill(child, signal.SIGKILL)  # a child that has ended waits for its parent to notice
    ended(child)


def lines_of(act: Callable[[], object], last: float = math.inf) -> list[tuple[str, int]]:
    """The lines of ttfunc that `act` runs, in order; at the `last`th the process is killed."""
    lines = []

    def trace(frame: FrameType, event: str, _argument: object) -> Callable | None:
        if not frame.f_code.co_filename.startswith(TTFUNC):
            return None
        if event == "line":
            lines.append((frame.f_code.co_filename, frame.f_lineno))
        if len(lines) >= last:
            os.kill(os.getpid(), signal.SIGKILL)
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        act()
    finally:
        sys.settrace(before)
    return lines


def times_of_lines(act: Callable[[], object]) -> list[list[int]]:
    """For each line of ttfunc that `act` runs: at which numbers it runs, counted over all lines."""
    times = collections.defaultdict(list)
    for number, line in enumerate(lines_of(act), 1):
        times[line].append(number)
    return list(times.values())


def killed_at_line(act: Callable[[], object], line: int) -> None:
    """In a fork that kills itself: how far it came does not depend on the machine."""
    ended(forked(lambda: lines_of(act, line)))


def stage(folder: Path, destination: Path, merged: dict[str, bytes]) -> str:
    """How far the killed run came, by what it left."""
    if destination.exists():
        assert contents(destination) == merged, "half a destination"
        assert not leftovers(folder)
        return "after"
    left = leftovers(folder)
    assert len(left) <= 1
    if not left:
        return "before"
    assert fnmatch(left[0], ".merged.ttfunc-*.partial")
    found = contents(folder / left[0])
    if found == merged:
        return "complete"
    sizes = {name: len(raw) for name, raw in found.items()}
    last = max(name for name, raw in merged.items() if raw != b"folder")
    return "writing" if sizes.get(last) == len(merged[last]) else "copying"


def adapter_stage(directory: Path, work: SavePeft) -> str:
    """Which adapter a killed save left: the old one, the new one, or none, and never two halves."""
    if not (directory / "adapter_config.json").exists():
        return "none"
    return work.owner(ttfunc.load_peft(directory, work.model))


def adapters(count: int) -> None:
    torch.set_num_threads(1)
    rng, outcomes = random.Random(0), collections.Counter()  # noqa: S311
    with tempfile.TemporaryDirectory() as name:
        work = SavePeft(Path(name))
        start = time.perf_counter()
        for _ in range(10):
            killed_after(work.act, 0.1)
        longest = 1.2 * ((time.perf_counter() - start) / 10 - 0.1) + 0.01
        times = times_of_lines(work.act)
        for number in range(count):
            if number % 2:
                killed_at_line(work.act, rng.choice(rng.choice(times)))
            else:
                killed_after(work.act, rng.uniform(0, longest))
            outcomes[adapter_stage(work.folder / "adapter", work)] += 1
            for left in work.litter():
                (work.folder / "adapter" / left).unlink()
            if rng.random() < 0.1:  # the next save is not disturbed by what is left
                work.act()
                assert work.state() == "new"
            work.next()
    print(json.dumps(outcomes))


def main(count: int) -> None:
    torch.set_num_threads(1)
    rng, outcomes = random.Random(0), collections.Counter()  # noqa: S311
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model = nn.ModuleDict({"model": nn.ModuleDict({"embed_tokens": nn.Embedding(2000, 16)})})
        params = random_rows(model, range(0, 2000, 2))
        source = written(folder / "source", model.state_dict())
        (source / "deep").mkdir()
        (source / "deep" / "large.bin").write_bytes(bytes(2**19))
        before, destination = contents(source), folder / "merged"

        def act() -> None:
            merge_checkpoint(source, params, destination)

        start = time.perf_counter()
        act()
        longest = 1.5 * (time.perf_counter() - start)
        merged = contents(destination)
        shutil.rmtree(destination)
        times = times_of_lines(act)
        shutil.rmtree(destination)
        for number in range(count):
            if number % 2:
                killed_at_line(act, rng.choice(rng.choice(times)))
            else:
                killed_after(act, rng.uniform(0, longest))
            outcomes[stage(folder, destination, merged)] += 1
            assert contents(source) == before, "the source was changed"
            if destination.exists():
                shutil.rmtree(destination)
            if rng.random() < 0.1:  # the next run is not disturbed by what is left
                act()
                assert contents(destination) == merged
                shutil.rmtree(destination)
            for left in leftovers(folder):
                shutil.rmtree(folder / left)
    print(json.dumps(outcomes))


if __name__ == "__main__":
    run = adapters if sys.argv[2:] == ["save_peft"] else main
    run(int(sys.argv[1]))
