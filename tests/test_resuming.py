"""A training state on disk: the training goes on bit for bit, without the base."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import optree
import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests.helpers.clients import IDS, batch, loss_at, trainable
from tests.helpers.models import make
from tests.helpers.oracle import bits
from ttfunc import init_deltas

NAME = "embed_tokens.weight"


class Training:
    """A run of Adam on the rows, whose batches depend on how far it is."""

    def __init__(self, case: str) -> None:
        self.model = make(case).requires_grad_(False)
        self.params = trainable(init_deltas(self.model, IDS, init="mean"))
        self.optimizer = torch.optim.Adam(optree.tree_leaves(self.params), lr=0.1, amsgrad=True)
        self.step = 0

    def run(self, until: int) -> Training:
        for step in range(self.step, until):
            self.optimizer.zero_grad()
            loss_at(self.model, self.params, batch(step)).backward()
            self.optimizer.step()
        self.step = until
        return self

    def tensors(self) -> dict[str, Tensor]:
        """All that the next step depends on."""
        moments = self.optimizer.state_dict()["state"]
        return {
            "step": torch.tensor(self.step),
            **{f"rows.{name}": rows.detach() for name, rows in self.params.deltas.items()},
            **{f"{i}.{k}": tensor for i, kept in moments.items() for k, tensor in kept.items()},
        }


def by_checkpoint(folder: Path) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """torch.distributed.checkpoint, with what torch.optim and a pytree give it."""

    def state_of(training: Training) -> dict[str, Any]:
        return {
            "params": training.params.deltas,
            "optimizer": training.optimizer.state_dict(),
            "step": training.step,
        }

    def save(training: Training) -> None:
        dcp.save(state_of(training), checkpoint_id=folder, no_dist=True)

    def load(training: Training) -> None:
        state = state_of(training)
        dcp.load(state, checkpoint_id=folder, no_dist=True)  # into the tensors that are there
        training.optimizer.load_state_dict(state["optimizer"])
        training.step = state["step"]

    return save, load


def by_safetensors(folder: Path) -> tuple[Callable[..., Any], Callable[..., Any]]:
    def save(training: Training) -> None:
        save_file(training.tensors(), folder / "state.safetensors")

    def load(training: Training) -> None:
        saved = load_file(folder / "state.safetensors")
        training.step = int(saved.pop("step"))
        for name, tensor in training.tensors().items():
            if name != "step":
                tensor.copy_(saved[name])

    return save, load


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")  # one process is meant
@pytest.mark.parametrize("case", ["tied", "untied"])
@pytest.mark.parametrize("way", [by_checkpoint, by_safetensors])
def test_a_training_resumes_bit_for_bit(case: str, way, tmp_path: Path):
    save, load = way(tmp_path)
    save(Training(case).run(3))
    resumed = Training(case).run(1)  # which makes the optimizer's tensors, to be loaded into
    load(resumed)
    assert resumed.step == 3
    found, expected = resumed.run(7).tensors(), Training(case).run(7).tensors()
    assert {name: bits(t) for name, t in found.items()} == {
        name: bits(t) for name, t in expected.items()
    }


def test_a_saved_state_holds_no_matrix_of_the_base(tmp_path: Path):
    save, _ = by_safetensors(tmp_path)
    training = Training("tied").run(1)
    save(training)
    saved = load_file(tmp_path / "state.safetensors")
    assert all(tensor.numel() <= training.params.deltas[NAME].numel() for tensor in saved.values())
