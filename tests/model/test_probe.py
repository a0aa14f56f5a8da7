"""Which entries of its config are the height of a matrix, as transformers itself would have it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers

from tests.helpers.architectures import build, perturb
from tests.helpers.llama import llama
from tests.helpers.rows import random_rows
from ttfunc import (
    TokenModule,
    functional_call,
    load,
    merge_checkpoint,
    patch,
    save,
    unmerge_checkpoint,
)
from ttfunc.model.targets import find_targets

GROWS = {
    "BartForConditionalGeneration": {"vocab_size"},
    "EncoderDecoderModel": {"encoder.vocab_size", "decoder.vocab_size"},
    "FSMTForConditionalGeneration": {"src_vocab_size"},
    "FlaubertWithLMHeadModel": {"vocab_size"},
    "Gemma3nForCausalLM": {"vocab_size"},
    "LlamaForCausalLM": {"vocab_size"},
    "LukeForMaskedLM": {"vocab_size"},
    "BambaForCausalLM": {"vocab_size"},
    "PhiForCausalLM": {"vocab_size"},
    "T5GemmaForConditionalGeneration": {
        "vocab_size", "encoder.vocab_size", "decoder.vocab_size",
    },
    "XLMWithLMHeadModel": {"vocab_size"},
}  # fmt: skip


def toy(name: str) -> tuple[Any, dict[str, torch.Tensor]]:
    model, inputs = build(name)
    perturb(model)
    return model.requires_grad_(False), inputs


def entries(value: Any, path: str = "") -> dict[str, object]:
    if not isinstance(value, dict):
        return {path.removeprefix("."): value}
    return {k: v for key, one in value.items() for k, v in entries(one, f"{path}.{key}").items()}


def config_in(folder: Path) -> dict[str, object]:
    return entries(json.loads((folder / "config.json").read_text()))


@pytest.mark.filterwarnings("ignore:this FSMT.*made no logits for them")  # only its input grows
@pytest.mark.parametrize("name", GROWS)
def test_a_folder_with_new_tokens_is_loaded_by_transformers_and_goes_back(name: str, tmp_path):
    model, inputs = toy(name)
    (target,) = find_targets(model, None).values()
    height = len(target.weight)
    params = random_rows(model, [height, height + 1], grow=True)
    inputs["input_ids"][0, 2] = height + 1
    with torch.no_grad():
        expected = functional_call(model, patch(params), kwargs=inputs).logits
    model.save_pretrained(tmp_path / "base")
    merge_checkpoint(tmp_path / "base", params, tmp_path / "merged")
    TokenModule(model, params).save_pretrained(tmp_path / "saved")
    before, after = config_in(tmp_path / "base"), config_in(tmp_path / "merged")
    changed = {key for key in after if after[key] != before.get(key)}
    assert {key for key in GROWS[name] if key in before} <= changed <= GROWS[name]
    assert config_in(tmp_path / "saved") == after
    for folder in ("merged", "saved"):
        loaded = type(model).from_pretrained(tmp_path / folder).eval()
        with torch.no_grad():
            torch.testing.assert_close(loaded(**inputs).logits, expected, rtol=1e-4, atol=1e-4)
    unmerge_checkpoint(tmp_path / "merged", params, tmp_path / "back")
    for path in (tmp_path / "base").iterdir():
        assert path.read_bytes() == (tmp_path / "back" / path.name).read_bytes()


REFUSED = {
    "CpmAntForCausalLM": "lm_head.weight",
    "MllamaForCausalLM": "lm_head.weight",
    "MobileBertForMaskedLM": "cls.predictions.dense.weight",
    "MoshiForCausalLM": "lm_head.weight",
    "NeoMMEForMaskedLM": "model.value_embeddings.weight",
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_folder_that_could_not_be_loaded_is_refused(name: str, tmp_path):
    model, _ = toy(name)
    (target,) = find_targets(model, None).values()
    params = random_rows(
        model, [len(target.weight)], grow=True, targets=[*find_targets(model, None)]
    )
    model.save_pretrained(tmp_path / "base")
    match = rf"\['vocab_size'\] in the config of {name} is the size of .* and of \['{REFUSED[name]}"
    with pytest.raises(ValueError, match=match):
        merge_checkpoint(tmp_path / "base", params, tmp_path / "merged")
    with pytest.raises(ValueError, match=match):
        TokenModule(model, params).save_pretrained(tmp_path / "saved")
    assert [path.name for path in tmp_path.iterdir()] == ["base"]


def test_a_second_table_of_the_same_height_keeps_its_own():
    model, _ = toy("Gemma3nForCausalLM")
    height = len(model.model.embed_tokens.weight)
    tables = ["embed_tokens", "embed_tokens_per_layer"]
    for targets in (["embed_tokens"], tables):
        params = random_rows(model, [height], grow=True, targets=targets)
        sizes = [spec.origin.sizes for spec in params.specs.values()]
        names = ["vocab_size", "vocab_size_per_layer_input"][: len(targets)]
        assert sizes == [{name: height} for name in names]


def test_a_size_that_a_config_leaves_out(tmp_path):
    # Earlier versions of transformers write no size of a part with which its class starts.
    text = transformers.LlamaConfig(
        hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2
    )
    config = transformers.LlavaConfig(
        text_config=text,
        vision_config=transformers.CLIPVisionConfig(
            hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2,
            image_size=8, patch_size=4,
        ),
    )  # fmt: skip
    model = transformers.LlavaForConditionalGeneration(config).eval().requires_grad_(False)
    height = text.vocab_size
    model.save_pretrained(tmp_path / "base")
    written = json.loads((tmp_path / "base" / "config.json").read_text())
    del written["text_config"]["vocab_size"]
    (tmp_path / "base" / "config.json").write_text(json.dumps(written, indent=2))
    params = random_rows(model, [height], grow=True)
    names = {
        "model.language_model.embed_tokens.weight": "language_model.model.embed_tokens.weight",
        "lm_head.weight": "language_model.lm_head.weight",
    }
    merge_checkpoint(tmp_path / "base", params, tmp_path / "merged", names=names)
    loaded = type(model).from_pretrained(tmp_path / "merged").eval()
    x = torch.tensor([[3, height, 7]])
    with torch.no_grad():
        expected = functional_call(model, patch(params), (x,)).logits
        torch.testing.assert_close(loaded(x).logits, expected)
    unmerge_checkpoint(tmp_path / "merged", params, tmp_path / "back", names=names)
    back = (tmp_path / "back" / "config.json").read_bytes()
    assert back == (tmp_path / "base" / "config.json").read_bytes()


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")
def test_the_model_is_found_in_its_wrappers():
    base = llama(tie=False)
    expected = random_rows(base, [23], grow=True)
    config = peft.LoraConfig(r=2, target_modules=["q_proj"])
    params = random_rows(peft.get_peft_model(llama(tie=False), config), [23], grow=True)
    for key, spec in expected.specs.items():
        wrapped = params.specs[f"base_model.model.{key}"].origin
        assert (wrapped.model, wrapped.kind) == (spec.origin.model, spec.origin.kind)
        assert wrapped.sizes == spec.origin.sizes == {"vocab_size": 23}
        assert wrapped.shared == tuple(f"base_model.model.{name}" for name in spec.origin.shared)


def test_asking_draws_no_random_number_and_leaves_the_model():
    model = llama()
    state, default = torch.get_rng_state(), torch.get_default_dtype()
    before = model.config.to_dict()
    random_rows(model, [23], grow=True)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.get_default_dtype() == default
    assert model.config.to_dict() == before


def test_a_class_that_cannot_be_asked_is_taken_by_value(tmp_path):
    class Own(transformers.LlamaForCausalLM):
        def __init__(self, config: Any, needed: object) -> None:
            super().__init__(config)

    model = Own(llama().config, None).eval().requires_grad_(False)
    params = random_rows(model, [23], grow=True)
    assert params.specs["model.embed_tokens.weight"].origin.sizes is None
    model.save_pretrained(tmp_path / "base")
    save(params, tmp_path / "rows")
    merge_checkpoint(tmp_path / "base", tmp_path / "rows", tmp_path / "merged")
    assert config_in(tmp_path / "merged")["vocab_size"] == 24
    known = load(tmp_path / "rows", llama_of(model))
    assert known.specs["model.embed_tokens.weight"].origin.sizes == {"vocab_size": 23}


def llama_of(model: Any) -> transformers.LlamaForCausalLM:
    made = transformers.LlamaForCausalLM(model.config).eval().requires_grad_(False)
    made.load_state_dict(model.state_dict())
    return made
