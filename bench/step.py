"""Time of a training step, forward and backward: all contestants interleaved, ratios of medians.

python -m bench.step [--vocabulary 128000] [--width 1024] [--layers 2] [--dtype float32]
"""

from __future__ import annotations

import functools
import gc
from collections.abc import Sequence

import torch

from bench.contestants import CONTESTANTS, LEAVE_THE_MODEL, Work, Wrap, as_it_is
from bench.memory import trim_heap
from bench.report import arguments, print_table
from bench.timing import in_turns

MEASURED_SECONDS = 10.0  # unless once is enough


def times(
    work: Work, names: Sequence[str], repeats: int, wrap: Wrap = as_it_is
) -> dict[str, float]:
    """Median seconds of a step; the contestants take turns, `repeats` times at least.

    Those that leave the model as it is share one, and each step begins with nothing in the heap:
    whose buffers find pages that another has left is luck, worth up to a tenth of a small step.
    """
    x, idx = work.text(), work.idx()
    shared = work.model()
    steps = {
        name: CONTESTANTS[name](shared if name in LEAVE_THE_MODEL else work.model(), x, idx, wrap)
        for name in names
    }
    for step in steps.values():  # to warm up
        step()
    gc.collect()
    at_least = MEASURED_SECONDS * (repeats > 1)
    return in_turns(steps, repeats, at_least=at_least, prepare=trim_heap, device=work.device)


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
