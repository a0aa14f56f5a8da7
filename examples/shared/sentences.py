"""Sentences that praise, complain, or do neither, and the tokens that label them."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

import ttfunc
from examples.shared.smollm2 import folder_of, load

LABELS = ["<good>", "<bad>"]
MEANINGS = [" good", " bad"]  # which the labels start as
TEXT = Path(__file__).with_name("sentences.txt")


class Examples(NamedTuple):
    """`(n, length)` ids, padded on the right; `(n,)` where the label comes next; `(n,)` labels."""

    ids: Tensor
    ends: Tensor
    labels: Tensor


def prepare(options: argparse.Namespace) -> tuple[Any, Any, list[int]]:
    """The frozen model, its tokenizer, and the tokens of the labels."""
    model, tokenizer = load(folder_of(options.model, options.cache))
    tokenizer.add_tokens(LABELS, special_tokens=True)
    return model, tokenizer, tokenizer.convert_tokens_to_ids(LABELS)


def read_sentences() -> dict[str, list[str]]:
    """The sentences of each section."""
    _, *sections = TEXT.read_text().split("## ")
    lines = [section.strip().split("\n") for section in sections]
    return {name: texts for name, _, *texts in lines}


def encode(tokenizer: Any, texts: list[str], labels: list[int]) -> Examples:
    ids = [torch.tensor(tokenizer(f"{text} It was")["input_ids"]) for text in texts]
    ends = torch.tensor([len(one) - 1 for one in ids])
    padded = torch.nn.utils.rnn.pad_sequence(ids, batch_first=True)
    return Examples(padded, ends, torch.tensor(labels))


def label_logits(
    model: Any, params: ttfunc.TokenDeltas, ids: Tensor, ends: Tensor, idx: list[int]
) -> Tensor:
    """`(n, 2)` scores of the two labels after each text."""
    kwargs = {"input_ids": ids, "use_cache": False, "logits_to_keep": ends.unsqueeze(1)}
    out = ttfunc.functional_call(model, ttfunc.patch(params), kwargs=kwargs)
    return out.logits[:, 0, idx]  # type: ignore[no-any-return]
