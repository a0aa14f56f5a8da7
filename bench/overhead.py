"""What `patch` and `functional_call` themselves cost, without the model: microseconds a call.

python -m bench.overhead [--rows 16] [--repeats 2000]
"""

from __future__ import annotations

import argparse
import statistics
import time
import types
from collections.abc import Callable
from typing import Any

import torch
import transformers

import ttfunc
from bench.report import print_table


def microseconds(call: Callable[[], object], repeats: int) -> float:
    """Median of one call."""
    taken = []
    for _ in range(repeats):
        start = time.perf_counter()
        call()
        taken.append(time.perf_counter() - start)
    return 1e6 * statistics.median(taken)


def costs(layers: int, rows: int, repeats: int) -> list[float]:
    """Of `patch`, its dense form, ttfunc's call and torch's, on a Llama of so many layers."""
    config = transformers.LlamaConfig(
        vocab_size=49_152,
        hidden_size=576,
        intermediate_size=8,
        num_hidden_layers=layers,
        num_attention_heads=9,
        tie_word_embeddings=True,
    )
    model: Any = transformers.LlamaForCausalLM(config).requires_grad_(False)
    # In the place of the model's work, so that little but what is around it is left: a call that
    # reads none of the matrix is an error.
    token = torch.tensor([0])
    model.forward = types.MethodType(lambda self: self.model.embed_tokens(token), model)
    params = ttfunc.init_deltas(model, range(rows), requires_grad=True)
    weights = ttfunc.patch(params)
    return [
        microseconds(lambda: ttfunc.patch(params), repeats),
        microseconds(lambda: ttfunc.functional_call(model, weights), repeats),
        microseconds(lambda: torch.func.functional_call(model, weights, ()), repeats),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n\n")[0])
    parser.add_argument("--rows", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=2000)
    options = parser.parse_args()
    lines = [
        [f"{layers} layers", *(f"{c:,.0f}" for c in costs(layers, options.rows, options.repeats))]
        for layers in (2, 30)
    ]
    columns = ["", "patch", "functional_call", "torch's own functional_call"]
    print_table(f"microseconds a call, {options.rows} rows", columns, lines)


if __name__ == "__main__":
    main()
