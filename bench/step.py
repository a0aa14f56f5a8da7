"""Time of a training step, forward and backward: all contestants interleaved, ratios of medians.

python -m bench.step [--vocabulary 128000] [--width 1024] [--layers 2] [--dtype float32]
"""

from __future__ import annotations

import functools
import gc
import statistics
import time
from collections.abc import Sequence

import torch

from bench.contestants import CALLERS, CONTESTANTS, Work, Wrap, as_it_is
from bench.memory import trim_heap
from bench.report import arguments, print_table

SECONDS = 10  # of measuring, unless once is enough


def times(
    work: Work, names: Sequence[str], repeats: int, wrap: Wrap = as_it_is
) -> dict[str, float]:
    """Median seconds of a step, the contestants taking turns for `SECONDS` and `repeats` at least.

    Those that leave the model as it is share one, and each step begins with nothing in the heap:
    whose buffers find pages that another has left is luck, worth up to a tenth of a small step.
    """
    x, idx = work.text(), work.idx()
    shared = work.model()
    steps = {
        name: CONTESTANTS[name](shared if name in CALLERS else work.model(), x, idx, wrap)
        for name in names
    }
    taken: dict[str, list[float]] = {name: [] for name in names}
    for step in steps.values():  # to warm up
        step()
    gc.collect()
    end = _now(work) + SECONDS * (repeats > 1)
    while len(taken[names[-1]]) < repeats or _now(work) < end:
        for name, step in steps.items():
            trim_heap()
            start = _now(work)
            step()
            taken[name].append(_now(work) - start)
    return {name: statistics.median(seconds) for name, seconds in taken.items()}


def _now(work: Work) -> float:
    if work.device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def main() -> None:
    work, options = arguments(__doc__ or "")
    names = [options.only] if options.only else list(CONTESTANTS)
    wrap: Wrap = as_it_is
    if options.compile:  # what it can make one graph of
        names, wrap = names[:3], functools.partial(torch.compile, fullgraph=True)
    found = times(work, names, options.repeats, wrap)
    floor = found.get("frozen floor", 1.0)
    print_table(
        f"a step on a tied {work}, {work.layers} layers, {work.tokens} tokens, {work.rows} rows"
        + (", compiled" if options.compile else ""),
        ["", "median, ms", "times the floor", "times ttfunc"],
        [
            [name, f"{1e3 * s:,.1f}", f"{s / floor:.2f}", f"{s / found.get('ttfunc', s):.2f}"]
            for name, s in found.items()
        ],
    )


if __name__ == "__main__":
    main()
