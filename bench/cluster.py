"""On paper: what rows cost on many GPUs, in bytes, with models that are built on `meta`.

The formulas stand beside the figures; those that can be are checked against the tensors of the
model and of its rows. No figure here is measured on a cluster.

python -m bench.cluster [--rows 16]
"""

from __future__ import annotations

import argparse
from typing import Any

import torch
import transformers

import ttfunc
from bench.report import print_table

# Of the published configurations of Llama 3.1; head and embedding are two matrices.
MODELS = {"70B": (8192, 28_672, 80, 64), "405B": (16_384, 53_248, 126, 128)}
VOCABULARY, GPUS, BFLOAT16, FLOAT32 = 128_256, (8, 512), 2, 4


def model_on_meta(name: str) -> Any:
    width, inner, layers, heads = MODELS[name]
    config = transformers.LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=width,
        intermediate_size=inner,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=8,
        tie_word_embeddings=False,
        dtype=torch.bfloat16,
    )
    with torch.device("meta"):
        model: Any = transformers.LlamaForCausalLM(config)
    return model.to(torch.bfloat16).requires_grad_(False)


def costs(width: int, rows: int, gpus: int) -> dict[str, float]:
    """Bytes on one GPU, of a step in data parallelism over all; both ends have rows."""
    trained = 2 * rows * width * FLOAT32
    matrix = VOCABULARY * width * BFLOAT16
    return {
        "rows": trained,
        "Adam's state": 2 * trained,
        "sent in a step: rows": 2 * (gpus - 1) / gpus * trained,
        "sent in a step: gradients of both matrices": 2 * (gpus - 1) / gpus * 2 * matrix,
        "a matrix, sharded": matrix / gpus,
        "a matrix, gathered": matrix,
        "more at the peak, ttfunc": 0,
        "more at the peak, PEFT": 2 * matrix,
    }


FORMULAS = {
    "rows": "2·k·D·4",
    "Adam's state": "2 × rows",
    "sent in a step: rows": "2(n−1)/n × rows",
    "sent in a step: gradients of both matrices": "2(n−1)/n × 2·V·D·2",
    "a matrix, sharded": "V·D·2 / n",
    "a matrix, gathered": "V·D·2",
    "more at the peak, ttfunc": "0",
    "more at the peak, PEFT": "2·V·D·2 for an end at work: a copy and its gradient",
}


def check(name: str, rows: int) -> None:
    """Raise RuntimeError where the arithmetic is not that of the tensors."""
    model = model_on_meta(name)
    idx = list(range(VOCABULARY, VOCABULARY + rows))
    params = ttfunc.init_deltas(model, idx, grow=True)
    found = costs(MODELS[name][0], rows, 8)
    trained = sum(delta.nbytes for delta in params.deltas.values())
    state = [torch.empty_like(delta) for delta in params.deltas.values() for _ in range(2)]
    matrix = model.get_input_embeddings().weight.nbytes
    for what, truth in (
        ("rows", trained),
        ("Adam's state", sum(one.nbytes for one in state)),
        ("a matrix, gathered", matrix),
    ):
        if found[what] != truth:
            raise RuntimeError(f"{name}: {what} is {truth} bytes, and {found[what]} on paper")
    billions = sum(p.numel() for p in model.parameters()) / 1e9
    print(f"{name}: {billions:.1f} billion parameters on meta, {ttfunc.summary(model, params)}")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n\n")[0])
    parser.add_argument("--rows", type=int, default=16)
    rows = parser.parse_args().rows
    for name in MODELS:
        check(name, rows)
    each = {(m, n): costs(MODELS[m][0], rows, n) for m in MODELS for n in GPUS}
    lines = [
        [what, formula, *(f"{found[what] / 2**20:,.1f}" for found in each.values())]
        for what, formula in FORMULAS.items()
    ]
    columns = ["", "formula", *(f"{model}, {gpus} GPUs" for model, gpus in each)]
    print_table(f"MiB on a GPU, {rows} new tokens, bfloat16 model", columns, lines)


if __name__ == "__main__":
    main()
