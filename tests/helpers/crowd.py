"""Threads that call one model at once with rows of their own, some of them compiling over and over.

python -m tests.helpers.crowd 100000
"""

from __future__ import annotations

import json
import sys
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import torch

from tests.helpers.models import make, tokens
from tests.helpers.oracle import edited, snapshot
from tests.helpers.rows import adapters
from ttfunc import TokenDeltas, functional_call, patch

X = tokens(7, 3)


def crowd(calls: int, threads: int = 10, compiling: int = 2) -> Counter[str]:
    """So many calls of eager threads, and what compiled ones do meanwhile; raises for a wrong one.

    A wrong call is one whose logits are not those of the model with the rows written into it.
    """
    torch.set_num_threads(1)
    model = make("tied").requires_grad_(False)
    before = snapshot(model)
    each = adapters(model, *[[7, 3]] * threads)
    expected = [edited(model, params)(X) for params in each]
    counts: list[Counter[str]] = [Counter() for _ in each]

    def call(params: TokenDeltas) -> torch.Tensor:
        return functional_call(model, patch(params), (X,))

    def check(number: int, found: torch.Tensor, kind: str) -> None:
        torch.testing.assert_close(found, expected[number])
        counts[number][kind] += 1

    def eager(number: int) -> None:
        for _ in range(calls // (threads - compiling)):
            check(number, call(each[number]), "eager")

    def compiled(number: int) -> None:
        while not all(done.done() for done in running):
            # Nothing that was compiled is kept: a new function is another to torch.compile.
            function = torch.compile(lambda params: call(params), backend="eager")
            counts[number]["compilations"] += 1
            for _ in range(100):
                check(number, function(each[number]), "compiled")

    with ThreadPoolExecutor(threads) as pool:
        running = [pool.submit(eager, number) for number in range(compiling, threads)]
        others = [pool.submit(compiled, number) for number in range(compiling)]
        for one in (*running, *others):
            one.result()
    assert snapshot(model) == before
    return sum(counts, Counter())


if __name__ == "__main__":
    print(json.dumps(crowd(int(sys.argv[1]))))
