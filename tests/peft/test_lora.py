"""A LoRA and rows as one adapter: written once, loaded by PEFT to the same logits, and merged."""

from __future__ import annotations

import copy
import subprocess
import sys
from pathlib import Path

import peft
import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from tests.helpers.llama import llama
from tests.helpers.peft_folders import config_of, load_with_peft
from tests.helpers.peft_reference import quiet
from tests.helpers.rows import random_rows
from ttfunc import (
    TokenDeltas,
    functional_call,
    init_deltas,
    load,
    load_peft,
    merge,
    patch,
    save,
    save_peft,
    unmerge,
)

pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")

IDS = [7, 3]
X = torch.tensor([[3, 7, 5, 9, 1, 4], [7, 2, 8, 3, 6, 11]])
ENDS = ["model.embed_tokens", "lm_head"]


def with_lora(model, name="default", **options) -> peft.PeftModel:
    """The model with a LoRA that does something."""
    config = peft.LoraConfig(
        **{"r": 2, "target_modules": ["q_proj", "v_proj"], "init_lora_weights": False, **options}
    )
    with quiet():
        return peft.get_peft_model(model, config, adapter_name=name).eval()


def both(tie: bool, inside: bool) -> tuple[peft.PeftModel, TokenDeltas]:
    """A model with a LoRA, and rows that were made before it came or after."""
    plain = llama(tie=tie)
    targets = None if tie else ENDS
    before = random_rows(plain, IDS, targets=targets)
    model = with_lora(plain)
    return model, (random_rows(model, IDS, targets=targets) if inside else before)


def said(model, params=None) -> Tensor:
    weights = {} if params is None else patch(params)
    with torch.no_grad():
        return functional_call(model, weights, kwargs={"input_ids": X}).logits


CASES = pytest.mark.parametrize("inside", [False, True], ids=["rows first", "LoRA first"])
TIES = pytest.mark.parametrize("tie", [True, False], ids=["tied", "untied"])


@CASES
@TIES
def test_peft_loads_both_to_the_same_logits(tmp_path, tie, inside):
    model, params = both(tie, inside)
    expected = said(model, params)
    save_peft(params, tmp_path / "adapter", adapter=model)
    wrapped = load_with_peft(
        peft.PeftModel.from_pretrained, llama(tie=tie), str(tmp_path / "adapter")
    )
    with torch.no_grad():
        torch.testing.assert_close(wrapped(X).logits, expected)
    assert not torch.allclose(expected, said(model), atol=1e-3)
    config = config_of(tmp_path / "adapter")
    assert (config["peft_type"], config["r"]) == ("LORA", 2)
    told = {"model.embed_tokens": IDS} if tie else dict.fromkeys(ENDS, IDS)
    assert config["trainable_token_indices"] == told


@CASES
def test_the_directory_gives_the_rows_and_peft_the_rest(tmp_path, inside):
    model, params = both(True, inside)
    save_peft(params, tmp_path, adapter=model)
    # As the page on examples has it:
    config = peft.LoraConfig.from_pretrained(tmp_path)
    config.trainable_token_indices = None
    again = peft.get_peft_model(llama(), config)
    weights = peft.load_peft_weights(tmp_path, device="cpu")
    others = {k: v for k, v in weights.items() if ".token_adapter." not in k}
    peft.set_peft_model_state_dict(again, others)
    rows = load_peft(tmp_path, again)
    torch.testing.assert_close(said(again, rows), said(model, params), rtol=0, atol=0)
    with pytest.warns(UserWarning, match="only the token rows .* 8 other tensors are not"):
        alone = load_peft(tmp_path, llama())
    (delta,), (other,) = rows.deltas.values(), alone.deltas.values()
    assert torch.equal(delta, other)


@CASES
@TIES
def test_both_are_merged_into_a_folder_that_transformers_loads(tmp_path, tie, inside):
    model, params = both(tie, inside)
    expected = said(model, params)
    save(params, tmp_path / "rows.safetensors")
    plain = copy.deepcopy(model).merge_and_unload()
    # The names with and without PEFT's prefix are one here: of the state dict, the file, the call.
    torch.testing.assert_close(said(plain, load(tmp_path / "rows.safetensors", plain)), expected)
    merged = merge(plain.state_dict(), params)
    for name, tensor in unmerge(merged, params).items():
        assert torch.equal(tensor, plain.state_dict()[name])
    plain.load_state_dict(merged)
    plain.save_pretrained(tmp_path / "merged")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    torch.testing.assert_close(said(loaded), expected)


@CASES
def test_a_call_takes_rows_of_the_model_with_or_without_peft(inside):
    model, params = both(True, inside)
    expected = said(model, params)
    for other in (model.base_model.model, model):
        torch.testing.assert_close(said(other, params), expected, rtol=0, atol=0)
    with pytest.raises(ValueError, match="stale patch"):
        said(with_lora(llama()), params)
    model.unload()
    plain = llama()
    plain.load_state_dict(merge(plain.state_dict(), params))
    torch.testing.assert_close(said(model.base_model.model, params), said(plain))


@pytest.mark.parametrize(
    "options", [{"bias": "all"}, {"bias": "lora_only"}, {"modules_to_save": ["lm_head"]}]
)
def test_what_else_peft_saves_is_left_to_peft(tmp_path, options):
    plain = llama(tie=False, attention_bias=True)
    params = random_rows(plain, IDS, targets="embed_tokens")
    model = with_lora(plain, **options)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.01 * parameter.requires_grad)
    expected = said(model, params)
    save_peft(params, tmp_path, adapter=model)
    config = peft.LoraConfig.from_pretrained(tmp_path)
    config.trainable_token_indices = None
    again = peft.get_peft_model(llama(tie=False, attention_bias=True), config)
    weights = peft.load_peft_weights(tmp_path, device="cpu")
    others = {k: v for k, v in weights.items() if ".token_adapter." not in k}
    peft.set_peft_model_state_dict(again, others)
    torch.testing.assert_close(said(again, load_peft(tmp_path, again)), expected)


def test_with_a_lora_on_the_same_matrix_the_rows_are_merged_first():
    model = with_lora(llama(tie=False), target_modules=["embed_tokens", "q_proj"])
    params = random_rows(model, IDS, targets="embed_tokens.base_layer")
    expected = said(model, params)
    model.load_state_dict(merge(model.state_dict(), params))
    torch.testing.assert_close(said(model.merge_and_unload()), expected)


def test_the_rows_alone_of_a_model_in_peft_are_an_adapter_of_the_model(tmp_path):
    _model, params = both(True, inside=True)
    save_peft(params, tmp_path)
    plain = llama()
    wrapped = load_with_peft(peft.PeftModel.from_pretrained, plain, str(tmp_path))
    expected = llama()
    expected.load_state_dict(merge(expected.state_dict(), params))
    with torch.no_grad():
        torch.testing.assert_close(wrapped(X).logits, said(expected))


def test_a_process_without_ttfunc_loads_the_directory(tmp_path):
    model, params = both(True, inside=True)
    llama().save_pretrained(tmp_path / "base")
    save_peft(params, tmp_path / "adapter", adapter=model, base_model=str(tmp_path / "base"))
    torch.save(X, tmp_path / "x.pt")
    script = (
        "import sys, torch, peft\n"
        "model = peft.AutoPeftModelForCausalLM.from_pretrained(sys.argv[1] + '/adapter')\n"
        "x = torch.load(sys.argv[1] + '/x.pt')\n"
        "with torch.no_grad(): torch.save(model(x).logits, sys.argv[1] + '/logits.pt')\n"
        "assert 'ttfunc' not in sys.modules\n"
    )
    command = [sys.executable, "-W", "ignore", "-c", script, str(tmp_path)]
    subprocess.run(command, check=True, cwd="/", capture_output=True, timeout=300)  # noqa: S603
    torch.testing.assert_close(torch.load(tmp_path / "logits.pt"), said(model, params))


# Refused


def refused(tmp_path: Path, match: str, params, adapter, error=ValueError) -> None:
    with pytest.raises(error, match=match):
        save_peft(params, tmp_path / "adapter", adapter=adapter)
    assert not (tmp_path / "adapter").exists()


def test_a_lora_over_the_same_matrix_is_refused(tmp_path):
    model = with_lora(llama(tie=False), target_modules=["embed_tokens", "q_proj"])
    params = random_rows(model, IDS, targets="embed_tokens.base_layer")
    assert next(iter(params.specs.values())).names[0].endswith("embed_tokens.base_layer.weight")
    refused(tmp_path, "a module that has a LoRA too", params, model)


def test_a_lora_over_the_tied_head_is_refused(tmp_path):
    plain = llama()
    params = random_rows(plain, IDS)
    model = with_lora(plain, target_modules=["lm_head"])
    refused(tmp_path, r"lm_head.lora_A.weight' for 'lm_head', which also has rows", params, model)


def test_a_matrix_that_peft_trains_whole_is_refused(tmp_path):
    plain = llama(tie=False)
    params = random_rows(plain, IDS, targets="embed_tokens")
    model = with_lora(plain, modules_to_save=["embed_tokens"])
    refused(tmp_path, "'model.embed_tokens', which also has rows", params, model)
    with pytest.raises(ValueError, match="whole copy of '.*embed_tokens', .*modules_to_save"):
        init_deltas(model, IDS)


def test_rows_of_a_module_that_is_saved_whole_are_refused(tmp_path):
    model = with_lora(llama(tie=False), modules_to_save=["lm_head"])
    params = random_rows(model, IDS, targets="lm_head.modules_to_save.default")
    refused(tmp_path, "of a module that PEFT trains whole", params, model)


def test_two_active_adapters_are_refused(tmp_path):
    model, params = both(True, inside=True)
    model.add_adapter("other", peft.LoraConfig(r=2, target_modules=["k_proj"]))
    model.base_model.set_adapter(["default", "other"])
    refused(tmp_path, r"the adapters \['default', 'other'\] are active", params, model)
    model.set_adapter("other")
    save_peft(params, tmp_path / "adapter", adapter=model)
    assert config_of(tmp_path / "adapter")["target_modules"] == ["k_proj"]


def test_an_adapter_of_another_model_is_refused(tmp_path):
    _model, params = both(True, inside=True)
    refused(
        tmp_path, "from another model than the one in this PeftModel", params, with_lora(llama())
    )


def test_what_is_no_lora_is_refused(tmp_path):
    plain = llama()
    params = random_rows(plain, IDS)
    refused(tmp_path, "must be a peft.PeftModel .* got LlamaFor", params, plain, TypeError)
    config = peft.IA3Config(target_modules=["q_proj"], feedforward_modules=[])
    refused(tmp_path, "the adapter is a IA3", params, peft.get_peft_model(plain, config))
    plain = llama()
    params = random_rows(plain, IDS)
    own = with_lora(plain, trainable_token_indices=[9])
    refused(tmp_path, r"token rows of its own, trainable_token_indices=\[9\]", params, own)


def test_a_saved_lora_is_not_lost(tmp_path):
    model, params = both(True, inside=True)
    save_peft(params, tmp_path / "adapter", adapter=model)
    before = {path.name: path.read_bytes() for path in (tmp_path / "adapter").iterdir()}
    with pytest.raises(FileExistsError, match="not of token rows alone"):
        save_peft(params, tmp_path / "adapter", adapter=model)
    assert {path.name: path.read_bytes() for path in (tmp_path / "adapter").iterdir()} == before
