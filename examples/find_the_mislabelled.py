"""Per-example gradients find the mislabelled sentence in a training set.

Two new tokens, `<good>` and `<bad>`, are taught to a frozen SmolLM2 as the labels of 60 sentences,
one of which is given the wrong one. At each step `vmap(grad)` gives the gradient of every example.
Their mean trains the two rows; the squared norm of each, summed over the steps, is how hard the
example pulls on the rows for itself alone (the self-influence of TracIn, Pruthi et al. 2020,
https://arxiv.org/abs/2002.08484). The wrong label pulls hardest.

    python -m examples.find_the_mislabelled [--quick] [--model FOLDER_OR_HUB_NAME]
"""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import optree
import torch
from torch import Tensor
from torch.func import grad, vmap
from torch.nn import functional as F
from tqdm import tqdm

import ttfunc
from examples.shared.options import arguments
from examples.shared.sentences import (
    LABELS,
    MEANINGS,
    Examples,
    encode,
    label_logits,
    prepare,
    read_sentences,
)


def main() -> None:
    options = arguments(__doc__ or "", runs=(8, 1), steps=(8, 3))
    model, tokenizer, idx = prepare(options)
    sentences = read_sentences()
    each = 12 if options.quick else 30
    texts = sentences["praise"][:each] + sentences["complaint"][:each]
    examples = encode(tokenizer, texts, [0] * each + [1] * each)

    planted = random.sample(range(len(texts)), options.runs)
    ranks, scores = [], []
    for wrong in (bar := tqdm(planted, desc="wrong labels planted")):
        given = examples.labels.clone()
        given[wrong] = 1 - given[wrong]
        start = ttfunc.mean_of_pieces(tokenizer, dict(zip(idx, MEANINGS, strict=True)))
        params = ttfunc.init_deltas(model, idx, grow=True, init=start)
        scores = self_influence(model, params, examples._replace(labels=given), idx, options.steps)
        ranks.append(1 + sum(score > scores[wrong] for score in scores))
        bar.write(f"rank {ranks[-1]:2} of {len(texts)}: {texts[wrong]} {LABELS[given[wrong]]}")
    print(f"the planted label ranks first in {ranks.count(1)} of {len(ranks)} runs, ", end="")
    print(f"and never below {max(ranks)} of {len(texts)}")
    draw(scores, planted[-1], texts, options.output / "mislabelled.png")


def self_influence(
    model: Any, params: ttfunc.TokenDeltas, examples: Examples, idx: list[int], steps: int
) -> list[float]:
    """For each example the squared norm of its gradient, summed over a training with Adam."""

    def loss(params: ttfunc.TokenDeltas, ids: Tensor, end: Tensor, label: Tensor) -> Tensor:
        logits = label_logits(model, params, ids.unsqueeze(0), end.unsqueeze(0), idx)
        return F.cross_entropy(logits, label.unsqueeze(0))

    of_each = vmap(grad(loss), in_dims=(None, 0, 0, 0), chunk_size=20)
    leaves: Any = optree.tree_leaves(params)  # type: ignore[arg-type]
    optimizer = torch.optim.Adam(leaves, lr=0.003)
    scores = torch.zeros(len(examples.labels))
    for _ in range(steps):
        gradients: Any = optree.tree_leaves(of_each(params, *examples))
        for leaf, gradient in zip(leaves, gradients, strict=True):
            scores += gradient.flatten(1).square().sum(1)
            leaf.grad = gradient.mean(0)
        optimizer.step()
    return scores.tolist()


def draw(scores: list[float], wrong: int, texts: list[str], path: Path) -> None:
    """The sentences of the last run, from the hardest pull to the least."""
    order = sorted(range(len(scores)), key=lambda i: -scores[i])
    _, axes = plt.subplots(figsize=(7, 3.5), layout="constrained")
    colors = ["tab:red" if i == wrong else "tab:blue" for i in order]
    axes.bar(range(len(order)), [scores[i] for i in order], color=colors)
    place = order.index(wrong)
    axes.annotate(
        f"mislabelled: {texts[wrong]}", (place, scores[wrong]), (place + 3, scores[wrong])
    )
    axes.set(xlabel="sentences", ylabel="self-influence", xticks=[])
    plt.savefig(path, dpi=150)
    print(f"plot in {path}")


if __name__ == "__main__":
    main()
