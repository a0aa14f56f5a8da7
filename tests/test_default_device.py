"""A default device moves nothing of a model that lies on another one: each job is as without it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import optree
import pytest
import torch
from torch import Tensor, nn

import ttfunc
from tests.helpers.checkpoints import contents
from tests.helpers.llama import llama
from tests.helpers.rows import random_rows

BOTH = ["embed_tokens", "lm_head"]
IDS = [5, 7, 9]
X = torch.tensor([[5, 1, 7], [2, 9, 4]])


class Words:
    """A tokenizer with a word for each id."""

    def convert_ids_to_tokens(self, token: int) -> str:
        return f"w{token}"

    def decode(self, tokens: list[int], **options: object) -> str:
        return "".join(map(self.convert_ids_to_tokens, tokens))


def rows(model: nn.Module, seed: int = 1) -> ttfunc.TokenDeltas:
    return random_rows(model, IDS, targets=BOTH, seed=seed)


def exported(model: nn.Module, params: ttfunc.TokenDeltas) -> Tensor:
    program = ttfunc.Exportable(model, targets=BOTH)
    return program(*program.inputs(params, rows=4), X).logits


def trained(model: nn.Module) -> Tensor:
    module = ttfunc.TokenModule(model, rows(model))
    module(input_ids=X, labels=X).loss.backward()
    return torch.cat([one.grad for one in module.parameters() if one.grad is not None])


def grown(model: nn.Module, folder: Path) -> ttfunc.TokenDeltas:
    height = model.get_input_embeddings().num_embeddings
    return ttfunc.init_deltas(model, [height, height + 1], grow=True, init="mean", targets=BOTH)


JOBS: dict[str, Callable[[nn.Module, Path], Any]] = {
    "init": lambda model, folder: ttfunc.init_deltas(model, IDS, init="mean", targets=BOTH),
    "new tokens": grown,
    "call": lambda model, folder: (
        ttfunc.functional_call(model, ttfunc.patch(rows(model)), X).logits
    ),
    "loss without logits": lambda model, folder: (
        ttfunc.functional_call(
            model, ttfunc.patch(rows(model), deferred_logits=True), X, {"labels": X}
        ).loss
    ),
    "mixed": lambda model, folder: (
        ttfunc.functional_call(
            model, ttfunc.patch_mixed([rows(model, 1), rows(model, 2)], [1, -1]), X
        ).logits
    ),
    "module": lambda model, folder: trained(model),
    "merge": lambda model, folder: ttfunc.merge(model.state_dict(), rows(model)),
    "combine": lambda model, folder: ttfunc.combine(
        rows(model), random_rows(model, [1], targets=BOTH)
    ),
    "stack": lambda model, folder: ttfunc.stack([rows(model, 1), rows(model, 2)]),
    "program": lambda model, folder: exported(model, rows(model)),
    "summary": lambda model, folder: str(ttfunc.summary(model, rows(model), tokenizer=Words())),
    "save": lambda model, folder: ttfunc.save(rows(model), folder / "rows.safetensors"),
    "save and load": lambda model, folder: (
        ttfunc.save(rows(model), folder / "rows.safetensors"),
        ttfunc.load(folder / "rows.safetensors", model),
    ),
    "save_peft and load_peft": lambda model, folder: (
        ttfunc.save_peft(rows(model), folder / "adapter"),
        ttfunc.load_peft(folder / "adapter", model),
    ),
    "save_as_lora": lambda model, folder: ttfunc.save_as_lora(rows(model), folder / "lora"),
    "merge_checkpoint": lambda model, folder: (
        model.save_pretrained(folder / "model"),
        ttfunc.merge_checkpoint(folder / "model", rows(model), folder / "merged"),
    ),
}


@pytest.mark.parametrize("job", JOBS)
def test_a_job_is_as_without_a_default_device(job: str, tmp_path: Path):
    found = []
    for device in ("cpu", "meta"):  # a tensor that is made there has no values to be right with
        model, folder = llama(tie=False).requires_grad_(False), tmp_path / device
        folder.mkdir()
        with torch.device(device):
            result = JOBS[job](model, folder)
        leaves = [one for one in optree.tree_leaves(result) if one is not None]
        found.append((leaves, contents(folder)))
    (wanted, files), (leaves, others) = found
    assert files == others
    for one, other in zip(wanted, leaves, strict=True):
        if isinstance(one, Tensor):
            assert other.device.type == "cpu"
            torch.testing.assert_close(other, one)
        elif not isinstance(one, Path):
            assert other == one
