"""Folders of PEFT's adapters: made by PEFT or by ttfunc, read by both, changed, refused."""

from __future__ import annotations

import copy
import json
import warnings
from pathlib import Path

import peft
import pytest
import torch
from torch import nn

from tests.helpers.oracle import same_bits, snapshot
from tests.helpers.peft_reference import far, inputs_of, logits, peft_deltas, quiet, run, toy
from ttfunc import TokenDeltas, merge, unmerge
from ttfunc.peft.load_peft import load_peft

APART = {"embed_tokens": [7, 3], "lm_head": [3, 41, 0]}


def save_with_peft(wrapped: peft.PeftModel, directory: Path) -> Path:
    with quiet():
        wrapped.save_pretrained(directory)
    return directory


def load_with_peft(load, *args) -> peft.PeftModel:
    """PEFT's model, and nothing that it warns of but what is deprecated in transformers."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        wrapped = load(*args)
    said = [str(warning.message) for warning in caught]
    assert [text for text in said if "is_gradient_checkpointing" not in text] == []
    return wrapped.eval()


def check_peft_reads(directory: Path, model: nn.Module, params: TokenDeltas) -> None:
    """PEFT gives the logits that ttfunc does, which are not the model's."""
    inputs = inputs_of(model, 7, 3)
    expected = run(model, params, inputs)
    assert far(expected, logits(model, inputs))
    wrapped = load_with_peft(peft.PeftModel.from_pretrained, copy.deepcopy(model), str(directory))
    torch.testing.assert_close(logits(wrapped, inputs), expected)
    assert same_bits(
        {name: delta.detach() for name, delta in peft_deltas(wrapped).items()},
        {name: delta.float() for name, delta in params.deltas.items()},
    )


def config_of(directory: Path) -> dict:
    return json.loads((directory / "adapter_config.json").read_text())


def change_config(directory: Path, **values) -> None:
    (directory / "adapter_config.json").write_text(json.dumps({**config_of(directory), **values}))


def refused(directory: Path, match: str, model=None, error=ValueError) -> None:
    """With a message that names the adapter, and the model as it was."""
    model = toy("llama_tied") if model is None else model
    before = snapshot(model)
    with pytest.raises(error, match=match) as caught:
        load_peft(directory, model)
    assert str(directory) in str(caught.value)
    assert snapshot(model) == before


def check_loaded(directory: Path, model: nn.Module, wrapped: peft.PeftModel) -> TokenDeltas:
    """The logits are PEFT's, the rows too, bit for bit, and the model is as it was."""
    before, inputs = snapshot(model), inputs_of(model, 7, 3)
    params = load_peft(directory, model)
    assert snapshot(model) == before
    theirs = {name: delta.detach() for name, delta in peft_deltas(wrapped).items()}
    assert same_bits(params.deltas, theirs)
    expected = logits(wrapped, inputs)
    torch.testing.assert_close(run(model, params, inputs), expected)
    assert far(expected, logits(model, inputs))
    state = model.state_dict()
    assert same_bits(unmerge(merge(state, params), params), state)
    assert not any(delta.requires_grad for delta in params.deltas.values())
    return params


def files_of(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}


def on_meta(model: nn.Module) -> nn.Module:
    with torch.device("meta"):
        return type(model)(model.config)
