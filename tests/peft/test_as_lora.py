"""Rows as a plain LoRA, which PEFT loads to the same logits."""

from __future__ import annotations

import pickle
import warnings

import peft
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from transformers import Gemma3ForCausalLM, Gemma3TextConfig

from tests.helpers.llama import llama
from tests.helpers.models import D, V
from tests.helpers.peft_folders import config_of
from tests.helpers.rows import random_rows
from ttfunc import functional_call, init_deltas, patch, save_as_lora

pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")

X = torch.tensor([[3, 7, 5, 9, 1, 4], [7, 2, 8, 3, 6, 11]])


class Shared(nn.Module):
    """Holds the matrix of its embedding itself too, and multiplies by it."""

    def __init__(self, weight: nn.Parameter) -> None:
        super().__init__()
        self.table = nn.Embedding(V, D)
        self.table.weight = self.weight = weight

    def forward(self, x):
        return self.table(x) @ self.weight.T


def by_peft(model: nn.Module, directory) -> torch.Tensor:
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")  # PEFT warns of a tied matrix
        return peft.PeftModel.from_pretrained(model, str(directory)).eval()(X).logits


@settings(max_examples=8)
@given(
    ids=st.lists(st.integers(0, V - 1), min_size=1, max_size=5, unique=True),
    tie=st.booleans(),
    more=st.integers(0, 3),
)
def test_peft_gives_the_same_logits(tmp_path_factory, ids, tie, more):
    folder = tmp_path_factory.mktemp("lora")
    model = llama(tie=tie)
    params = random_rows(model, ids, targets=None if tie else ["model.embed_tokens", "lm_head"])
    save_as_lora(params, folder / "a", rank=len(ids) + more)
    with torch.no_grad():
        expected = functional_call(model, patch(params), X).logits
    torch.testing.assert_close(by_peft(llama(tie=tie), folder / "a"), expected)
    assert config_of(folder / "a")["r"] == len(ids) + more


def test_an_embedding_that_scales(tmp_path):
    config = Gemma3TextConfig(
        vocab_size=V, hidden_size=D, intermediate_size=16, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=1, head_dim=8, tie_word_embeddings=True,
    )  # fmt: skip
    torch.manual_seed(0)
    model = Gemma3ForCausalLM(config).eval().requires_grad_(False)
    params = random_rows(model, [7, 3])
    save_as_lora(params, tmp_path / "a")
    with torch.no_grad():
        expected = functional_call(model, patch(params), X).logits
        assert not torch.allclose(expected, model(X).logits, atol=1e-3)
    torch.testing.assert_close(by_peft(model, tmp_path / "a"), expected)


def test_it_adds_to_the_rows_that_the_model_has_now(tmp_path):
    model = llama()
    params = random_rows(model, [7, 3])
    with torch.no_grad():
        model.model.embed_tokens.weight.mul_(2)
        expected = functional_call(model, patch(params), X).logits
    save_as_lora(params, tmp_path / "a")
    torch.testing.assert_close(by_peft(model, tmp_path / "a"), expected)


def test_it_tells_how_many_bytes_the_tensors_have(tmp_path):
    model = llama()
    params = random_rows(model, [7, 3, 9])
    written = save_as_lora(params, tmp_path / "a", rank=8)
    size = (tmp_path / "a" / "adapter_model.safetensors").stat().st_size
    assert written == 4 * 8 * (V + D) * 2
    assert save_as_lora(params, tmp_path / "b") == 4 * 3 * (V + D) * 2
    assert 0 < size - written < 1024


@pytest.mark.parametrize("rank", [1, True, 2.0])
def test_a_rank_below_the_rows_is_refused(tmp_path, rank):
    model = llama()
    params = random_rows(model, [7, 3])
    with pytest.raises(ValueError, match="rank must be an int of at least 2"):
        save_as_lora(params, tmp_path / "a", rank=rank)
    assert not (tmp_path / "a").exists()


def test_a_matrix_that_has_a_lora_or_no_module_is_refused(tmp_path):
    config = peft.LoraConfig(target_modules=["lm_head", "q_proj"])
    model = peft.get_peft_model(llama(tie=False), config)
    params = random_rows(model, [7, 3], targets="lm_head.base_layer")
    with pytest.raises(ValueError, match="is the matrix of a LoRA, which a LoRA cannot be for"):
        save_as_lora(params, tmp_path / "a")
    alone = nn.Embedding(V, D)
    with pytest.raises(ValueError, match="is the matrix of the model itself"):
        save_as_lora(random_rows(alone, [3]), tmp_path / "a")
    assert not (tmp_path / "a").exists()


def test_what_a_lora_cannot_be_is_refused(tmp_path):
    model = llama()
    with pytest.raises(ValueError, match="2 new tokens, and a LoRA adds to rows that are there"):
        save_as_lora(init_deltas(model, [V, V + 1], grow=True), tmp_path / "a")
    with pytest.raises(RuntimeError, match="belong to no model"):
        save_as_lora(pickle.loads(pickle.dumps(random_rows(model, [3]))), tmp_path / "a")  # noqa: S301
    shared = Shared(nn.Parameter(torch.randn(V, D), requires_grad=False))
    params = random_rows(shared, [3], targets="table")
    with pytest.raises(ValueError, match="belongs to a Shared, and PEFT's LoRA is for"):
        save_as_lora(params, tmp_path / "a")
    assert not (tmp_path / "a").exists()
