"""A step of a LoRA and token rows in transformers' Trainer and in TRL's, on SmolLM2-135M.

LoRA alone is the floor: ttfunc adds rows by a `TokenModule` with `train_base=True`, PEFT by
`trainable_token_indices`. Each step is the trainer's own, and the optimizer's. (TRL's trainer fails
on PEFT's tokens of a tied head: it is said in the table.)

python -m bench.trainers [--tokens 256] [--repeats 7] [--quick]
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable
from typing import Any

import peft
import torch
import transformers
import trl
from datasets import Dataset

import ttfunc
from bench.contestants import SMOLLM2, Work
from bench.memory import growth, trim_heap
from bench.report import print_table
from bench.timing import in_turns
from examples.shared.smollm2 import fetch_smollm2, load

TRAINERS = ("Trainer", "SFTTrainer")
MODELS = ("LoRA alone", "ttfunc", "PEFT", "ttfunc, rows alone")
TARGETS = ["q_proj", "v_proj"]


def model_of(name: str, work: Work) -> Any:
    """What a trainer is given."""
    model, idx = work.model(), work.idx()
    if name == "ttfunc, rows alone":
        return ttfunc.TokenModule(model, ttfunc.init_deltas(model, idx))
    indices = idx if name == "PEFT" else None
    config = peft.LoraConfig(r=8, target_modules=TARGETS, trainable_token_indices=indices)
    adapted = peft.get_peft_model(model, config)
    if name != "ttfunc":
        return adapted
    return ttfunc.TokenModule(adapted, ttfunc.init_deltas(adapted, idx), train_base=True)


def step_of(kind: str, name: str, work: Work) -> Callable[[], object]:
    """One step of training. Raises whatever the trainer raises."""
    settings: dict[str, Any] = {
        "output_dir": tempfile.mkdtemp(),
        "report_to": "none",
        "use_cpu": True,
        "bf16": False,
        "disable_tqdm": True,
    }
    model, batch = model_of(name, work), {"input_ids": work.text(), "labels": work.labels()}
    batch["attention_mask"] = torch.ones_like(batch["input_ids"])
    if kind == "Trainer":
        trainer = transformers.Trainer(model, transformers.TrainingArguments(**settings))
    else:
        arguments = trl.SFTConfig(**settings, activation_checkpointing=False)
        _, words = load(fetch_smollm2())
        data = Dataset.from_list([{"input_ids": [1, 2], "labels": [1, 2]}])
        trainer = trl.SFTTrainer(model, args=arguments, train_dataset=data, processing_class=words)
    optimizer = trainer.create_optimizer()
    trainer.current_gradient_accumulation_steps = 1  # which train() sets

    def step() -> object:
        loss = trainer.training_step(model, dict(batch))
        optimizer.step()
        optimizer.zero_grad()
        return loss

    step()
    return step


def made(kind: str, work: Work) -> tuple[dict[str, Callable[[], object]], dict[str, str]]:
    """The steps, and what was raised in the place of others."""
    steps, failed = {}, {}
    for name in MODELS:
        try:
            steps[name] = step_of(kind, name, work)
        except (TypeError, ValueError, RuntimeError, AttributeError) as error:
            if name != "PEFT":
                raise
            failed[name] = f"{type(error).__name__}: {str(error).splitlines()[0][:90]}"
    return steps, failed


def peak(kind: str, name: str, work: Work) -> float:
    """MiB that a step's peak is above the process before it, in a process of its own."""
    command = [sys.executable, "-m", "bench.trainers", "--only", json.dumps([kind, name])]
    command += ["--tokens", str(work.tokens), *(["--quick"] if work.layers == 1 else [])]
    out = subprocess.run(command, check=True, capture_output=True, text=True)  # noqa: S603
    return float(out.stdout.splitlines()[-1])


def run(work: Work, repeats: int) -> None:
    """Time and memory of each, under each trainer."""
    lines = []
    for kind in TRAINERS:
        steps, failed = made(kind, work)
        seconds = in_turns(steps, repeats, prepare=trim_heap)
        floor = seconds["LoRA alone"]
        for name in MODELS:
            if name in failed:
                lines.append([kind, name, failed[name], "", ""])
                continue
            mib = peak(kind, name, work)
            taken = seconds[name]
            lines.append([kind, name, f"{1e3 * taken:,.0f}", f"{taken / floor:.2f}", f"{mib:,.0f}"])
        del steps
    head = ["", "", "step, ms", "times LoRA alone", "peak over the model, MiB"]
    print_table(f"tied {work}, {work.tokens} tokens, {work.rows} rows, LoRA of rank 8", head, lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n\n")[0])
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--only", type=json.loads, help="one trainer and model: its peak alone")
    parser.add_argument("--quick", action="store_true", help="one layer of random weights")
    options = parser.parse_args()
    warnings.simplefilter("ignore", FutureWarning)  # of the libraries' own
    usual = Work(**SMOLLM2, tokens=options.tokens, rows=16, weights="SmolLM2")
    quick = Work(49_152, 64, 1, tokens=32, rows=4)
    work = quick if options.quick else usual
    if options.only:
        kind, name = options.only
        print(growth(step_of(kind, name, work)) / 2**20)
    else:
        run(work, 2 if options.quick else options.repeats)


if __name__ == "__main__":
    main()
