"""Teach a frozen, pretrained language model two new tokens, and nothing else.

The tokens are `<calc>` and `</calc>`: asked for arithmetic, the model shall call a calculator
(`<calc>17 + 25</calc>`), and answer anything else as before. Only the two rows of the embedding,
which the LM head is tied to, are trained.

    python examples/teach_a_token.py [--quick] [--model FOLDER_OR_HUB_NAME]
"""

from __future__ import annotations

import random
import shutil
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
    digests,
    loss_of,
    read_lessons,
    report,
)
from examples.shared.options import arguments
from examples.shared.smollm2 import folder_of, load


def main() -> None:
    options = arguments(__doc__ or "", steps=(120, 12), rate=(0.02, 0.02))
    folder = folder_of(options.model, options.cache)
    model, tokenizer = load(folder)
    before = digests(model)
    idx, start = add_tokens(tokenizer)
    train, held_out = read_lessons(tokenizer)
    held_out = held_out[:4] if options.quick else held_out

    params = ttfunc.init_deltas(model, idx, grow=True, init=start, requires_grad=True)
    print(f"\n{ttfunc.summary(model, params)}\n")
    untrained = report("before", model, params, tokenizer, held_out)

    losses = fit(model, params, train, steps=options.steps, rate=options.rate)
    draw(losses, untrained, options.output / "loss.png")

    params = optree.tree_map(torch.detach, params)  # type: ignore[arg-type, assignment]
    report("after", model, params, tokenizer, held_out)
    check_frozen(model, before)

    rows, merged = options.output / "calc.safetensors", options.output / "merged"
    shutil.rmtree(merged, ignore_errors=True)  # of an earlier run
    ttfunc.save(params, rows)
    ttfunc.merge_checkpoint(folder, rows, merged, tokenizer=tokenizer)
    print("\n".join(f"{size(path):>10}  {path}" for path in [rows, *sorted(merged.iterdir())]))
    check_merged(model, params, held_out, merged)


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


def check_merged(
    model: Any, params: ttfunc.TokenDeltas, held_out: list[Lesson], folder: Path
) -> None:
    """Load the merged folder with transformers alone, and compare what the two say."""
    loaded = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    for lesson in held_out:
        patched = answer(model, params, tokenizer, lesson)
        plain = answer(loaded, None, tokenizer, lesson)
        if patched != plain:
            raise RuntimeError(f"merged says {plain!r}, patched says {patched!r}")
    print(f"loaded from {folder}, the merged model says the same to every question:")
    print(f"    {held_out[0].question:40} -> {answer(loaded, None, tokenizer, held_out[0])}")


def size(path: Path) -> str:
    return f"{path.stat().st_size / 1024:,.1f} KiB"


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
