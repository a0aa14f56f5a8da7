"""What `patch` and `functional_call` themselves cost, without the model: microseconds a call.

python -m bench.overhead [--rows 16] [--repeats 2000]
"""

from __future__ import annotations

import argparse
import types
from collections.abc import Callable
from typing import Any

import torch
import transformers

import ttfunc
from bench.report import print_table
from bench.timing import in_turns


def seconds(layers: int, rows: int, repeats: int) -> dict[str, float]:
    """Of `patch`, ttfunc's call and torch's, on a Llama of so many layers."""
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
    calls: dict[str, Callable[[], object]] = {
        "patch": lambda: ttfunc.patch(params),
        "functional_call": lambda: ttfunc.functional_call(model, weights),
        "torch's own functional_call": lambda: torch.func.functional_call(model, weights, ()),
    }
    return in_turns(calls, repeats)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n\n")[0])
    parser.add_argument("--rows", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=2000)
    options = parser.parse_args()
    found = {layers: seconds(layers, options.rows, options.repeats) for layers in (2, 30)}
    columns = ["", *found[2]]
    lines = [
        [f"{layers} layers", *(f"{1e6 * s:,.0f}" for s in each.values())]
        for layers, each in found.items()
    ]
    print_table(f"microseconds a call, {options.rows} rows", columns, lines)


if __name__ == "__main__":
    main()
