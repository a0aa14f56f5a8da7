"""Calls timed side by side: every figure in seconds that a bench prints comes from here."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping

import torch
from torch import Tensor


def seconds_of(call: Callable[[], object], device: str = "cpu") -> float:
    """Of one call, to the end of what it starts on the device."""
    start = _now(device)
    call()
    return _now(device) - start


def _now(device: str) -> float:
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def in_turns(
    calls: Mapping[str, Callable[[], object]],
    repeats: int,
    *,
    at_least: float = 0.0,
    prepare: Callable[[], object] = lambda: None,
    device: str = "cpu",
) -> dict[str, float]:
    """Median seconds of each call, the calls taking turns.

    There are `repeats` rounds, and more until `at_least` seconds are over. Each round begins with
    another call. `prepare` runs before each call and is not timed.
    """
    taken: dict[str, list[float]] = {name: [] for name in calls}
    names, end = list(calls), time.perf_counter() + at_least
    rounds = 0
    while rounds < repeats or time.perf_counter() < end:
        for name in names:
            prepare()
            taken[name].append(seconds_of(calls[name], device))
        names.append(names.pop(0))
        rounds += 1
    return {name: statistics.median(seconds) for name, seconds in taken.items()}


def agreeing(calls: Mapping[str, Callable[[], Tensor]], repeats: int) -> dict[str, float]:
    """`in_turns` for calls that give the same. Raises AssertionError where they do not."""
    expected, *others = [call() for call in calls.values()]
    close = 1e-3 * expected.is_floating_point()  # tokens are to be equal
    for found in others:
        torch.testing.assert_close(found, expected, rtol=close, atol=close)
    return in_turns(calls, repeats)
