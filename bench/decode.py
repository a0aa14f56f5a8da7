"""Tokens per second of greedy decoding: the merged model, ttfunc's patch and PEFT, interleaved.

python -m bench.decode [--new 32] [--repeats 5]
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

import peft
import torch
import transformers
from torch import Tensor

import ttfunc
from bench.report import print_table
from bench.timing import agreeing
from examples.shared.smollm2 import fetch_smollm2, load


def contestants(new: int) -> dict[str, Callable[[], Tensor]]:
    """Each generates the same text from SmolLM2-135M with the same two rows replaced."""
    model, tokenizer = load(fetch_smollm2())
    prompt = tokenizer("The capital of France is", return_tensors="pt")["input_ids"]
    idx = prompt[0, 1:3].tolist()
    generator = torch.Generator().manual_seed(0)
    params = ttfunc.init_deltas(model, idx, init="normal", generator=generator)
    (rows,) = params.deltas.values()
    options = {
        "input_ids": prompt,
        "max_new_tokens": new,
        "min_new_tokens": new,
        "do_sample": False,
        "pad_token_id": tokenizer.eos_token_id,
    }
    plain = transformers.AutoModelForCausalLM.from_config(model.config).eval()
    merged: Any = plain.requires_grad_(False)
    merged.load_state_dict(ttfunc.merge(model.state_dict(), params))
    wrapped: Any = transformers.AutoModelForCausalLM.from_config(model.config).eval()
    wrapped.load_state_dict(model.state_dict())
    wrapped = peft.get_peft_model(wrapped, peft.TrainableTokensConfig(token_indices=idx)).eval()
    for name, parameter in wrapped.named_parameters():
        if "trainable_tokens_delta" in name:
            parameter.data.copy_(rows)

    def patched() -> Tensor:
        weights = ttfunc.patch(params)
        out: Tensor = ttfunc.functional_call(model, weights, kwargs=options, method="generate")
        return out

    def of(model: Any) -> Callable[[], Tensor]:
        return lambda: model.generate(**options)

    return {"merged": of(merged), "ttfunc": patched, "PEFT": of(wrapped)}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n\n")[0])
    parser.add_argument("--new", type=int, default=32, help="tokens to decode")
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    transformers.logging.set_verbosity_error()
    with torch.no_grad():
        seconds = agreeing(contestants(options.new), options.repeats)
    print_table(
        f"greedy decoding of {options.new} tokens, SmolLM2-135M in float32, 2 rows",
        ["", "tokens per second", "of the merged model"],
        [[n, f"{options.new / s:.1f}", f"{seconds['merged'] / s:.3f}"] for n, s in seconds.items()],
    )


if __name__ == "__main__":
    main()
