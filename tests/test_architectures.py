"""Every causal, masked and sequence-to-sequence architecture of transformers, at toy size.

The reference is an edit in place of a copy of the model, and full training of it. No zero hides a
mistake: every parameter is perturbed, head biases and the bias buffers of some included.
"""

from __future__ import annotations

import copy
import inspect
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.helpers.architecture_sizes import EXCLUDED
from tests.helpers.architectures import (
    ARCHITECTURES,
    IDS,
    TARGETS,
    find_height,
    in_place,
    logits_of,
    longer,
    new_rows,
    reloaded,
    toy,
    with_state,
)
from tests.helpers.checkpoints import contents
from tests.helpers.oracle import same_bits, snapshot
from tests.helpers.rows import random_rows
from ttfunc import (
    functional_call,
    merge,
    merge_checkpoint,
    patch,
    save,
    unmerge,
    unmerge_checkpoint,
)


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


# Why these have no new tokens: what is said of it, and in a note.
_ELSEWHERE = "bounds its vocabulary elsewhere"
_SHORTER = "a new token needs a row at both ends, under one id", ""
_SAID = "made no logits for them: it can never say one", ""
REFUSED = {
    # Another table of the same size, in a call.
    "BltForCausalLM": ("index out of range", _ELSEWHERE),
    "DeepseekV4ForCausalLM": ("index 99 is out of bounds for dimension 0", _ELSEWHERE),
    "FSMTForConditionalGeneration": ("index out of range", _ELSEWHERE),
    "Gemma4ForCausalLM": ("index out of range", _ELSEWHERE),
    "Gemma4ForConditionalGeneration": ("index out of range", _ELSEWHERE),
    "MusicgenForCausalLM": ("index out of range", _ELSEWHERE),
    "MusicgenMelodyForCausalLM": ("index out of range", _ELSEWHERE),
    "NeoMMEForMaskedLM": ("index out of range", _ELSEWHERE),
    # The matrix is a part of a wider one, or the head adds a bias that is not beside it.
    "MobileBertForMaskedLM": ("Sizes of tensors must match", _ELSEWHERE),
    "PerceiverForMaskedLM": ("must match the size", _ELSEWHERE),
    # A head of another height.
    "CpmAntForCausalLM": _SHORTER,
    "MllamaForCausalLM": _SHORTER,
    "MoshiForCausalLM": _SHORTER,
    # Logits that are cut by a count of its own: a warning.
    "Inkling2ForCausalLM": _SAID,
}
# The folders of these load, but what is loaded takes no new token either.
LOADED = {"BltForCausalLM", "Gemma4ForCausalLM", "Gemma4ForConditionalGeneration"}
LOADED |= {"Inkling2ForCausalLM", "FSMTForConditionalGeneration"}
# The folders of these would need the new rows in a second table, which the call does not read.
TWICE = {"IBertForMaskedLM"}
# What is said of the folders of the others.
UNLOADED = "at both ends, under one id|config of .* is the size of|no entry in the config of"
REFUSALS = (IndexError, RuntimeError, ValueError, UserWarning)
SWEPT = [name for name in ARCHITECTURES if name not in EXCLUDED]


def new_tokens(model: nn.Module, name: str, inputs: dict[str, Tensor]) -> tuple[list[int], dict]:
    """Two new tokens with an old one between them, and the inputs with these in them."""
    height = find_height(model, name)
    ids = [height, 5, height + 1]
    inputs = dict(inputs)
    for key in ("input_ids", "decoder_input_ids"):
        if key in inputs:
            inputs[key] = inputs[key].clone()
            inputs[key][:, 2:4] = torch.tensor(ids[::2])
    return ids, inputs


def called_with(model: nn.Module, ids: list[int], inputs: dict[str, Tensor], **options) -> Tensor:
    params = random_rows(model, ids, seed=1, **options)
    return logits_of(functional_call(model, patch(params), kwargs=inputs))


@pytest.mark.parametrize("name", SWEPT)
def test_a_call_with_new_tokens_is_that_of_a_longer_model(name: str):
    model, inputs = toy(name)
    with torch.no_grad():  # first, as BigBird chooses its kind of attention here
        plain = logits_of(model(**inputs))
    ids, inputs = new_tokens(model, name, inputs)
    before = snapshot(model)
    options = {"targets": TARGETS.get(name), "grow": True}
    with torch.no_grad():
        if name in REFUSED:
            with pytest.raises(REFUSALS, match=REFUSED[name][0]) as e:
                called_with(model, ids, inputs, **options)
            assert REFUSED[name][1] in "".join(getattr(e.value, "__notes__", ()))
            assert snapshot(model) == before
            return
        params = random_rows(model, ids, seed=1, **options)
        logits = logits_of(functional_call(model, patch(params), kwargs=inputs))
        expected = logits_of(longer(model, params)(**inputs))
    assert logits.shape[-1] == plain.shape[-1] + 2
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)
    assert snapshot(model) == before
    merged = with_state(model, merge(model.state_dict(), params))
    with torch.no_grad():
        torch.testing.assert_close(logits_of(merged(**inputs)), expected, rtol=1e-4, atol=1e-4)


def merged_rows(model: nn.Module, ids: list[int], folder: Path, **options) -> None:
    save(random_rows(model, ids, seed=1, **options), folder / "rows.safetensors")
    merge_checkpoint(folder / "model", folder / "rows.safetensors", folder / "merged")


@pytest.mark.parametrize("name", SWEPT)
@pytest.mark.parametrize("new", [False, True], ids=["old", "new"])
def test_rows_go_to_a_folder_that_transformers_loads(new: bool, name: str, tmp_path):
    model, inputs = toy(name)
    model.save_pretrained(tmp_path / "model")
    model = reloaded(model, tmp_path / "model")
    with torch.no_grad():
        model(**inputs)
    ids = IDS
    if new:
        ids, inputs = new_tokens(model, name, inputs)
    options = {"targets": TARGETS.get(name), "grow": new}
    rows, merged = tmp_path / "rows.safetensors", tmp_path / "merged"
    if new and name in {*REFUSED, *TWICE} - LOADED:
        with pytest.raises(ValueError, match=UNLOADED):
            merged_rows(model, ids, tmp_path, **options)
        assert not merged.exists()
        return
    params = random_rows(model, ids, seed=1, **options)
    save(params, rows)
    merge_checkpoint(tmp_path / "model", rows, merged)
    if new and name in LOADED:
        reloaded(model, merged)
        return
    with torch.no_grad():
        expected = logits_of(
            (longer(model, params) if new else in_place(model, name, params)[0])(**inputs)
        )
        found = logits_of(reloaded(model, merged)(**inputs))
        called = logits_of(functional_call(model, patch(params), kwargs=inputs))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(called, expected, rtol=1e-4, atol=1e-4)
    unmerge_checkpoint(merged, rows, tmp_path / "back")
    assert contents(tmp_path / "back") == contents(tmp_path / "model")


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
