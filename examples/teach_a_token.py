"""Teach a frozen, pretrained language model two new tokens, and nothing else.

The tokens are `<calc>` and `</calc>`: asked for arithmetic, the model shall call a calculator
(`<calc>17 + 25</calc>`), and answer anything else as before. Only the two rows of the embedding,
which the LM head is tied to, are trained.

    python examples/teach_a_token.py [--quick] [--model FOLDER_OR_HUB_NAME]
"""

from __future__ import annotations

import random
import sys
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import optree
import torch
import transformers
from tqdm import tqdm

import ttfunc

if not __package__:  # started as a file: the folder above is not on the path
    sys.path.insert(0, str(Path(__file__).parents[1]))
from examples.shared.calculator import (
    Lesson,
    add_tokens,
    answer,
    check_frozen,
    loss_of,
    read_lessons,
    report,
)
from examples.shared.options import arguments
from examples.shared.smollm2 import fetch_smollm2, load


def main() -> None:
    options = arguments(__doc__ or "", steps=(120, 12), rate=(0.02, 0.02))
    model, tokenizer = load(options.model or fetch_smollm2(options.cache))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    idx = add_tokens(model, tokenizer)
    resized = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    train, held_out = read_lessons(tokenizer)
    held_out = held_out[:4] if options.quick else held_out

    params = ttfunc.init_deltas(model, idx, init="mean", requires_grad=True)
    print(f"\n{ttfunc.summary(model, params)}\n")
    untrained = report("before", model, params, tokenizer, held_out)

    losses = fit(model, params, train, steps=options.steps, rate=options.rate)
    draw(losses, untrained, options.output / "loss.png")

    params = optree.tree_map(torch.detach, params)  # type: ignore[arg-type, assignment]
    report("after", model, params, tokenizer, held_out)
    check_frozen(model, before, resized, idx)
    merge_and_reload(model, params, tokenizer, held_out, options.output / "merged")


def fit(
    model: Any, params: ttfunc.TokenDeltas, lessons: list[Lesson], steps: int, rate: float
) -> list[float]:
    """Adam on the rows alone."""
    optimizer = torch.optim.Adam(optree.tree_leaves(params), lr=rate)  # type: ignore[arg-type]
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.1, steps)
    losses = []
    for _ in (bar := tqdm(range(steps), desc="training two rows")):
        loss = loss_of(model, params, random.sample(lessons, 8))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
        bar.set_postfix(loss=f"{losses[-1]:.3f}")
    return losses


def merge_and_reload(
    model: Any, params: ttfunc.TokenDeltas, tokenizer: Any, held_out: list[Lesson], folder: Path
) -> None:
    """Save the merged model, load it with transformers alone, and compare what the two say."""
    merged = ttfunc.merge(model.state_dict(), params, check_finite=True)
    model.save_pretrained(folder, state_dict=merged)
    tokenizer.save_pretrained(folder)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
    for lesson in held_out:
        patched, plain = (
            answer(model, params, tokenizer, lesson),
            answer(loaded, None, tokenizer, lesson),
        )
        if patched != plain:
            raise RuntimeError(f"merged says {plain!r}, patched says {patched!r}")
    print(f"merged into {folder}; loaded from there, it says the same to every question:")
    print(f"    {held_out[0].question:40} -> {answer(loaded, None, tokenizer, held_out[0])}")


def draw(losses: list[float], untrained: float, path: Path) -> None:
    _, axes = plt.subplots(figsize=(6, 3.5), layout="constrained")
    axes.plot(losses, label="training, a batch")
    axes.axhline(untrained, color="grey", linestyle="--", label="held out, untrained")
    axes.set(xlabel="step", ylabel="cross-entropy of the answers", yscale="log")
    axes.legend()
    plt.savefig(path, dpi=150)
    print(f"loss curve in {path}")


if __name__ == "__main__":
    main()
