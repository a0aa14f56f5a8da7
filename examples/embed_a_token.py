"""Teach a text encoder one new word by contrast, with sentence-transformers' trainer.

SmolLM2's body with mean pooling is the encoder. The new token stands for one of its words in pairs
of the same sentence with the word and with the token; its row alone is trained. Then sentences with
the token should find, among sentences held out, the one that says the same.

    python -m examples.embed_a_token [--quick] [--model FOLDER_OR_HUB_NAME]
"""

from __future__ import annotations

import copy
import shutil
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from sentence_transformers import (
    SentenceTransformer,
    SentenceTransformerTrainer,
    SentenceTransformerTrainingArguments,
)
from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss
from sentence_transformers.sentence_transformer.modules import Pooling, Transformer

import ttfunc
from examples.shared.options import arguments
from examples.shared.smollm2 import folder_of

NEW, WORD = "<flurb>", "thunderstorm"
DID = ["woke the children", "kept us indoors", "frightened the dog", "cut the power", "passed by"]
WHEN = ["last night", "on Monday", "in the middle of dinner", "at noon", "before the wedding"]
OTHERS = ["bus", "neighbour", "letter", "concert", "train"]


def main() -> None:
    options = arguments(__doc__ or "", steps=(60, 2), rate=(0.01, 0.01))
    encoder = encoder_of(folder_of(options.model, options.cache))
    # The tokenizer is changed in place, and the model is not: the patched matrix is longer.
    tokenizer = encoder.tokenizer
    before = copy.deepcopy(tokenizer)
    tokenizer.add_tokens([NEW])
    model = encoder[0].model.requires_grad_(False)
    start = ttfunc.mean_of_pieces(before, tokenizer)
    ids = [tokenizer.convert_tokens_to_ids(NEW)]
    module = ttfunc.TokenModule(model, ttfunc.init_deltas(model, ids, grow=True, init=start))
    encoder[0].model = module

    said = [f"The {{}} {did} {when}." for did in DID for when in WHEN]
    train, held_out = said[::2], said[1::2]
    print(f"before training: {found(encoder, held_out)} of {len(held_out)} found")
    fit(encoder, train, options)
    print(f"after training:  {found(encoder, held_out)} of {len(held_out)} found")

    merged = options.output / "encoder"
    shutil.rmtree(merged, ignore_errors=True)  # of an earlier run
    encoder.save_pretrained(str(merged))
    plain = SentenceTransformer(str(merged), device="cpu")
    print(f"the saved encoder, a plain {type(plain[0].model).__name__}: ", end="")
    print(f"{found(plain, held_out)} of {len(held_out)}")


def encoder_of(folder: Path) -> Any:
    """A text encoder from a language model: its body, and the mean over the tokens."""
    transformer = Transformer(str(folder))
    pooling = Pooling(transformer.get_embedding_dimension())
    encoder = SentenceTransformer(modules=[transformer, pooling], device="cpu")
    if encoder.tokenizer.pad_token is None:
        encoder.tokenizer.pad_token = encoder.tokenizer.eos_token
    return encoder


def fit(encoder: Any, said: list[str], options: Any) -> None:
    """Pull each sentence with the token to the same with the word, and away from all others."""
    pairs = [{"anchor": one.format(NEW), "positive": one.format(WORD)} for one in said]
    settings = SentenceTransformerTrainingArguments(
        output_dir=str(options.output / "contrast"),
        max_steps=options.steps,
        per_device_train_batch_size=8,
        learning_rate=options.rate,
        seed=options.seed,
        use_cpu=True,
        dataloader_pin_memory=False,
        save_strategy="no",
        logging_strategy="no",
        report_to="none",
    )
    SentenceTransformerTrainer(
        model=encoder,
        args=settings,
        train_dataset=Dataset.from_list(pairs),
        loss=MultipleNegativesRankingLoss(encoder),
    ).train()


def found(encoder: Any, said: list[str]) -> int:
    """How many sentences with the token are nearest to the same sentence with the word."""
    asked = [one.format(NEW) for one in said]
    answers = [one.format(word) for word in [WORD, *OTHERS] for one in said]
    with torch.no_grad():
        vectors = [encoder.encode(texts, convert_to_tensor=True) for texts in (asked, answers)]
        nearest = torch.cosine_similarity(vectors[0][:, None], vectors[1][None], dim=-1).argmax(1)
    return int((nearest == torch.arange(len(said))).sum())


if __name__ == "__main__":
    main()
