"""A vocabulary that was resized, for which PEFT saves whole matrices as well."""

from __future__ import annotations

from pathlib import Path

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file
from torch import nn

from tests.helpers.peft_folders import change_config, check_loaded, on_meta, save_with_peft
from tests.helpers.peft_reference import EMBEDDING, V, peft_of, quiet, toy
from tests.helpers.rows import random_rows
from ttfunc.peft.load_peft import load_peft


def resized(name: str, folder: Path, **options) -> tuple[nn.Module, peft.PeftModel]:
    """A model with two rows more than its folder has, and PEFT around it; the last row trains."""
    toy(name).save_pretrained(folder / "base")
    with quiet():
        model = transformers.AutoModelForCausalLM.from_pretrained(folder / "base").eval()
        model.resize_token_embeddings(V + 2)
    wrapped = peft_of(model, [7, 3, V + 1], random_rows(model, [7, 3, V + 1]), **options)
    wrapped.peft_config["default"].base_model_name_or_path = str(folder / "base")
    save_with_peft(wrapped, folder / "adapter")
    keys = load_file(folder / "adapter" / "adapter_model.safetensors")
    assert any(key.endswith(".base_layer.weight") for key in keys)
    return model, wrapped


@pytest.mark.filterwarnings("ignore:only the token rows")
@pytest.mark.parametrize("lora", [False, True], ids=["standalone", "lora"])
@pytest.mark.parametrize("name", ["llama_tied", "llama_untied"])
def test_whole_matrices_that_are_the_models(name: str, lora: bool, tmp_path):
    model, wrapped = resized(name, tmp_path, lora=lora)
    check_loaded(tmp_path / "adapter", model, wrapped)
    with torch.no_grad():  # a row that is trained may be another one
        model.model.embed_tokens.weight[V + 1] += 1
    params = load_peft(tmp_path / "adapter", model)
    assert torch.equal(params.originals[EMBEDDING][2], model.model.embed_tokens.weight[V + 1])


@pytest.mark.filterwarnings("ignore:only the token rows")
@pytest.mark.parametrize("lora", [False, True], ids=["standalone", "lora"])
@pytest.mark.parametrize("name", ["llama_tied", "llama_untied"])
def test_whole_matrices_that_are_not_the_models(name: str, lora: bool, tmp_path):
    model, _ = resized(name, tmp_path, lora=lora)
    with torch.no_grad():
        model.model.embed_tokens.weight[V] += 1  # as another resizing would draw it
    with pytest.raises(ValueError, match=r"whole, and 1 rows that are not trained, from 60 on"):
        load_peft(tmp_path / "adapter", model)
    with pytest.raises(ValueError, match=r"\[61\] are past the end of .* Resize the model first"):
        load_peft(tmp_path / "adapter", toy(name))
    with pytest.warns(UserWarning, match="whole, which is not loaded"):
        load_peft(tmp_path / "adapter", on_meta(model))


def test_a_whole_matrix_of_another_size(tmp_path):
    resized("llama_tied", tmp_path)
    change_config(tmp_path / "adapter", token_indices=[7, 3, 41])
    with pytest.raises(ValueError, match=r"whole, \(62, 16\) .* has \(60, 16\)\. Resize the model"):
        load_peft(tmp_path / "adapter", toy("llama_tied"))
