"""Rows beside trainable parameters of the model's own, as a LoRA's: two trees in one call."""

from __future__ import annotations

import copy

import peft
import pytest
import torch
from torch import Tensor
from torch.func import grad, vmap
from transformers import AutoModelForCausalLM

from tests.helpers.llama import llama
from tests.helpers.models import V
from tests.helpers.rows import random_rows
from ttfunc import TokenDeltas, TokenModule, functional_call, merge_checkpoint, patch

pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")

IDS = [7, 3]
X = torch.tensor([[3, 7, 5, 9, 1, 4], [7, 2, 8, 3, 6, 11]])


@pytest.fixture
def both() -> tuple[peft.PeftModel, TokenDeltas, dict[str, Tensor]]:
    """A model with a LoRA that does something, rows for it, and the LoRA's parameters."""
    config = peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    model = peft.get_peft_model(llama(attn_implementation="eager"), config).eval()
    lora = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}
    return model, random_rows(model, IDS), lora


@pytest.mark.parametrize("waits", [False, True])
def test_the_gradients_of_both_are_those_of_full_training(both, waits):
    model, params, lora = both

    def loss(params: TokenDeltas, lora: dict[str, Tensor], x: Tensor) -> Tensor:
        weights = {**patch(params, deferred_logits=waits), **lora}
        return functional_call(model, weights, kwargs={"input_ids": x, "labels": x}).loss

    reference = copy.deepcopy(model).requires_grad_(True)
    matrix = reference.get_input_embeddings().weight
    with torch.no_grad():
        (matrix[IDS],) = params.deltas.values()

    def expected(x: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        reference.zero_grad()
        reference(input_ids=x, labels=x).loss.backward()
        named = dict(reference.named_parameters())
        return matrix.grad[IDS].clone(), {name: named[name].grad.clone() for name in lora}

    of_rows, of_lora = grad(loss, argnums=(0, 1))(params, lora, X)
    torch.testing.assert_close((*of_rows.deltas.values(), of_lora), expected(X))

    each = vmap(grad(loss, argnums=(0, 1)), in_dims=(None, None, 0))(params, lora, X.unsqueeze(1))
    for i, x in enumerate(X.unsqueeze(1)):
        (rows,), others = each[0].deltas.values(), each[1]
        torch.testing.assert_close(
            (rows[i], {name: tensor[i] for name, tensor in others.items()}), expected(x)
        )
    assert all(p.grad is None for p in model.parameters())
    assert len(matrix) == V


def test_a_compiled_function_takes_both_by_torch_s_functional_call(both):
    model, params, lora = both

    def logits(params: TokenDeltas, lora: dict[str, Tensor], x: Tensor) -> Tensor:
        weights = {**patch(params), **lora}
        return torch.func.functional_call(model, weights, (x,)).logits

    compiled = torch.compile(logits, backend="eager", fullgraph=True)
    with torch.no_grad():
        torch.testing.assert_close(compiled(params, lora, X), logits(params, lora, X))
        module = TokenModule(model, params, train_base=True)
        torch.testing.assert_close(
            torch.compile(module, backend="eager")(X).logits, logits(params, lora, X)
        )


@pytest.mark.parametrize("tie", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("ids", [[7, 3], [V, V + 1], [V, 7]], ids=["old", "new", "both"])
def test_a_lora_and_rows_go_to_one_plain_folder(tie: bool, ids: list[int], tmp_path):
    """By way of the folder of the LoRA alone; the page's recipe."""
    config = peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    lora = peft.get_peft_model(llama(tie=tie), config).eval()
    ends = None if max(ids) >= V else ["embed_tokens", "lm_head"]
    params = random_rows(lora, ids, grow=max(ids) >= V, targets=ends)
    x = torch.tensor([[1, ids[0], 5, ids[1]]])
    expected = functional_call(lora, patch(params), (x,)).logits.detach()
    lora.merge_and_unload().save_pretrained(tmp_path / "lora")
    merge_checkpoint(tmp_path / "lora", params, tmp_path / "both")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "both").eval()
    torch.testing.assert_close(loaded(x).logits, expected)
    assert loaded.config.vocab_size == expected.shape[-1] == max(V, *(token + 1 for token in ids))
