"""Below the floor: what a step of token training need not do, on SmolLM2-135M.

A text is a prompt that the loss does not read, then an answer with the trained tokens. In a causal
model the prompt's keys and values then depend on no trained row, and none of its logits is read:

- whole: the plain step, as a training loop is written.
- logits kept: the head at the answer's positions alone (transformers' `logits_to_keep`).
- logits deferred: the plain step with `patch(params, deferred_logits=True)`.
- prompt without grad: the prompt through the model under `no_grad`, its keys and values kept; then
  the answer.
- prompt kept: the same, and the keys and values are kept from step to step.

All give the same loss and the same gradient, which is checked before anything is timed.

python -m bench.below [--prompt 96] [--answer 32] [--repeats 9] [--quick]
"""

from __future__ import annotations

import argparse
import copy
import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import ttfunc
from bench.report import print_table
from bench.timing import in_turns
from examples.shared.smollm2 import fetch_smollm2, load

Loss = Callable[[ttfunc.TokenDeltas], Tensor]


def losses(model: Any, prompt: Tensor, answer: Tensor) -> dict[str, Loss]:
    """Each way to the mean loss of an `(n, l)` answer after an `(n, p)` prompt."""
    text = torch.cat([prompt, answer], dim=1)
    start = prompt.shape[1]

    def call(params: ttfunc.TokenDeltas, ids: Tensor, waits: bool = False, **options: Any) -> Any:
        weights = ttfunc.patch(params, deferred_logits=waits)
        return ttfunc.functional_call(model, weights, kwargs={"input_ids": ids, **options})

    def of(logits: Tensor) -> Tensor:
        return F.cross_entropy(logits.flatten(0, 1).float(), answer.flatten())

    def whole(params: ttfunc.TokenDeltas) -> Tensor:
        return of(call(params, text, use_cache=False).logits[:, start - 1 : -1])

    def logits_kept(params: ttfunc.TokenDeltas) -> Tensor:
        kept = answer.shape[1] + 1
        return of(call(params, text, use_cache=False, logits_to_keep=kept).logits[:, :-1])

    def deferred(params: ttfunc.TokenDeltas) -> Tensor:
        logits = call(params, text, waits=True, use_cache=False).logits
        return of(logits[:, start - 1 : -1])

    def prefilled() -> Any:
        # No row is read before the first trained token, so the model itself will do. The last
        # token of the prompt stays: its logits are the answer's first.
        with torch.no_grad():
            return model(prompt[:, :-1], use_cache=True, logits_to_keep=1).past_key_values

    def after(params: ttfunc.TokenDeltas, cache: Any) -> Tensor:
        ids = text[:, start - 1 :]
        return of(call(params, ids, past_key_values=cache, use_cache=True).logits[:, :-1])

    kept = prefilled()
    return {
        "whole": whole,
        "logits kept": logits_kept,
        "logits deferred": deferred,
        "prompt without grad": lambda params: after(params, prefilled()),
        "prompt kept": lambda params: after(params, copy.deepcopy(kept)),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n\n")[0])
    parser.add_argument("--prompt", type=int, default=96)
    parser.add_argument("--answer", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--quick", action="store_true", help="a short text")
    options = parser.parse_args()
    if options.quick:
        options.prompt, options.answer, options.repeats = 12, 4, 1
    model, _ = load(fetch_smollm2())
    torch.manual_seed(0)
    idx = [100, 200, 300, 400]
    prompt = torch.randint(1000, 40_000, (1, options.prompt))
    answer = torch.randint(1000, 40_000, (1, options.answer))
    answer[0, ::4] = torch.tensor(idx).repeat(options.answer)[: len(answer[0, ::4])]
    params = ttfunc.init_deltas(model, idx, init="mean", requires_grad=True)
    (rows,) = params.deltas.values()

    ways = losses(model, prompt, answer)

    def step(loss: Callable[[ttfunc.TokenDeltas], Tensor]) -> Tensor:
        (gradient,) = torch.autograd.grad(loss(params), rows)
        return gradient

    truth = step(ways["whole"])
    for name, loss in ways.items():
        found = step(loss)
        if not torch.allclose(found, truth, rtol=1e-3, atol=1e-5 * float(truth.abs().max())):
            raise RuntimeError(f"{name}: the gradient differs by {(found - truth).abs().max()}")
    medians = in_turns(
        {name: functools.partial(step, loss) for name, loss in ways.items()}, options.repeats
    )
    print_table(
        f"a step of SmolLM2-135M, {options.prompt} tokens of prompt, {options.answer} of answer",
        ["", "median, ms", "times the whole"],
        [[n, f"{1e3 * s:,.0f}", f"{s / medians['whole']:.2f}"] for n, s in medians.items()],
    )


if __name__ == "__main__":
    main()
