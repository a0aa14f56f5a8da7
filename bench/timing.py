"""Calls timed side by side, taking turns."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping

import torch
from torch import Tensor


def in_turns(calls: Mapping[str, Callable[[], object]], repeats: int) -> dict[str, float]:
    """Median seconds of each."""
    taken: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(repeats):
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            taken[name].append(time.perf_counter() - start)
    return {name: statistics.median(seconds) for name, seconds in taken.items()}


def agreeing(calls: Mapping[str, Callable[[], Tensor]], repeats: int) -> dict[str, float]:
    """`in_turns` for calls that give the same. Raises AssertionError where they do not."""
    expected, *others = [call() for call in calls.values()]
    close = 1e-3 * expected.is_floating_point()  # tokens are to be equal
    for found in others:
        torch.testing.assert_close(found, expected, rtol=close, atol=close)
    return in_turns(calls, repeats)
