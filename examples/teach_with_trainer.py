"""The lessons of teach_a_token.py, taught by transformers' Trainer.

A `TokenModule` is an `nn.Module` whose parameters are the trained rows alone, so that Trainer's
optimizer, checkpoints and data parallelism see kilobytes. The model in it stays frozen.

    python -m examples.teach_with_trainer [--quick] [--model FOLDER_OR_HUB_NAME]
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

import ttfunc
from examples.shared.calculator import (
    Lesson,
    add_tokens,
    check_frozen,
    digests,
    read_lessons,
    report,
)
from examples.shared.options import arguments
from examples.shared.smollm2 import folder_of, load


def main() -> None:
    options = arguments(__doc__ or "", steps=(120, 12), rate=(0.02, 0.02))
    model, tokenizer = load(folder_of(options.model, options.cache))
    before = digests(model)
    idx, start = add_tokens(tokenizer)
    train, held_out = read_lessons(tokenizer)
    held_out = held_out[:4] if options.quick else held_out

    module = ttfunc.TokenModule(model, ttfunc.init_deltas(model, idx, grow=True, init=start))
    report("before", model, module.params(), tokenizer, held_out)
    with tempfile.TemporaryDirectory() as folder:
        settings = transformers.TrainingArguments(
            output_dir=folder,
            max_steps=options.steps,
            save_steps=options.steps,
            per_device_train_batch_size=8,
            learning_rate=options.rate,
            optim="adamw_torch",
            seed=options.seed,
            use_cpu=True,
            dataloader_pin_memory=False,
            logging_strategy="no",
            report_to="none",
        )
        transformers.Trainer(
            model=module,
            args=settings,
            train_dataset=[example(lesson) for lesson in train],
            data_collator=batch,
        ).train()
        weigh(Path(folder, f"checkpoint-{options.steps}"))

    module.eval()
    report("after", model, module.params(), tokenizer, held_out)
    check_frozen(model, before)
    generate(module, tokenizer, "What is 46 + 27?")
    rows = options.output / "rows.safetensors"
    ttfunc.save(module.params(), rows)
    print(f"rows in {rows}")


def example(lesson: Lesson) -> dict[str, Tensor]:
    """Question and answer, of which only the answer is to be learnt."""
    ids = torch.tensor(lesson.prompt_ids + lesson.answer_ids)
    labels = ids.clone()
    labels[: len(lesson.prompt_ids)] = -100
    return {"input_ids": ids, "labels": labels}


def batch(examples: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Padded on the right, where causal attention never looks."""
    fillers = {"input_ids": 0, "labels": -100}
    return {
        key: pad_sequence([e[key] for e in examples], batch_first=True, padding_value=filler)
        for key, filler in fillers.items()
    }


def weigh(checkpoint: Path) -> None:
    """Print what Trainer wrote."""
    total = sum(file.stat().st_size for file in checkpoint.iterdir())
    rows = (checkpoint / "model.safetensors").stat().st_size
    print(f"Trainer's checkpoint: {total / 1024:.1f} KiB, of which rows {rows / 1024:.1f} KiB")


def generate(module: ttfunc.TokenModule, tokenizer: Any, question: str) -> None:
    """What the module says to a question."""
    inputs = tokenizer(f"Q: {question}\nA:", return_tensors="pt")
    said = module.generate(
        **inputs, max_new_tokens=16, do_sample=False, pad_token_id=tokenizer.eos_token_id
    )
    answer, *_ = tokenizer.decode(said[0, inputs["input_ids"].shape[1] :]).split("\n")
    print(f"asked on its own, {question!r}: {answer.strip()}")


if __name__ == "__main__":
    main()
