"""Which modules PEFT would give rows, and what it would tie: the same, or an error."""

from __future__ import annotations

import warnings
from pathlib import Path

import optree
import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import nn

from tests.helpers.models import Language
from tests.helpers.oracle import same_bits
from tests.helpers.peft_folders import (
    APART,
    change_config,
    check_loaded,
    check_peft_reads,
    config_of,
    refused,
    save_with_peft,
)
from tests.helpers.peft_reference import EMBEDDING, HEAD, IDX, D, V, filled, peft_of, quiet, toy
from tests.helpers.rows import random_rows
from ttfunc import init_deltas
from ttfunc.peft.load_peft import load_peft
from ttfunc.peft.save_peft import save_peft

KEY = "base_model.model.{}.trainable_tokens_delta"


TWO = ["embed_tokens", "lm_head"]


def gpt2() -> nn.Module:
    """A tied matrix and another embedding beside it."""
    sizes = {"n_embd": D, "n_layer": 1, "n_head": 2, "n_positions": 32, "vocab_size": V}
    return filled(transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes)))


@pytest.mark.parametrize(
    ("build", "idx", "targets", "kind"),
    [
        (lambda: toy("llama_untied"), IDX, TWO, "TRAINABLE_TOKENS"),
        (lambda: toy("llama_untied"), APART, None, "LORA"),
        (lambda: toy("llama_untied"), IDX, ["lm_head"], "TRAINABLE_TOKENS"),
        (lambda: toy("bart_untied"), IDX, ["encoder.embed_tokens", "decoder.embed_tokens"], None),
        (gpt2, [7, 3], ["wte", "wpe"], "TRAINABLE_TOKENS"),
        (gpt2, {"wte": [7, 3], "wpe": [3, 0]}, None, "LORA"),
    ],
    ids=["two", "two apart", "head", "encoder and decoder", "tied and another", "these apart"],
)
def test_several_matrices(build, idx, targets, kind, tmp_path):
    model = build()
    params = random_rows(model, idx, targets=targets)
    save_peft(params, tmp_path / "adapter")
    check_peft_reads(tmp_path / "adapter", model, params)
    assert config_of(tmp_path / "adapter")["peft_type"] == kind or kind is None
    loaded = load_peft(tmp_path / "adapter", model)
    assert optree.tree_structure(loaded) == optree.tree_structure(params)
    assert same_bits(loaded.deltas, params.deltas)


class Nested(nn.Module):
    """Full names of which one is the end of another."""

    def __init__(self) -> None:
        super().__init__()
        self.embed_tokens, self.inner = nn.Embedding(23, 8), Language(tie=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.inner.head(self.inner.mix(self.embed_tokens(x) + self.inner.embed(x)))


@pytest.mark.parametrize("target", ["embed_tokens", "inner.embed_tokens"])
def test_a_name_that_is_the_end_of_another(target: str, tmp_path):
    model = filled(Nested())
    params = random_rows(model, [7, 3], targets=target)
    save_peft(params, tmp_path)
    check_peft_reads(tmp_path, model, params)
    assert list(load_peft(tmp_path, model).deltas) == [f"{target}.weight"]


@pytest.mark.parametrize(
    "targets", [TWO, ["lm_head"], ["embed_tokens"], r".*embed_tokens|lm_head", "lm_head", "lm_.*"]
)
def test_targets_of_peft(targets, tmp_path):
    model = toy("llama_untied")
    ours = targets if isinstance(targets, list) else ["lm_head"] if "|" not in targets else TWO
    wrapped = peft_of(model, IDX, random_rows(model, IDX, targets=ours), target_modules=targets)
    params = check_loaded(save_with_peft(wrapped, tmp_path), model, wrapped)
    assert len(params.deltas) == len(ours)


def test_a_tied_adapter_on_an_untied_model_and_the_reverse(saved: Path, tmp_path):
    untied = toy("llama_untied")
    refused(saved, r"rows for \[\('lm_head.weight',\)\], which is none of its targets", untied)
    save_peft(random_rows(untied, IDX), tmp_path / "one")
    assert load_peft(tmp_path / "one", toy("llama_tied")).tied == {EMBEDDING: (EMBEDDING, HEAD)}
    save_peft(random_rows(untied, IDX, targets=TWO), tmp_path / "two")
    refused(tmp_path / "two", "different rows or token indices for .* tied here")
    apart = random_rows(untied, {"embed_tokens": [7], "lm_head": [3]})
    save_peft(optree.tree_map(torch.ones_like, apart), tmp_path / "apart")
    refused(tmp_path / "apart", "different rows or token indices for .* tied here")


def test_a_second_target_that_has_no_rows(tmp_path):
    model = toy("llama_untied")
    save_with_peft(peft_of(model, IDX, target_modules=TWO), tmp_path)
    path = tmp_path / "adapter_model.safetensors"
    tensors = load_file(path)
    del tensors[KEY.format("lm_head")]
    save_file(tensors, path)
    refused(tmp_path, r"no rows for its targets \['lm_head.weight'\]", model)


@pytest.mark.parametrize("lora", [False, True], ids=["standalone", "lora"])
def test_an_adapter_of_one_half_of_a_tie_is_refused(lora: bool, tmp_path):
    model = toy("llama_tied")
    config = (
        peft.LoraConfig(
            r=1, target_modules="dummy-target-modules", trainable_token_indices={"lm_head": IDX}
        )
        if lora
        else peft.TrainableTokensConfig(token_indices=IDX, target_modules=["lm_head"])
    )
    with quiet(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        save_with_peft(peft.get_peft_model(toy("llama_tied"), config), tmp_path)
    refused(tmp_path, r"PEFT trained \['lm_head.weight'\] without .*one matrix", model)


def test_ties_that_the_config_denies_are_not_saved_for_peft(tmp_path):
    model = toy("llama_untied")
    model.lm_head.weight = model.model.embed_tokens.weight
    with pytest.raises(ValueError, match="tie_word_embeddings is False in the config of Llama"):
        save_peft(random_rows(model, IDX), tmp_path / "a", base_model=model)
    model = toy("llama_tied")
    model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach().clone())
    with pytest.raises(ValueError, match="tie_word_embeddings is True in the config of Llama"):
        save_peft(random_rows(model, IDX), tmp_path / "a", base_model=model)
    assert not (tmp_path / "a").exists()


def test_names_that_peft_takes_for_one_another_are_refused(tmp_path):
    model = nn.ModuleDict({"embed": nn.Embedding(V, D), "pos_embed": nn.Embedding(V, D)})
    params = init_deltas(model, {"embed": [7, 3], "pos_embed": [3, 7]})
    with pytest.raises(ValueError, match="would give 'pos_embed' the token indices of 'emb"):
        save_peft(params, tmp_path / "a")
    assert not (tmp_path / "a").exists()


@pytest.mark.parametrize("pattern", ["(([a-z_.0-9]+)+)+!", ".*" * 30 + "z", "(a|a|.)*" * 30 + "z"])
def test_a_pattern_that_backtracks_is_refused(pattern: str, saved: Path):
    change_config(saved, target_modules=pattern)
    refused(saved, "may take for ever: .*Name the modules", toy("llama_tied"))
