"""Copies and averages of a TokenModule: rows of their own over one model."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from tests.helpers.lessons import IDS, NAME, TOKENS, bridge
from ttfunc import init_deltas
from ttfunc.module.token_module import TokenModule


def test_a_copy_has_rows_of_its_own_over_the_same_model():
    module = bridge()
    module.config.note = object()  # would be lost in a copy of the model
    twin = copy.deepcopy(module)
    assert twin.base is module.base
    x = torch.tensor([TOKENS])
    before = module(x).logits
    with torch.no_grad():
        next(twin.parameters()).zero_()
    assert torch.equal(module(x).logits, before)
    assert not torch.equal(twin(x).logits, before)


def test_an_average_of_it_averages_the_rows():
    module = bridge()
    average = torch.optim.swa_utils.AveragedModel(module)
    average.update_parameters(module)
    expected = module.params().deltas[NAME].detach() / 2
    with torch.no_grad():
        next(module.parameters()).zero_()
    average.update_parameters(module)
    assert torch.equal(average.module.params().deltas[NAME], expected)


def test_a_copy_does_not_move_or_switch_the_base_of_the_original():
    module = bridge()
    copied = copy.deepcopy(module).to("meta")
    assert {p.device.type for p in copied.parameters()} == {"meta"}
    assert {p.device.type for p in module.base.parameters()} == {"cpu"}
    other = copy.deepcopy(module.train()).eval()
    assert module.base.training
    other(torch.tensor([[1, 2]]))
    assert module.base.training
    assert not copy.deepcopy(other).training


class Normed(nn.Module):
    """Tells in which mode each of its parts ran."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.norm, self.other = nn.Embedding(9, 4), nn.BatchNorm1d(4), nn.Dropout(0.5)

    def forward(self, x):
        self.norm(self.embed(x))
        return self.training, self.norm.training, self.other.training


def test_a_copy_has_modes_of_its_own():
    model, x = Normed().requires_grad_(False), torch.arange(9)
    module = TokenModule(model, init_deltas(model, [3])).train()
    model.norm.eval()
    mean = model.norm.running_mean.clone()
    twin, evaluated = copy.deepcopy(module), copy.deepcopy(module).eval()
    assert module(x) == twin(x) == (True, False, True)
    assert evaluated(x) == (False, False, False)
    assert module(x) == (True, False, True)
    module.eval()
    assert module(x) == (False, False, False)
    assert twin(x) == copy.deepcopy(twin)(x) == (True, False, True)
    assert [m.training for m in model.modules()] == [False] * 4
    assert torch.equal(model.norm.running_mean, mean)
    assert evaluated.train()(x) == (True, True, True)
    assert not torch.equal(model.norm.running_mean, mean)


@pytest.mark.parametrize("first", ["module", "teacher"])
def test_a_copy_of_what_holds_the_model_too_copies_the_model(first: str):
    module = bridge()
    parts = {"module": module, "teacher": module.base}
    container = nn.ModuleDict({first: parts.pop(first), **parts})
    twin = copy.deepcopy(container)
    assert twin["teacher"] is not module.base
    assert twin["module"].base is module.base
    x = torch.tensor([TOKENS])
    assert torch.equal(twin["module"](x).logits, module(x).logits)


def test_an_average_with_buffers_keeps_the_token_ids():
    module = bridge()
    ema = torch.optim.swa_utils.get_ema_avg_fn(0.9)
    average = torch.optim.swa_utils.AveragedModel(module, avg_fn=ema, use_buffers=True)
    for _ in range(3):
        average.update_parameters(module)
    assert average.module.state_dict()[IDS].tolist() == TOKENS
    module.load_state_dict(average.module.state_dict())
