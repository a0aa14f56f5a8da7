"""A call at work: other methods, generation, checkpointing of activations, devices."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tests.helpers.llama import llama
from tests.helpers.models import make, tokens
from tests.helpers.oracle import edited, snapshot
from tests.helpers.rows import random_rows
from ttfunc import functional_call, init_deltas, merge, patch

X = tokens(7, 3)


def test_another_method_is_called():
    model = make("tied")
    expected = edited(model, random_rows(model)).embed(X)
    assert torch.equal(
        functional_call(model, patch(random_rows(model)), X, method="embed"), expected
    )
    with pytest.raises(AttributeError, match="Language has no method 'generate' to call"):
        functional_call(model, patch(random_rows(model)), X, method="generate")
    with pytest.raises(AttributeError, match="no method 'body.weight'"):
        functional_call(model, patch(random_rows(model)), X, method="body.weight")


@pytest.mark.parametrize("tie", [True, False])
@pytest.mark.parametrize("options", [{}, {"num_beams": 3}, {"do_sample": True}], ids=str)
def test_generate_is_that_of_the_merged_model(tie: bool, options: dict):
    model = llama(tie=tie, layers=1)
    params, x = random_rows(model, targets="embed_tokens"), X.clone()
    x[:, -1] = 7  # each text goes on from a new row
    merged = copy.deepcopy(model)
    merged.load_state_dict(merge(model.state_dict(), params))

    def generated(call):
        torch.manual_seed(1)
        return call({"input_ids": x, "max_new_tokens": 8, "pad_token_id": 0, **options})

    expected = generated(lambda kwargs: merged.generate(**kwargs))
    before = snapshot(model)
    found = generated(
        lambda kwargs: functional_call(model, patch(params), kwargs=kwargs, method="generate")
    )
    assert torch.equal(found, expected)
    assert not torch.equal(generated(lambda kwargs: model.generate(**kwargs)), expected)
    assert snapshot(model) == before


def test_gradient_checkpointing_in_the_blocks_changes_nothing():
    model = llama().train().requires_grad_()

    def gradient() -> torch.Tensor:
        params = random_rows(model, requires_grad=True)
        functional_call(model, patch(params), kwargs={"input_ids": X, "labels": X}).loss.backward()
        (delta,) = params.deltas.values()
        return delta.grad

    plain = gradient()
    model.activation_checkpointing_enable()
    assert torch.equal(gradient(), plain)
    assert plain.abs().sum() > 0


class Devices(TorchDispatchMode):
    """Notes each operation that sees another device than its results are on."""

    def __init__(self) -> None:
        super().__init__()
        self.count, self.moves = 0, []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        tensors = [t for t in tree_leaves((args, kwargs, out)) if isinstance(t, torch.Tensor)]
        self.count += 1
        if {t.device.type for t in tensors} != {"meta"}:
            self.moves.append(str(func))
        return out


@pytest.mark.parametrize("case", ["tied", "untied", "biased", "encoder_decoder", "einsum"])
def test_a_step_moves_nothing_between_devices_and_waits_for_none(case: str):
    # On meta, whatever asks for a value raises, as it would make a GPU wait.
    model = make(case).requires_grad_(False).to("meta")
    a = init_deltas(model, [7, 3], requires_grad=True)
    b = init_deltas(model, [5], requires_grad=True)
    x, y = X.to("meta"), X.flatten().to("meta")

    def step() -> None:
        logits = functional_call(model, patch(a, b), (x,))
        nn.functional.cross_entropy(logits.flatten(0, -2), y).backward()

    step()  # makes the tables
    with Devices() as devices:
        step()
    assert devices.count > 20
    assert devices.moves == []
