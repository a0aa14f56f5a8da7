"""An ensemble of token adapters that knows what it does not know, trained in one `vmap`.

Eight adapters teach `<good>` and `<bad>` to a frozen SmolLM2, each from a start of its own and on
its own bootstrap of 40 sentences. `ttfunc.stack` makes one pytree of them, and each step is one
call. Where the members disagree (the mutual information of label and member), the ensemble should
not be trusted: on sentences that are neither praise nor complaint, and on those that it gets wrong.

    python -m examples.ensemble [--quick] [--model FOLDER_OR_HUB_NAME]
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import optree
import torch
from torch import Tensor
from torch.nn import functional as F
from tqdm import tqdm

import ttfunc
from examples.shared.options import arguments
from examples.shared.sentences import Examples, encode, label_logits, prepare, read_sentences

MEMBERS, BATCH = 8, 10


def main() -> None:
    options = arguments(__doc__ or "", steps=(32, 2))
    model, tokenizer, idx = prepare(options)
    sentences = read_sentences()
    limit = 4 if options.quick else None

    def encoded(praise: list[str], complaint: list[str]) -> Examples:
        praise, complaint = praise[:limit], complaint[:limit]
        return encode(tokenizer, praise + complaint, [0] * len(praise) + [1] * len(complaint))

    train = encoded(sentences["praise"][:20], sentences["complaint"][:20])
    parts = {
        "plain": encoded(sentences["praise"][20:], sentences["complaint"][20:]),
        "subtle": encoded(sentences["subtle praise"], sentences["subtle complaint"]),
        "neither": encoded(sentences["neither"], []),
    }
    members = ttfunc.stack(
        ttfunc.init_deltas(model, idx, grow=True, init="normal") for _ in range(MEMBERS)
    )
    members = fit(model, members, train, idx, options.steps)
    found = {name: predict(model, members, part, idx) for name, part in parts.items()}
    report(parts, found)
    draw(parts, found, options.output / "ensemble.png")


def fit(
    model: Any, members: ttfunc.TokenDeltas, train: Examples, idx: list[int], steps: int
) -> ttfunc.TokenDeltas:
    """Each member on a bootstrap of its own; one call of the model and of Adam for them all."""
    members = optree.tree_map(lambda t: t.requires_grad_(), members)  # type: ignore[arg-type, assignment]
    optimizer = torch.optim.Adam(optree.tree_leaves(members), lr=0.01)  # type: ignore[arg-type]
    bootstraps = torch.randint(len(train.labels), (MEMBERS, len(train.labels)))

    def loss(params: ttfunc.TokenDeltas, ids: Tensor, ends: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(label_logits(model, params, ids, ends, idx), labels)

    for _ in (bar := tqdm(range(steps), desc=f"training {MEMBERS} members")):
        drawn = bootstraps.gather(1, torch.randint(bootstraps.shape[1], (MEMBERS, BATCH)))
        losses = torch.vmap(loss)(members, *(tensor[drawn] for tensor in train))
        optimizer.zero_grad()
        losses.sum().backward()
        optimizer.step()
        bar.set_postfix(loss=f"{losses.mean().item():.3f}")
    return optree.tree_map(torch.detach, members)  # type: ignore[arg-type, return-value]


@torch.no_grad()
def predict(model: Any, members: ttfunc.TokenDeltas, part: Examples, idx: list[int]) -> Tensor:
    """`(members, n, 2)` probabilities."""
    logits = torch.vmap(lambda p: label_logits(model, p, part.ids, part.ends, idx))(members)
    return logits.softmax(-1)


def entropy(probabilities: Tensor) -> Tensor:
    """In bits, of the last axis."""
    bits: Tensor = torch.special.entr(probabilities).sum(-1) / math.log(2)
    return bits


def disagreement(found: Tensor) -> Tensor:
    """`(n,)`: the mutual information, in bits, of the label and the member that predicts it."""
    return entropy(found.mean(0)) - entropy(found).mean(0)


def auroc(higher: Tensor, lower: Tensor) -> float:
    """How often one of `higher` is above one of `lower`; half a point for a draw."""
    above = (higher.unsqueeze(1) - lower).sign() / 2 + 0.5
    return above.mean().item()


def wrong(found: Tensor, part: Examples) -> Tensor:
    """`(n,)`: whether the ensemble's mean is for the other label."""
    return found.mean(0).argmax(-1) != part.labels


def report(parts: dict[str, Examples], found: dict[str, Tensor]) -> None:
    """How often it is right, and what its disagreement tells."""
    for name in ("plain", "subtle"):
        right = ~wrong(found[name], parts[name])
        print(f"{name} sentences: {right.sum()} of {len(right)} right")
    plain, neither = disagreement(found["plain"]), disagreement(found["neither"])
    alone = [
        auroc(entropy(n), entropy(p)) for n, p in zip(found["neither"], found["plain"], strict=True)
    ]
    print(f"AUROC for neither against plain: {auroc(neither, plain):.2f} by disagreement, ", end="")
    print(f"{sum(alone) / len(alone):.2f} by the entropy of one member, on average")
    judged = torch.cat([plain, disagreement(found["subtle"])])
    missed = torch.cat([wrong(found[name], parts[name]) for name in ("plain", "subtle")])
    print(f"AUROC for wrong against right: {auroc(judged[missed], judged[~missed]):.2f}")


def draw(parts: dict[str, Examples], found: dict[str, Tensor], path: Path) -> None:
    """Each sentence a dot: red where the ensemble is wrong, grey where nothing is right."""
    _, axes = plt.subplots(figsize=(6, 3.5), layout="constrained")
    for height, (name, part) in enumerate(parts.items()):
        spread = height + 0.3 * (torch.rand(len(part.labels)) - 0.5)
        colors = ["tab:red" if w else "tab:blue" for w in wrong(found[name], part)]
        colors = ["grey"] * len(colors) if name == "neither" else colors
        axes.scatter(disagreement(found[name]), spread, c=colors, alpha=0.7)
    axes.set(xlabel="disagreement of the members, bits", yticks=range(len(parts)))
    axes.set_yticklabels([f"{name} sentences" for name in parts])
    plt.savefig(path, dpi=150)
    print(f"plot in {path} (red: the ensemble is wrong)")


if __name__ == "__main__":
    main()
