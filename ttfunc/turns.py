"""Calls that swap weights take turns, one thread after the other."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import nn

# One for all models: they may share modules, and a call on one may make a call on another.
_TURN = threading.RLock()
# For each call under way, all of one thread: the (module, attribute) that it has swapped.
_SWAPPED: list[set[tuple[nn.Module, str]]] = []


@contextmanager
def turn() -> Iterator[None]:
    """Wait until no other thread has weights swapped; one thread may nest turns."""
    if torch.compiler.is_dynamo_compiling():  # compiled code swaps nothing
        yield
        return
    with _TURN:
        yield


@contextmanager
def swapping(model: nn.Module, places: Iterable[tuple[nn.Module, str]]) -> Iterator[None]:
    """For the length of a call within a turn, note the places that it swaps.

    Raises RuntimeError where a call around this one has swapped others of `model`, with which this
    one would run.
    """
    places = set(places)
    if others := {place for outer in _SWAPPED for place in outer} - places:
        within = set(model.modules())
        if left := [(type(m).__name__, name) for m, name in others if m in within]:
            raise RuntimeError(
                f"a call inside a call: the outer one has swapped {left} of this "
                f"{type(model).__name__}, and the inner one does not say with what it is to run. "
                "Give it weights for the same matrices, patch(params) of untrained rows say."
            )
    _SWAPPED.append(places)
    try:
        yield
    finally:
        _SWAPPED.pop()
