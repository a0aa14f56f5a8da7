"""A small training job: its model, rows, data, and the rows that a plain functional loop trains."""

from __future__ import annotations

import copy
from pathlib import Path

import optree
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import LlamaForCausalLM, TrainingArguments

from tests.helpers.llama import llama
from tests.helpers.rows import random_rows
from ttfunc import functional_call, merge, patch
from ttfunc.module.token_module import TokenModule

TOKENS = [48, 5, 49]
NAME = "model.embed_tokens.weight"
ROWS, IDS = "deltas/model/embed_tokens/weight", "token_indices/model/embed_tokens/weight"
STEPS, BATCH, ACCUMULATE, RATE = 6, 2, 2, 0.05
# Of every Trainer here: the examples in their order, and nothing written that is not asked for.
QUIET = {
    "train_sampling_strategy": "sequential",
    "save_strategy": "no",
    "report_to": "none",
    "disable_tqdm": True,
    "use_cpu": True,
    "dataloader_pin_memory": False,
}


def student() -> LlamaForCausalLM:
    """The frozen model, whose last tokens are the new ones."""
    return llama(vocabulary=50, width=16)


def bridge() -> TokenModule:
    model = student()
    return TokenModule(model, random_rows(model, TOKENS))


def merged(module: TokenModule) -> nn.Module:
    """The model with the rows written into it: the oracle."""
    model = copy.deepcopy(module.base)
    with torch.no_grad():
        model.load_state_dict(merge(model.state_dict(), module.params()))
    return model


def lessons() -> list[dict[str, Tensor]]:
    """Texts that use the tokens, with unequal numbers of labels."""
    generator = torch.Generator().manual_seed(5)
    examples = []
    for i in range(STEPS * BATCH * ACCUMULATE):
        x = torch.randint(3, 48, (9,), generator=generator)
        x[i % 9], x[(i + 4) % 9] = 48, 49
        labels = x.clone()
        labels[: i % 8] = -100
        examples.append({"input_ids": x, "labels": labels})
    return examples


def arguments(folder: Path, **options) -> TrainingArguments:
    """Those of a Trainer that does the same."""
    settings = {
        "output_dir": str(folder),
        "max_steps": STEPS,
        "per_device_train_batch_size": BATCH,
        "gradient_accumulation_steps": ACCUMULATE,
        "learning_rate": RATE,
        "weight_decay": 0.1,
        "max_grad_norm": 0.5,
        "logging_steps": 1,
        **QUIET,
    }
    return TrainingArguments(**{**settings, **options})


def looped() -> Tensor:
    """The rows after the same training, as a plain functional loop with a loss of its own."""
    model, examples = student(), lessons()
    params = random_rows(model, TOKENS, requires_grad=True)
    leaves = optree.tree_leaves(params)
    optimizer = torch.optim.AdamW(leaves, lr=RATE, weight_decay=0.1)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / STEPS)
    for step in range(STEPS):
        size = BATCH * ACCUMULATE
        batch = examples[step * size : (step + 1) * size]
        x, y = (torch.stack([e[key] for e in batch]) for key in ("input_ids", "labels"))
        logits = functional_call(model, patch(params), x).logits
        loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), y[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(leaves, 0.5)
        optimizer.step()
        schedule.step()
    return params.deltas[NAME].detach()


def distance(a: Tensor, b: Tensor) -> float:
    return float((a - b).detach().abs().max())
