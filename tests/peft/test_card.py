"""The model card beside an adapter."""

from __future__ import annotations

import json
from pathlib import Path

import huggingface_hub
import peft
import pytest
import torch

from tests.helpers.checkpoints import names_in
from tests.helpers.models import make
from tests.helpers.peft_reference import IDX, toy
from tests.helpers.rows import random_rows
from ttfunc import load_peft, save_as_lora, save_peft
from ttfunc.peft.writer import card_of

FILES = ["README.md", "adapter_config.json", "adapter_model.safetensors"]


def card_in(directory: Path) -> huggingface_hub.ModelCard:
    return huggingface_hub.ModelCard.load(directory / "README.md")


def test_the_hub_reads_what_it_expects(tmp_path):
    save_peft(random_rows(toy("llama_tied"), IDX), tmp_path / "a", base_model="org/base")
    data = card_in(tmp_path / "a").data
    assert (data.library_name, data.base_model) == ("peft", "org/base")
    assert data.tags == ["ttfunc", "base_model:adapter:org/base"]
    assert names_in(tmp_path / "a") == FILES
    save_peft(random_rows(make("untied"), {"embed_tokens": [1], "lm_head": [2]}), tmp_path / "b")
    assert card_in(tmp_path / "b").data.tags == ["lora", "ttfunc"]
    assert card_in(tmp_path / "b").data.base_model is None


@pytest.mark.parametrize("base", ["/a/folder", "./base", "a/b/c", 'a"b: [c]', "é #\n---", ""])
def test_a_path_is_no_name_on_the_hub(base: str):
    text = card_of({"peft_type": "TRAINABLE_TOKENS", "base_model_name_or_path": base}).decode()
    assert huggingface_hub.ModelCard(text).data.to_dict() == {
        "library_name": "peft",
        "tags": ["ttfunc"],
    }


def test_a_card_of_the_users_is_left(tmp_path):
    model = toy("llama_tied")
    (tmp_path / "README.md").write_text("of my own")
    for ids in ([1], [2, 3]):
        save_peft(random_rows(model, ids), tmp_path, base_model="org/base")
        assert (tmp_path / "README.md").read_text() == "of my own"
    assert names_in(tmp_path) == FILES
    assert load_peft(tmp_path, model).token_indices["model.embed_tokens.weight"].tolist() == [2, 3]


def test_the_card_follows_the_adapter_until_somebody_edits_it(tmp_path):
    model = toy("llama_tied")
    for base in ("org/one", "org/two"):
        save_peft(random_rows(model, IDX), tmp_path, base_model=base)
        assert card_in(tmp_path).data.base_model == base
    with (tmp_path / "README.md").open("a") as file:
        file.write("More.\n")
    save_peft(random_rows(model, IDX), tmp_path, base_model="org/three")
    assert card_in(tmp_path).data.base_model == "org/two"
    assert card_in(tmp_path).text.endswith("More.\n")


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")  # of PEFT's
def test_a_lora_of_a_tied_matrix_says_that_it_is_not_for_a_merge(tmp_path):
    """PEFT adds both parts to the one matrix."""
    model = toy("llama_tied")
    save_as_lora(random_rows(model, IDX), tmp_path / "lora")
    assert "`merge_and_unload` adds both parts" in card_in(tmp_path / "lora").text.replace(
        "\n", " "
    )
    assert card_in(tmp_path / "lora").data.tags == ["lora", "ttfunc"]
    before = model.get_input_embeddings().weight[IDX].clone()
    with pytest.warns(UserWarning, match="a tied layer is part of the adapter"):
        loaded = peft.PeftModel.from_pretrained(model, tmp_path / "lora")
    with pytest.warns(UserWarning, match="tied_target_modules"):
        merged = loaded.merge_and_unload()
    rows = random_rows(toy("llama_tied"), IDX).deltas["model.embed_tokens.weight"]
    twice = before + 2 * (rows - before)
    torch.testing.assert_close(merged.get_input_embeddings().weight[IDX], twice)


def test_no_pickle_is_written(tmp_path):
    save_peft(random_rows(toy("llama_tied"), IDX), tmp_path / "a")
    assert json.loads((tmp_path / "a" / "adapter_config.json").read_text())
    assert names_in(tmp_path / "a") == FILES
