"""Lessons in calling a calculator, and what a model says to their questions."""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.nn import functional as F

import ttfunc

Start: TypeAlias = Callable[[Tensor, Tensor], Tensor]

NEW_TOKENS = ["<calc>", "</calc>"]
TEXT = Path(__file__).with_suffix(".txt")


@dataclass
class Lesson:
    """One question, the answer that should follow it, and both as token ids."""

    question: str
    answer: str
    prompt_ids: list[int]
    answer_ids: list[int]


def add_tokens(tokenizer: Any) -> tuple[list[int], Start]:
    """Teach the tokenizer the new tokens: their ids, and where their rows start."""
    before = copy.deepcopy(tokenizer)
    tokenizer.add_tokens(NEW_TOKENS, special_tokens=True)
    idx: list[int] = tokenizer.convert_tokens_to_ids(NEW_TOKENS)
    pieces = [before.tokenize(token) for token in NEW_TOKENS]
    print(f"{NEW_TOKENS} are tokens {idx}; before, their pieces were {pieces}")
    return idx, ttfunc.mean_of_pieces(before, tokenizer)


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
    weights = ttfunc.patch(params, deferred_logits=True)  # the loss reads the answers' alone
    logits = ttfunc.functional_call(model, weights, x).logits
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
    return first_line(tokenizer, out[0, len(lesson.prompt_ids) :])


def first_line(tokenizer: Any, tokens: Any) -> str:
    """What of the tokens answers a question: all that is said before the line ends."""
    said: str = tokenizer.decode(tokens)
    return said.strip().partition("\n")[0].removesuffix(tokenizer.eos_token)


def count_calls(said: list[str], lessons: list[Lesson]) -> str:
    """How many calls are right of those that are wanted, and how many nobody wanted."""
    both = list(zip(said, lessons, strict=True))
    right = sum(s == lesson.answer for s, lesson in both if "<calc>" in lesson.answer)
    wrong = sum("<calc>" in s for s, lesson in both if "<calc>" not in lesson.answer)
    wanted = sum("<calc>" in lesson.answer for lesson in lessons)
    return f"{right} of {wanted} calls right, {wrong} of {len(lessons) - wanted} without need"


@torch.no_grad()
def report(
    when: str, model: Any, params: ttfunc.TokenDeltas, tokenizer: Any, held_out: list[Lesson]
) -> float:
    """Print the held-out loss and what the model says now; return the loss."""
    loss = loss_of(model, params, held_out).item()
    said = [answer(model, params, tokenizer, lesson) for lesson in held_out]
    print(f"{when} training: held-out loss {loss:.3f}; {count_calls(said, held_out)}")
    for s, lesson in list(zip(said, held_out, strict=True))[:4]:
        print(f"    {lesson.question:40} -> {s}")
    return loss


def digests(model: Any) -> dict[str, str]:
    """A digest of the bytes of each tensor of the model."""
    return {
        name: hashlib.sha256(tensor.contiguous().view(torch.uint8).numpy()).hexdigest()
        for name, tensor in model.state_dict().items()
    }


def check_frozen(model: Any, before: dict[str, str]) -> None:
    """Raise unless every tensor of the model has the bits that it had."""
    if digests(model) != before:
        raise RuntimeError("the model has changed")
    print(f"all {len(before)} tensors of the model have the bits that they had before")
