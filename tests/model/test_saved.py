"""The names of matrices in folders that transformers saves, of models that it renames there.

The reference is the folder itself.
"""

from __future__ import annotations

import re
import sys
from dataclasses import replace
from pathlib import Path

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file
from torch import nn

from tests.helpers.architectures import find_height, logits_of, reloaded, toy
from tests.helpers.checkpoints import contents, tensors_of
from tests.helpers.oracle import same_bits
from tests.helpers.peft_reference import quiet
from tests.helpers.rows import random_rows
from ttfunc import (
    TokenDeltas,
    functional_call,
    load,
    merge,
    merge_checkpoint,
    patch,
    save,
    unmerge,
    unmerge_checkpoint,
)
from ttfunc.disk.rows_file import read
from ttfunc.model.names import saved_names
from ttfunc.model.origin import Origin

RENAMED = [
    "LlavaForConditionalGeneration",
    "Qwen2VLForConditionalGeneration",
    "PaliGemmaForConditionalGeneration",
    "FuyuForCausalLM",
    "Gemma3ForConditionalGeneration",
    "GPTNeoXForCausalLM",
    "T5Gemma2ForConditionalGeneration",
    "UltrabertForMaskedLM",
]
GEMMA = "Gemma3ForConditionalGeneration"
OLD = [7, 3]


def both_kinds(name: str, folder: Path) -> list[nn.Module]:
    """A model that was built, whose folder this becomes, and one that was loaded from it."""
    model = toy(name)[0].requires_grad_(False)
    model.save_pretrained(folder)
    return [model, reloaded(model, folder)]


def rows_of(model: nn.Module, **options) -> TokenDeltas:
    height = find_height(model, type(model).__name__)
    return random_rows(model, [*OLD, height], grow=True, **options)


@pytest.mark.parametrize("name", RENAMED)
def test_rows_of_a_renamed_model_need_no_names(name: str, tmp_path):
    for model in both_kinds(name, tmp_path / "model"):
        params = rows_of(model)
        renamed = [spec.origin.saved_as for spec in params.specs.values()]
        held = tensors_of(tmp_path / "model").keys()
        assert any(renamed)
        for saved, spec in zip(renamed, params.specs.values(), strict=True):
            assert {saved.get(each, each) for each in spec.names} & held
        save(params, tmp_path / "rows")
        merge_checkpoint(tmp_path / "model", tmp_path / "rows", tmp_path / f"merged {id(model)}")
        folder = reloaded(model, tmp_path / f"merged {id(model)}")
        for key, names in params.tied.items():
            found = folder.get_parameter(names[0])[params.token_indices[key]]
            assert torch.equal(found, params.deltas[key].to(found.dtype))
        unmerge_checkpoint(tmp_path / f"merged {id(model)}", params, tmp_path / f"b{id(model)}")
        assert contents(tmp_path / f"b{id(model)}") == contents(tmp_path / "model")


@pytest.mark.parametrize("name", RENAMED)
def test_a_state_dict_that_was_read_from_such_a_folder(name: str, tmp_path):
    model = both_kinds(name, tmp_path / "model")[1]
    params = random_rows(model, OLD)
    state = load_file(tmp_path / "model/model.safetensors")
    merged = merge(state, params)
    merge_checkpoint(tmp_path / "model", params, tmp_path / "merged")
    assert same_bits(merged, load_file(tmp_path / "merged/model.safetensors"))
    assert same_bits(unmerge(merged, params), state)
    own = model.state_dict()  # under the model's names, as ever
    assert same_bits(unmerge(merge(own, params), params), own)


def test_one_name_may_be_given_and_the_others_are_known(tmp_path):
    model = both_kinds("UltrabertForMaskedLM", tmp_path / "model")[1]
    params = rows_of(model)
    names = {"head.decoder.weight": "cls.weight"}
    assert params.specs.keys() == {"model.embed_tokens.weight", *names}
    merge_checkpoint(tmp_path / "model", params, tmp_path / "merged", names=names)
    merge_checkpoint(tmp_path / "model", params, tmp_path / "same")
    assert contents(tmp_path / "merged") == contents(tmp_path / "same")


@pytest.mark.parametrize("name", ["FuyuForCausalLM", "UltrabertForMaskedLM", GEMMA])
@pytest.mark.parametrize("merged", [False, True], ids=["merge", "unmerge"])
def test_rows_of_an_older_file_print_all_names_to_paste(merged: bool, name: str, tmp_path):
    model = both_kinds(name, tmp_path / "model")[1]
    params = rows_of(model)
    merge_checkpoint(tmp_path / "model", params, tmp_path / "merged")
    specs = {key: replace(spec, origin=Origin()) for key, spec in params.specs.items()}
    older = TokenDeltas(params.deltas, specs)
    write, source = merge_checkpoint, tmp_path / "model"
    if merged:
        write, source = unmerge_checkpoint, tmp_path / "merged"
    with pytest.raises(KeyError, match="give it in names .--name on the command line.: ") as caught:
        write(source, older, tmp_path / "made")
    assert not (tmp_path / "made").exists()
    (printed,) = re.findall(r"names=\{(.*)\}", caught.value.args[0])
    names = dict(re.findall(r"'(.*?)': '(.*?)'", printed))
    assert len(names) == len(params.specs)
    write(source, older, tmp_path / "made", names=names)
    other = tmp_path / ("model" if merged else "merged")
    held = tensors_of(other)
    made = tensors_of(tmp_path / "made")
    assert same_bits(made, held)


def test_no_names_are_printed_for_a_matrix_that_is_not_there(tmp_path):
    model = both_kinds("FuyuForCausalLM", tmp_path / "model")[1]
    params = rows_of(model)
    toy("GPT2LMHeadModel")[0].save_pretrained(tmp_path / "other")  # one matrix, and two are wanted
    with pytest.raises(KeyError, match="give it in names .--name on the command line.[.]."):
        merge_checkpoint(tmp_path / "other", params, tmp_path / "made")


def in_a_lora(model: nn.Module) -> nn.Module:
    config = peft.LoraConfig(r=1, target_modules=["lm_head"])
    with quiet():
        return peft.get_peft_model(model, config)


WRAPPERS = {
    "module": lambda model: nn.ModuleDict({"module": model}),
    "compiled": torch.compile,
    "peft": in_a_lora,
    "peft in a module": lambda model: nn.ModuleDict({"module": in_a_lora(model)}),
}


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")  # PEFT asks for it
@pytest.mark.parametrize("wrap", WRAPPERS)
def test_a_wrapper_is_left_out_of_the_names(wrap: str, tmp_path):
    model = both_kinds("FuyuForCausalLM", tmp_path / "model")[1]
    expected = {*saved_names(model, ["model.language_model.embed_tokens.weight"]).values()}
    expected |= {*saved_names(model, ["lm_head.weight"]).values()}
    assert len(expected) == 2
    wrapped = WRAPPERS[wrap](model)
    ends = ("embed_tokens.weight", "lm_head.weight", "lm_head.base_layer.weight")
    held = [name for name, _ in wrapped.named_parameters() if name.endswith(ends)]
    held = [name for name in held if "vision" not in name]
    assert len(held) == 2
    assert {*saved_names(wrapped, held).values()} == expected


def test_a_file_keeps_the_names_and_a_model_that_is_loaded_says_them_anew(tmp_path):
    model = both_kinds(GEMMA, tmp_path / "model")[1]
    params, path = random_rows(model, OLD), tmp_path / "rows"
    (saved,) = (spec.origin.saved_as for spec in params.specs.values())
    own, other = (
        "model.language_model.embed_tokens.weight",
        "language_model.model.embed_tokens.weight",
    )
    assert saved[own] == other
    save(params, path)
    for again in (read(path), load(path, model), load(path, toy(GEMMA)[0])):
        (spec,) = again.specs.values()
        assert spec.origin.saved_as[own] == other


def test_a_model_of_nobody_is_asked_for_nothing(monkeypatch):
    embedding = nn.Embedding(9, 2)
    assert saved_names(embedding, ["weight"]) == {}
    model, inputs = toy(GEMMA)
    name = "model.language_model.embed_tokens.weight"

    def refuse(*_):
        raise ValueError("Cannot reverse the transform with TP or quantization")

    with monkeypatch.context() as patched:
        patched.setattr(transformers.modeling_utils, "revert_weight_conversion", refuse)
        assert saved_names(model, [name]) == {}
        functional_call(model, patch(random_rows(model, OLD)), kwargs=inputs)
    assert saved_names(model, [name])
    monkeypatch.delitem(sys.modules, "transformers.modeling_utils")
    assert saved_names(model, [name]) == {}


def test_no_weight_is_read_or_changed():
    model, inputs = toy(GEMMA)
    with torch.no_grad():
        before = logits_of(model(**inputs))
    model.to("meta")
    name = "model.language_model.embed_tokens.weight"
    assert saved_names(model, [name]) == saved_names(toy(GEMMA)[0], [name])
    assert before.isfinite().all()


def test_a_bias_of_the_logits_is_renamed_with_its_head(tmp_path):
    model = both_kinds("GPTNeoXForCausalLM", tmp_path / "model")[1]
    model.lm_head.bias = nn.Parameter(torch.randn(len(model.lm_head.weight)), False)
    params = rows_of(model)
    (saved,) = (spec.origin for key, spec in params.specs.items() if key.startswith("lm_head"))
    assert saved.biases == ("lm_head.bias",)
    assert saved.saved_as["lm_head.bias"] == "embed_out.bias"
    model.save_pretrained(tmp_path / "biased")
    merge_checkpoint(tmp_path / "biased", params, tmp_path / "merged")
    merged, state = tensors_of(tmp_path / "merged"), tensors_of(tmp_path / "biased")
    assert same_bits(merged, merge(state, params))
    assert merged["embed_out.bias"].tolist() == [*model.lm_head.bias.tolist(), 0]
    assert same_bits(unmerge(merged, params), state)
