"""Lessons in calling a calculator, and what a model says to their questions."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

import ttfunc

NEW_TOKENS = ["<calc>", "</calc>"]
TEXT = Path(__file__).with_suffix(".txt")


@dataclass
class Lesson:
    """One question, the answer that should follow it, and both as token ids."""

    question: str
    answer: str
    prompt_ids: list[int]
    answer_ids: list[int]


def add_tokens(model: Any, tokenizer: Any) -> list[int]:
    """The ids of the new tokens: rows that the matrix has to spare, or else new ones."""
    tokenizer.add_tokens(NEW_TOKENS, special_tokens=True)
    rows = model.get_input_embeddings().num_embeddings
    if len(tokenizer) > rows:
        model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    idx: list[int] = tokenizer.convert_tokens_to_ids(NEW_TOKENS)
    print(f"{NEW_TOKENS} are tokens {idx}, in {'new' if len(tokenizer) > rows else 'free'} rows")
    return idx


def read_lessons(tokenizer: Any) -> tuple[list[Lesson], list[Lesson]]:
    """The lessons of the text, for training and held out."""

    def lesson(text: str) -> Lesson:
        question, answer = text.split("\nA: ")
        prompt = tokenizer(f"{question}\nA:")["input_ids"]
        return Lesson(question, answer, prompt, tokenizer(f" {answer}\n")["input_ids"])

    def section(text: str) -> list[Lesson]:
        _, *lessons = text.strip().split("\n\n")
        return [lesson(text) for text in lessons]

    _, train, held_out = TEXT.read_text().split("## ")
    return section(train), section(held_out)


def loss_of(
    model: Any, params: ttfunc.TokenDeltas, lessons: list[Lesson], reduction: str = "mean"
) -> Tensor:
    """Cross-entropy of the answers, given the questions."""
    texts = [torch.tensor(lesson.prompt_ids + lesson.answer_ids) for lesson in lessons]
    # Causal attention never looks at what is padded on the right.
    x = torch.nn.utils.rnn.pad_sequence(texts, batch_first=True)
    labels = torch.full_like(x, -100)
    for row, lesson in zip(labels, lessons, strict=True):
        start, end = len(lesson.prompt_ids), len(lesson.prompt_ids) + len(lesson.answer_ids)
        row[start:end] = torch.tensor(lesson.answer_ids)
    logits = ttfunc.functional_call(model, ttfunc.patch(params), x).logits
    return F.cross_entropy(
        logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), reduction=reduction
    )


def answer(model: Any, params: ttfunc.TokenDeltas | None, tokenizer: Any, lesson: Lesson) -> str:
    """What the model says to a question, greedily: patched, or plain without `params`."""
    weights = ttfunc.patch(params) if params else {}
    kwargs = {
        "input_ids": torch.tensor([lesson.prompt_ids]),
        "max_new_tokens": 16,
        "do_sample": False,
        "pad_token_id": tokenizer.eos_token_id,
    }
    with torch.no_grad():
        out = ttfunc.functional_call(model, weights, kwargs=kwargs, method="generate")
    said: str = tokenizer.decode(out[0, len(lesson.prompt_ids) :])
    return said.strip().partition("\n")[0].removesuffix(tokenizer.eos_token)


@torch.no_grad()
def report(
    when: str, model: Any, params: ttfunc.TokenDeltas, tokenizer: Any, held_out: list[Lesson]
) -> float:
    """Print the held-out loss and what the model says now; return the loss."""
    loss = loss_of(model, params, held_out).item()
    said = [answer(model, params, tokenizer, lesson) for lesson in held_out]
    calls = [(s, lesson) for s, lesson in zip(said, held_out, strict=True)]
    right = sum(s == lesson.answer for s, lesson in calls if "<calc>" in lesson.answer)
    wrong = sum("<calc>" in s for s, lesson in calls if "<calc>" not in lesson.answer)
    wanted = sum("<calc>" in lesson.answer for lesson in held_out)
    print(f"{when} training: held-out loss {loss:.3f}; ", end="")
    print(f"{right} of {wanted} calls right, {wrong} of {len(held_out) - wanted} without need")
    for s, lesson in calls[:4]:
        print(f"    {lesson.question:40} -> {s}")
    return loss


def check_frozen(
    model: Any, before: dict[str, Tensor], resized: dict[str, Tensor], idx: list[int]
) -> None:
    """Raise unless every parameter is bit-identical to what it was."""
    for name, now in model.state_dict().items():
        was = before[name]
        same = torch.equal(now, resized[name]) and torch.equal(now[: len(was)], was)
        if not same:
            raise RuntimeError(f"{name} has changed")
    print(f"all {len(resized)} tensors of the model are bit-identical to those before training")
