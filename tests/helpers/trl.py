"""Small jobs for TRL's trainers, and the same training as loops written by hand."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import peft
import torch
import torch.nn.functional as F
from datasets import Dataset
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast

from tests.helpers.lessons import QUIET
from tests.helpers.llama import llama
from tests.helpers.rows import random_rows
from tests.helpers.tokenizers import TEXT, tokenizer
from ttfunc import TokenDeltas, functional_call, patch
from ttfunc.module.token_module import TokenModule

NEW = ["<call>", "<end>"]
TEMPLATE = (
    "{% for m in messages %}{% if m.role == 'assistant' %}<call>{% generation %}{{ m.content }}"
    "<eos>{% endgeneration %}{% else %}{{ m.content }}{% endif %}{% endfor %}"
)
WORDS = TEXT.split()
SETTINGS = {
    "max_steps": 3,
    "per_device_train_batch_size": 2,
    "learning_rate": 0.05,
    "logging_steps": 1,
    "bf16": False,
    **QUIET,
}


def pupil_tokenizer() -> PreTrainedTokenizerFast:
    made = tokenizer("byte-level BPE")
    made.add_special_tokens({"eos_token": "<eos>", "pad_token": "<pad>"})
    made.add_tokens(NEW)
    made.chat_template = TEMPLATE
    return made


def sentences(count: int) -> list[str]:
    """Sentences of different lengths that use the new tokens."""
    return [
        f"<call> {' '.join(WORDS[i : i + 3 + i % 5])} <end> {WORDS[-1 - i]}" for i in range(count)
    ]


def dataset(kind: str, count: int = 6) -> Dataset:
    """Examples in one of the formats that TRL takes."""
    texts = sentences(count)
    halves = [(text[: len(text) // 2], text[len(text) // 2 :]) for text in texts]
    if kind == "text":
        return Dataset.from_list([{"text": text} for text in texts])
    if kind == "completion":
        return Dataset.from_list([{"prompt": a, "completion": b} for a, b in halves])
    if kind == "preference":
        return Dataset.from_list(
            [{"prompt": a, "chosen": b, "rejected": b[::-1]} for a, b in halves]
        )
    roles = ("user", "assistant")
    return Dataset.from_list(
        [
            {"messages": [{"role": r, "content": c} for r, c in zip(roles, half, strict=True)]}
            for half in halves
        ]
    )


def pupil(
    tied: bool = True, lora: bool = False, grown: bool = False
) -> tuple[nn.Module, TokenDeltas]:
    """A model with rows for the new tokens, frozen but for a LoRA that already does something.

    With `grown`, it does not have the tokens yet.
    """
    words = pupil_tokenizer()
    ids = words.convert_tokens_to_ids(NEW)
    model: Any = llama(vocabulary=min(ids) if grown else len(words), width=16, tie=tied)
    if lora:
        torch.manual_seed(4)
        config = peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
        model = peft.get_peft_model(model, config)
    ends = None if tied else ["model.embed_tokens", "lm_head"]
    return model, random_rows(model, ids, targets=None if grown else ends, grow=grown)


def module_of(tied: bool = True, lora: bool = False, grown: bool = False) -> TokenModule:
    model, params = pupil(tied, lora, grown)
    return TokenModule(model, params, train_base=lora)


def log_probs(
    model: nn.Module, weights: Mapping[str, Tensor], batch: Mapping[str, Tensor]
) -> tuple[Tensor, Tensor]:
    """Those of the labels, from whole logits, and which positions are labelled."""
    inputs = {name: one for name, one in batch.items() if name != "labels"}
    logits = functional_call(model, weights, kwargs={**inputs, "use_cache": False}).logits
    labels = batch["labels"][:, 1:]
    each = F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), labels.flatten(), reduction="none")
    return -each.reshape(labels.shape), labels != -100


def by_hand(
    model: nn.Module, params: TokenDeltas, batches: Iterable[Mapping[str, Tensor]], dft: bool
) -> tuple[list[float], list[Tensor]]:
    """The losses, and what is trained, of a plain loop: AdamW, clipping, a linear schedule."""
    leaves = list(params.deltas.values())
    others = [p for p in model.parameters() if p.requires_grad]
    trained = [*(leaf.requires_grad_() for leaf in leaves), *others]
    optimizer = torch.optim.AdamW(trained, lr=SETTINGS["learning_rate"], weight_decay=0.0)
    steps = SETTINGS["max_steps"]
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / steps)
    losses = []
    model.train()
    for batch in batches:
        found, mask = log_probs(model, patch(params), batch)
        each = found * found.detach().exp() if dft else found
        loss = -(each * mask).sum() / mask.sum()
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
    return losses, [one.detach().clone() for one in trained]


def parts(module: TokenModule) -> list[Tensor]:
    """What a module trains, rows first."""
    return [one.detach().clone() for one in module.parameters()]


def losses_of(trainer: Any, name: str = "loss") -> list[float]:
    return [entry[name] for entry in trainer.state.log_history if name in entry]


def folder_of(path: Path) -> str:
    return str(path / "out")
