"""Calls that swap weights of the same modules take turns."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from weakref import WeakKeyDictionary

from torch import nn

_LOCKS: WeakKeyDictionary[nn.Module, threading.RLock] = WeakKeyDictionary()
_MAKING = threading.Lock()


@contextmanager
def turn(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Wait until no other thread swaps weights of these modules; one thread may nest calls."""
    distinct = {id(module): module for module in modules}
    with _MAKING:
        # In one order for all threads, so that no two wait for each other.
        locks = [_LOCKS.setdefault(distinct[key], threading.RLock()) for key in sorted(distinct)]
    with ExitStack() as held:
        for lock in locks:
            held.enter_context(lock)
        yield
