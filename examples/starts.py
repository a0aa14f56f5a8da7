"""Where the row of a new token should start: four ways, and each then trained.

Sixteen words become tokens of their own, as ` ukulele`, which SmolLM2 spells ` uk|ule|le`. Their
rows start random, at the mean of the matrix, at the mean of the word's pieces, or distilled: the
frozen model's hidden states from the new token on are drawn to those that it has where the word is
spelled in pieces (Token Distillation, Dobler et al., arXiv 2505.20133). The texts are what the
model itself writes about the words; the sentences that the starts are judged by were written apart.

    python -m examples.starts [--quick] [--model FOLDER_OR_HUB_NAME]
"""

from __future__ import annotations

import copy
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib.pyplot as plt
import optree
import torch
import transformers
from torch import Tensor
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm

import ttfunc
from examples.shared.options import arguments
from examples.shared.smollm2 import folder_of, load

TEXT = Path(__file__).with_suffix(".txt")
PROMPTS = ["The{}", "She told us about the{}", "A{}", "We learnt that a{}"]
BATCH, RATE, EVERY = 16, 0.005, 8


class Texts(NamedTuple):
    """Texts with the new tokens, and what the frozen model makes of them in pieces.

    ids, labels: `(n, length)`; -100 where padded on the right. states: `(n, length, D)`. losses:
    `(n, length)`, of each token in pieces.
    """

    ids: Tensor
    labels: Tensor
    states: Tensor
    losses: Tensor


class Lexicon:
    """The frozen model, and each new token with its pieces."""

    def __init__(self, model: Any, tokenizer: Any, words: list[str]) -> None:
        self.model, self.before, self.after = model, tokenizer, copy.deepcopy(tokenizer)
        self.words = [f" {word}" for word in words]
        added = [transformers.AddedToken(w, lstrip=True, single_word=True) for w in words]
        self.after.add_tokens(added)
        self.idx: list[int] = self.after.convert_tokens_to_ids(words)
        spelled = [tokenizer.encode(word, add_special_tokens=False) for word in self.words]
        self.pieces = dict(zip(self.idx, spelled, strict=True))

    def states(self, params: ttfunc.TokenDeltas, ids: Tensor) -> Tensor:
        """`(n, length, D)`, what the head reads."""
        kwargs = {"input_ids": ids, "output_hidden_states": True, "logits_to_keep": 1}
        out = ttfunc.functional_call(self.model, ttfunc.patch(params), kwargs=kwargs)
        return out.hidden_states[-1]  # type: ignore[no-any-return]

    @torch.no_grad()
    def read(self, texts: list[str]) -> Texts:
        """The texts with the new tokens; states and losses are those at the pieces of each."""
        rows = [self.after.encode(text, return_tensors="pt")[0] for text in texts]
        spelled = [[self.pieces.get(token, [token]) for token in row.tolist()] for row in rows]
        token_of = pad_sequence(
            [torch.arange(len(row)).repeat_interleave(counts(row)) for row in spelled],
            batch_first=True,
        )
        last = pad_sequence([counts(row).cumsum(0) - 1 for row in spelled], batch_first=True)
        pieces = [torch.tensor([piece for one in row for piece in one]) for row in spelled]
        labels = pad_sequence(pieces, batch_first=True, padding_value=-100)
        out = self.model(labels.clamp(min=0), output_hidden_states=True)
        states = out.hidden_states[-1]
        losses = F.cross_entropy(out.logits[:, :-1].mT, labels[:, 1:], reduction="none")
        padded = pad_sequence(rows, batch_first=True, padding_value=-100)
        at = last.unsqueeze(-1).expand(-1, -1, states.shape[-1])
        of_token = torch.zeros(padded.shape).scatter_add(1, token_of[:, 1:], losses)
        return Texts(padded.clamp(min=0), padded, states.gather(1, at), of_token)

    @torch.no_grad()
    def tell(self, each: int, length: int) -> list[str]:
        """What the model itself writes about each word."""
        self.before.padding_side = "left"
        prompts = [p.format(word) for word in self.words for p in PROMPTS[:each]]
        inputs = self.before(prompts, return_tensors="pt", padding=True)
        out = self.model.generate(**inputs, max_new_tokens=length, do_sample=True, top_p=0.9)
        texts: list[str] = self.before.batch_decode(out, skip_special_tokens=True)
        return texts

    def loss(self, params: ttfunc.TokenDeltas, texts: Texts) -> Tensor:
        """The cross-entropy of the next token."""
        kwargs = {"input_ids": texts.ids, "labels": texts.labels}
        weights = ttfunc.patch(params, deferred_logits=True)
        out = ttfunc.functional_call(self.model, weights, kwargs=kwargs)
        return out.loss  # type: ignore[no-any-return]

    def distance(self, params: ttfunc.TokenDeltas, texts: Texts) -> Tensor:
        """How far the states are from those of the pieces."""
        found = self.states(params, texts.ids)
        return F.mse_loss(found[texts.labels >= 0], texts.states[texts.labels >= 0])

    @torch.no_grad()
    def judge(self, params: ttfunc.TokenDeltas, texts: Texts) -> tuple[float, float]:
        """The loss of the other words, and of the new ones."""
        logits = ttfunc.functional_call(self.model, ttfunc.patch(params), texts.ids).logits
        losses = F.cross_entropy(logits[:, :-1].mT, texts.labels[:, 1:], reduction="none")
        return self.split(F.pad(losses, (1, 0)), texts)

    def split(self, losses: Tensor, texts: Texts) -> tuple[float, float]:
        """The mean for the other words, and for the new ones, but for the first of a text."""
        new = torch.isin(texts.labels, torch.tensor(self.idx))[:, 1:]
        other = (texts.labels[:, 1:] >= 0) & ~new
        return losses[:, 1:][other].mean().item(), losses[:, 1:][new].mean().item()


Loss = Callable[[ttfunc.TokenDeltas, Texts], Tensor]


def counts(spelled: list[list[int]]) -> Tensor:
    """How many pieces each token has."""
    return torch.tensor([len(pieces) for pieces in spelled])


def main() -> None:
    options = arguments(__doc__ or "", steps=(32, 2), words=(16, 2), prompts=(4, 2))
    model, tokenizer = load(folder_of(options.model, options.cache))
    sentences = read_sentences()
    words = list(sentences)[: options.words]
    lexicon = Lexicon(model, tokenizer, words)
    texts = lexicon.tell(options.prompts, 32)
    print(f"the model wrote {len(texts)} texts, such as: {texts[0]!r}")
    seen = lexicon.read(texts)
    held_out = lexicon.read([text for word in words for text in sentences[word]])

    def rows(init: Any) -> ttfunc.TokenDeltas:
        return ttfunc.init_deltas(model, lexicon.idx, grow=True, init=init)

    starts = {
        "random": rows("normal"),
        "mean": rows("mean"),
        "pieces": rows(ttfunc.mean_of_pieces(lexicon.before, lexicon.after)),
    }
    starts["distilled"] = fit(
        lexicon.distance, starts["pieces"], seen, options.steps, lambda step, params: None
    )
    curves: dict[str, dict[int, tuple[float, float]]] = {name: {} for name in starts}
    for name, start in starts.items():

        def note(step: int, params: ttfunc.TokenDeltas, name: str = name) -> None:
            if step % EVERY == 0 or step == options.steps:
                curves[name][step] = lexicon.judge(params, held_out)

        fit(lexicon.loss, start, seen, options.steps, note)
    in_pieces = lexicon.split(held_out.losses, held_out)
    report(curves, in_pieces)
    draw(curves, in_pieces, options.output / "starts.png")


def read_sentences() -> dict[str, list[str]]:
    """The sentences about each word."""
    _, *sections = TEXT.read_text().split("# ")
    return {word: texts for word, *texts in (section.strip().split("\n") for section in sections)}


def fit(
    loss_of: Loss,
    start: ttfunc.TokenDeltas,
    seen: Texts,
    steps: int,
    note: Callable[[int, ttfunc.TokenDeltas], None],
) -> ttfunc.TokenDeltas:
    """Adam on the rows alone; `note` sees the rows before each step, and after the last."""
    params: Any = optree.tree_map(lambda t: t.clone().requires_grad_(), start)  # type: ignore[arg-type]
    optimizer = torch.optim.Adam(optree.tree_leaves(params), lr=RATE)
    for step in (bar := tqdm(range(steps))):
        note(step, params)
        drawn = random.sample(range(len(seen.ids)), min(BATCH, len(seen.ids)))
        loss = loss_of(params, Texts(*(t[drawn] for t in seen)))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        bar.set_postfix(loss=f"{loss.item():.3f}")
    note(steps, params)
    return optree.tree_map(torch.detach, params)  # type: ignore[return-value]


def report(curves: dict[str, dict[int, tuple[float, float]]], in_pieces: tuple[float, ...]) -> None:
    steps = list(next(iter(curves.values())))
    print("held-out loss, of the other words / of the new ones, after so many steps of training:")
    print(f"{'start':10}", *(f"{step:>13}" for step in steps))
    for name, curve in curves.items():
        print(f"{name:10}", *(f"{other:5.2f} / {new:5.2f}" for other, new in curve.values()))
    print(f"the frozen model, with the words in pieces: {in_pieces[0]:.2f} / {in_pieces[1]:.2f}")


def draw(
    curves: dict[str, dict[int, tuple[float, float]]], in_pieces: tuple[float, ...], path: Path
) -> None:
    _, both = plt.subplots(1, 2, figsize=(9, 3.5), layout="constrained")
    for part, (axes, title) in enumerate(zip(both, ["other words", "new words"], strict=True)):
        for name, curve in curves.items():
            axes.plot(list(curve), [losses[part] for losses in curve.values()], label=name)
        axes.axhline(in_pieces[part], color="grey", linestyle="--", label="in pieces, frozen")
        axes.set(title=f"loss of the {title}", xlabel="steps of training")
    both[1].legend()
    plt.savefig(path, dpi=150)
    print(f"plot in {path}")


if __name__ == "__main__":
    main()
