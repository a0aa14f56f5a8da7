"""Calls that a signal interrupts at random moments, and a fork during a call.

python -m tests.helpers.interrupted_calls 100000
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import threading
import time
from collections import Counter

import torch

from tests.helpers.models import make, tokens
from tests.helpers.oracle import snapshot
from ttfunc import functional_call, init_deltas, patch

X = tokens(7, 3)


def interrupted(count: int) -> Counter[str]:
    """`count` interrupts of a call, each at a random moment of it.

    The model is its own after each of them, by identity and by bits, and so is what it gives.
    """
    rng, outcomes = random.Random(0), Counter()  # noqa: S311
    model = make("tied").requires_grad_(False)
    params = init_deltas(model, [7, 3], init="mean")
    weights, before, plain = patch(params), snapshot(model), model(X)
    patched = functional_call(model, weights, (X,))
    own = [dict(vars(module)) for module in model.modules()]
    start = time.perf_counter()
    for _ in range(100):
        functional_call(model, patch(params), (X,))
    longest = 1.2 * (time.perf_counter() - start) / 100

    def check(whole: bool) -> None:
        for module, attributes in zip(model.modules(), own, strict=True):
            assert all(vars(module)[name] is one for name, one in attributes.items())
        assert model.embed_tokens.weight is model.lm_head.weight
        if whole:
            assert snapshot(model) == before
            assert torch.equal(model(X), plain)
            assert torch.equal(functional_call(model, weights, (X,)), patched)

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    signal.signal(signal.SIGALRM, stop)
    while outcomes["interrupted"] < count:
        try:
            signal.setitimer(signal.ITIMER_REAL, rng.uniform(1e-6, longest))
            functional_call(model, patch(params), (X,))
            signal.setitimer(signal.ITIMER_REAL, 0)
            outcomes["whole"] += 1
        except KeyboardInterrupt:
            outcomes["interrupted"] += 1
        check(whole=outcomes["interrupted"] % 100 == 0)
    check(whole=True)
    return outcomes


def fork() -> None:
    """A child that is forked during a call of another thread calls as its parent does."""
    model = make("tied").requires_grad_(False)
    inside, leave = threading.Event(), threading.Event()
    params = init_deltas(model, [7, 3], init="mean")
    x = tokens(7, 3, batch=64, length=512)  # enough for torch to share the work among threads
    expected = functional_call(model, patch(params), (x,))

    def wait(*_: object) -> None:
        if threading.current_thread() is thread:
            inside.set()
            leave.wait(60)

    model.body.register_forward_hook(wait)
    thread = threading.Thread(target=lambda: functional_call(model, patch(params), (x,)))
    thread.start()
    inside.wait(60)
    child = os.fork()
    if not child:
        signal.alarm(30)
        code = 1
        try:
            code = int(not torch.equal(functional_call(model, patch(params), (x,)), expected))
        finally:
            os._exit(code)
    _, status = os.waitpid(child, 0)
    leave.set()
    thread.join()
    assert status == 0, "the child's call waited, or was wrong"


if __name__ == "__main__":
    # A forked child has none of the threads of torch's pool, and would wait for them.
    torch.set_num_threads(1)
    if sys.argv[1] == "fork":
        fork()
    else:
        print(json.dumps(interrupted(int(sys.argv[1]))))
