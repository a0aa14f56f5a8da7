"""Every causal, masked and sequence-to-sequence architecture of transformers, at toy size.

The reference is an edit in place of a copy of the model, and full training of it. No zero hides a
mistake: every parameter is perturbed, head biases and the bias buffers of some included.
"""

from __future__ import annotations

import contextlib
import copy
import inspect

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.helpers.architecture_sizes import EXCLUDED
from tests.helpers.architectures import (
    ARCHITECTURES,
    IDS,
    TARGETS,
    find_height,
    in_place,
    logits_of,
    new_rows,
    toy,
    with_state,
)
from tests.helpers.oracle import same_bits, snapshot
from tests.helpers.rows import random_rows
from ttfunc import functional_call, merge, patch, unmerge


@pytest.mark.parametrize("name", [name for name in ARCHITECTURES if name not in EXCLUDED])
def test_patched_is_edited(name: str):
    model, inputs = toy(name)
    params = new_rows(model, name)
    (delta,) = params.deltas.values()
    with torch.no_grad():  # first, as BigBird chooses its kind of attention here
        plain = logits_of(model(**inputs))
    before = snapshot(model)

    # Copied before the calls: RecurrentGemma keeps states of the last one, with their graph.
    merged = copy.deepcopy(model)
    reference, weight = in_place(model, name, params)
    expected = logits_of(reference(**inputs))
    expected.float().pow(2).mean().backward()
    assert not torch.allclose(plain, expected)

    for dense in (True, False):
        weights = patch(params, dense=dense)
        logits = logits_of(functional_call(model, weights, kwargs=inputs))
        (gradient,) = torch.autograd.grad(logits.float().pow(2).mean(), delta)
        if dense:
            assert torch.equal(logits, expected)
        torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)
        scale = weight.grad[IDS].abs().max().item()
        torch.testing.assert_close(gradient / scale, weight.grad[IDS] / scale, rtol=1e-3, atol=1e-4)
    assert snapshot(model) == before

    state = model.state_dict()
    merged.load_state_dict(merge(state, params))
    assert torch.equal(logits_of(merged(**inputs)), expected)
    assert same_bits(unmerge(merged.state_dict(), params), state)

    # torch's own cannot serve a module that is reached by two paths: it leaves its patch in it.
    (matrix,) = (row.matrix for row in params.specs.values())
    if len(matrix.names) == len(matrix.slots):
        theirs = torch.func.functional_call(model, patch(params), (), inputs)
        assert torch.equal(logits_of(theirs), logits)
        assert snapshot(model) == before


# Why these have no new tokens: another table of the same size, or a part of a wider matrix.
BOUNDED = {
    "BltForCausalLM": "index out of range",
    "DeepseekV4ForCausalLM": "is out of bounds for dimension 0 with size 99",
    "FSMTForConditionalGeneration": "index out of range",
    "Gemma4ForCausalLM": "index out of range",
    "Gemma4ForConditionalGeneration": "index out of range",
    "MobileBertForMaskedLM": "Sizes of tensors must match",
    "MusicgenForCausalLM": "index out of range",
    "MusicgenMelodyForCausalLM": "index out of range",
    "NeoMMEForMaskedLM": "index out of range",
    "PerceiverForMaskedLM": "must match the size",
}


# Their heads have another number of rows: a new token has no id that is one at both ends.
APART = {"CpmAntForCausalLM", "MllamaForCausalLM", "MoshiForCausalLM"}
# It cuts its logits by a count of its own.
CUT = {"Inkling2ForCausalLM"}


@pytest.mark.parametrize("name", [name for name in ARCHITECTURES if name not in EXCLUDED])
def test_a_call_with_new_tokens_is_that_of_the_merged_model(name: str):
    model, inputs = toy(name)
    height = find_height(model, name)
    new = [height, 5, height + 1]
    if name in APART:
        with pytest.raises(ValueError, match="a new token needs a row at both ends, under one id"):
            random_rows(model, new, grow=True)
        return
    params = random_rows(model, new, seed=1, targets=TARGETS.get(name), grow=True)
    with torch.no_grad():  # first, as BigBird chooses its kind of attention here
        model(**inputs)
    for ids in ("input_ids", "decoder_input_ids"):
        if ids in inputs:
            inputs[ids] = inputs[ids].clone()
            inputs[ids][:, 2:4] = torch.tensor(new[::2])
    before = snapshot(model)
    merged = with_state(model, merge(model.state_dict(), params))
    with torch.no_grad():
        if name in BOUNDED:
            with pytest.raises(
                (IndexError, RuntimeError, ValueError), match=BOUNDED[name]
            ) as caught:
                functional_call(model, patch(params), kwargs=inputs)
            assert "bounds its vocabulary elsewhere" in caught.value.__notes__[0]
            return
        told = pytest.warns(UserWarning, match="cuts its logits by a count of its own")
        with told if name in CUT else contextlib.nullcontext():
            logits = logits_of(functional_call(model, patch(params), kwargs=inputs))
        assert (logits.shape[-1] == height + 2) is (name not in CUT)
        expected = logits_of(merged(**inputs))
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)
    assert snapshot(model) == before


# Their labels are no ids of the text, or not one for each.
OTHER_LABELS = {"GitForCausalLM", "MusicgenForCausalLM", "MusicgenMelodyForCausalLM"}
OTHER_LABELS |= {"EncoderDecoderModel", "PerceiverForMaskedLM"}


@pytest.mark.parametrize("name", [name for name in ARCHITECTURES if name not in EXCLUDED])
def test_the_loss_without_the_logits_is_the_loss(name: str):
    model, inputs = toy(name)
    params = new_rows(model, name)
    with torch.no_grad():  # first, as BigBird chooses its kind of attention here
        model(**inputs)
    if "labels" in inspect.signature(model.forward).parameters and name not in OTHER_LABELS:
        text = inputs.get("decoder_input_ids", inputs.get("input_ids"))
        inputs["labels"] = torch.where(torch.arange(text.shape[1]) % 3 == 1, -100, text)

    def step(waits: bool) -> list[Tensor]:
        weights = patch(params, deferred_logits=waits)
        out = functional_call(model, weights, kwargs=inputs)
        loss, logits = out.get("loss"), logits_of(out)
        if loss is None:
            labels = torch.arange(logits.shape[:-1].numel()) % logits.shape[-1]
            loss = F.cross_entropy(logits.reshape(-1, logits.shape[-1]), labels)
        return [loss, *torch.autograd.grad(loss, list(params.deltas.values())), logits]

    for ours, plain in zip(step(True), step(False), strict=True):
        scale = plain.abs().max().item() + 1e-9
        torch.testing.assert_close(ours / scale, plain / scale, rtol=1e-3, atol=1e-5)


def test_the_sweep_is_wide():
    assert len(ARCHITECTURES) - len(EXCLUDED) >= 250
    assert EXCLUDED.keys() <= set(ARCHITECTURES)
