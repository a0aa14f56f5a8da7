"""Meta-learning where a new word starts, so that one sentence teaches it: MAML over one row.

A task shows a frozen SmolLM2 one sentence with the unknown word `<dax>` ("She peeled the <dax> and
ate it."), takes gradient steps on the word's row, and asks what "a <dax> is a kind of". The outer
loop learns the row to start from, by the gradient of the answer through such a step (`grad` of
`vmap` of `grad`; Finn et al. 2017, https://arxiv.org/abs/1703.03400). On sentences that it has not
seen, that start is compared with the usual one, the mean of the matrix.

    python -m examples.few_shot [--quick] [--model FOLDER_OR_HUB_NAME]
"""

from __future__ import annotations

import random
import re
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib.pyplot as plt
import optree
import torch
import transformers
from torch import Tensor
from torch.func import grad, vmap
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm

import ttfunc
from examples.shared.options import arguments
from examples.shared.smollm2 import folder_of, load

WORD, QUESTION = "<dax>", "A <dax> is a kind of"
TEXT = Path(__file__).with_suffix(".txt")
SEEN = 5  # of the eight sentences of a kind; the others are held out
TASKS, RATE = 8, 0.05  # of a step of the outer loop; of the inner one


class Tasks(NamedTuple):
    """`(n, length)` ids and labels (-100 is no token), and `(n,)` which kind the word is of."""

    ids: Tensor
    labels: Tensor
    kinds: Tensor


class Learner:
    """The frozen model, gradient steps on one row of it, and the question."""

    def __init__(self, model: Any, tokenizer: Any, kinds: list[str]) -> None:
        self.model = model
        self.question = torch.tensor([tokenizer(QUESTION)["input_ids"]])
        # Their first pieces tell them apart.
        self.kinds = [tokenizer(f" {k}", add_special_tokens=False)["input_ids"][0] for k in kinds]

    def logits(self, row: ttfunc.TokenDeltas, ids: Tensor) -> Tensor:
        """`(n, length, V)`."""
        kwargs = {"input_ids": ids, "use_cache": False}
        out = ttfunc.functional_call(self.model, ttfunc.patch(row), kwargs=kwargs)
        return out.logits  # type: ignore[no-any-return]

    def surprise(self, row: ttfunc.TokenDeltas, ids: Tensor, labels: Tensor) -> Tensor:
        """The cross-entropy of a sentence with the word."""
        return F.cross_entropy(self.logits(row, ids.unsqueeze(0))[0, :-1], labels[1:])

    def answer(self, row: ttfunc.TokenDeltas) -> Tensor:
        """`(kinds,)` scores."""
        return self.logits(row, self.question)[0, -1, self.kinds]

    def adapt(self, row: Any, ids: Tensor, labels: Tensor, steps: int, rate: float) -> Tensor:
        """`(1 + steps, kinds)`: the answer before, and after each step on one sentence."""
        answers = [self.answer(row)]
        for _ in range(steps):
            slope = grad(self.surprise)(row, ids, labels)
            row = optree.tree_map(lambda r, s: r - rate * s, row, slope)
            answers.append(self.answer(row))
        return torch.stack(answers)

    def answers(self, row: Any, tasks: Tasks, steps: int, rate: float) -> Tensor:
        """`(n, 1 + steps, kinds)`, each task from the same start."""
        each = vmap(lambda x, y: self.adapt(row, x, y, steps, rate), chunk_size=12)
        return each(tasks.ids, tasks.labels)


def main() -> None:
    options = arguments(__doc__ or "", steps=(80, 1))
    model, tokenizer = load(folder_of(options.model, options.cache))
    model.set_attn_implementation("eager")  # the fused one has no second derivative on the CPU
    tokenizer.add_tokens([transformers.AddedToken(WORD, lstrip=True, special=True)])
    idx = tokenizer.convert_tokens_to_ids([WORD])
    usual = ttfunc.init_deltas(model, idx, grow=True, init="mean")
    kinds, seen, held_out = read_tasks(tokenizer)
    held_out = Tasks(*(t[:: 24 if options.quick else 1] for t in held_out))
    learner = Learner(model, tokenizer, kinds)

    learnt = meta_learn(learner, usual, seen, options.steps)
    curves = {"meta-learned start": score(learner, learnt, held_out, RATE)}
    for rate in [RATE] if options.quick else [RATE / 2, RATE, 2 * RATE]:
        curves[f"mean of the matrix, rate {rate}"] = score(learner, usual, held_out, rate)
    for name, (right, loss) in curves.items():
        print(
            f"{name}: ", ", ".join(f"{r:.0%} ({v:.2f})" for r, v in zip(right, loss, strict=True))
        )
    draw(curves, options.output / "few_shot.png")


def read_tasks(tokenizer: Any) -> tuple[list[str], Tasks, Tasks]:
    """The kinds of things, and a task for each sentence: seen ones, and held out ones."""
    _, *sections = TEXT.read_text().split("# ")
    lines = [re.sub("[Dd]ax", WORD, section).strip().split("\n") for section in sections]
    texts = [[tokenizer(text)["input_ids"] for text in kind[1:]] for kind in lines]

    def tasks(part: slice) -> Tasks:
        ids = [torch.tensor(t) for kind in texts for t in kind[part]]
        numbers = torch.arange(len(texts)).repeat_interleave(len(ids) // len(texts))
        padded = pad_sequence(ids, batch_first=True)
        return Tasks(padded, pad_sequence(ids, batch_first=True, padding_value=-100), numbers)

    return [kind for kind, *_ in lines], tasks(slice(SEEN)), tasks(slice(SEEN, None))


def meta_learn(
    learner: Learner, start: ttfunc.TokenDeltas, seen: Tasks, steps: int
) -> ttfunc.TokenDeltas:
    """The row from which one step on a sentence gives the best answer."""

    def loss(row: ttfunc.TokenDeltas, tasks: Tasks) -> Tensor:
        return F.cross_entropy(learner.answers(row, tasks, 1, RATE)[:, 1], tasks.kinds)

    row: Any = optree.tree_map(torch.clone, start)  # type: ignore[arg-type]
    leaves: Any = optree.tree_leaves(row)
    optimizer = torch.optim.Adam(leaves, lr=0.01)
    for _ in (bar := tqdm(range(steps), desc="outer loop")):
        drawn = random.sample(range(len(seen.kinds)), TASKS)
        slope, value = torch.func.grad_and_value(loss)(row, Tasks(*(t[drawn] for t in seen)))
        (leaves[0].grad,) = optree.tree_leaves(slope)
        torch.nn.utils.clip_grad_norm_(leaves, 1.0)
        optimizer.step()
        bar.set_postfix(loss=f"{value.item():.3f}")
    return row  # type: ignore[no-any-return]


@torch.no_grad()
def score(
    learner: Learner, start: Any, tasks: Tasks, rate: float
) -> tuple[list[float], list[float]]:
    """How many answers are right, and their mean loss, after 0 to 5 steps."""
    answers = learner.answers(start, tasks, 5, rate).transpose(0, 1)
    right = [(a.argmax(-1) == tasks.kinds).float().mean().item() for a in answers]
    return right, [F.cross_entropy(a, tasks.kinds).item() for a in answers]


def draw(curves: dict[str, tuple[list[float], list[float]]], path: Path) -> None:
    _, axes = plt.subplots(figsize=(6, 3.5), layout="constrained")
    for number, (name, (right, _)) in enumerate(curves.items()):
        axes.plot(right, "o-" if number == 0 else "o--", label=name)
    axes.set(xlabel="gradient steps on one sentence", ylabel="right answers, held out", ylim=(0, 1))
    axes.legend()
    plt.savefig(path, dpi=150)
    print(f"plot in {path}")


if __name__ == "__main__":
    main()
