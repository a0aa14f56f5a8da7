"""Rows of the input embedding alone, of a model whose head is another matrix, are told of."""

from __future__ import annotations

import copy
import re

import peft
import pytest
import torch
import transformers
from torch import nn

from tests.helpers.llama import llama
from tests.helpers.models import V, make
from tests.helpers.rows import random_rows
from ttfunc import Exportable, combine, init_deltas, load, save, stack, summary

BOTH = ["model.embed_tokens", "lm_head"]
MATCH = (
    r"rows of 'model.embed_tokens' alone are trained: the head 'lm_head' of LlamaForCausalLM is "
    r"not tied .*targets=\['model.embed_tokens', 'lm_head'\].*targets='model.embed_tokens' says so"
)


def test_the_input_end_alone_is_told_of_once_for_a_model():
    model = llama(tie=False)
    with pytest.warns(UserWarning, match=MATCH) as caught:
        init_deltas(model, [7, 3])
    assert caught[0].filename == __file__
    init_deltas(model, [5])  # the suite makes an error of a warning
    with pytest.warns(UserWarning, match=MATCH):
        init_deltas(copy.deepcopy(model), [7], grow=True)


def test_what_is_meant_is_not_told():
    for options in (
        {"idx": [7], "targets": "embed_tokens"},
        {"idx": [7], "targets": BOTH},
        {"idx": {"embed_tokens": [7]}},
        {"idx": [V], "grow": True},
        {"idx": [V, 7], "grow": True},  # both ends
    ):
        init_deltas(llama(tie=False), **options)
    init_deltas(llama(), [7])  # tied
    init_deltas(make("untied"), [7])  # names no head
    config = transformers.LlamaConfig(
        vocab_size=V,
        hidden_size=8,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        pad_token_id=0,
    )
    init_deltas(transformers.LlamaModel(config), [7])
    init_deltas(transformers.LlamaForSequenceClassification(config), [7])


def test_nothing_else_tells(tmp_path):
    model = llama(tie=False)
    params = random_rows(model, [7, 3], targets="embed_tokens")
    save(params, tmp_path / "rows")
    again = load(tmp_path / "rows", model)
    stack([params, again])
    Exportable(model).inputs(params, rows=2)


def test_a_text_says_so_too():
    model = llama(tie=False)
    params = random_rows(model, [7, 3], targets="embed_tokens")
    told = (
        "(of the input alone, not of the head lm_head; "
        "targets=['model.embed_tokens', 'lm_head'] trains both)"
    )
    assert repr(params) == f"TokenDeltas(model.embed_tokens.weight: 2 of 23 rows {told})"
    assert f"float32 {told}\n" in str(summary(model, params))
    head = random_rows(model, [7], targets="lm_head")
    for both in (combine(params, head), combine(head, params)):
        assert "alone" not in repr(both) + str(summary(model, both))
    for whole in (head, random_rows(model, [V], grow=True), random_rows(llama(), [7])):
        assert "alone" not in repr(whole)
    del model  # which the text asked
    assert "2 of 23 rows" in repr(params)


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")  # of PEFT's
def test_the_advice_is_one_that_works():
    """Also where the head is within a LoRA, or a class of its own."""
    config = peft.LoraConfig(target_modules=["lm_head", "embed_tokens"], r=2)
    model = peft.get_peft_model(llama(tie=False), config)
    with pytest.warns(UserWarning, match=r"lm_head.base_layer'\]") as caught:
        init_deltas(model, [7], targets=None)
    (targets,) = re.findall(r"targets=\[(.*?)\]", str(caught[0].message))
    advised = [target.strip("'") for target in targets.split(", ")]
    assert len(init_deltas(model, [7], targets=advised).deltas) == 2
    (alone,) = re.findall(r"meant, targets='(.*?)'", str(caught[0].message))
    assert len(init_deltas(model, [7], targets=alone).deltas) == 1

    class Head(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(V, 8))

    own = llama(tie=False)
    own.lm_head = Head()
    with pytest.warns(UserWarning, match=r"targets=\['model.embed_tokens', 'lm_head'\]"):
        init_deltas(own, [7])
    assert len(init_deltas(own, [7], targets=["model.embed_tokens", "lm_head"]).deltas) == 2
    whole = llama(tie=False)
    whole.lm_head.weight = nn.Parameter(torch.zeros(V, 8, dtype=torch.int8), requires_grad=False)
    with pytest.warns(UserWarning, match="The head has no rows that can be trained"):
        init_deltas(whole, [7])


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")  # of PEFT's
def test_a_head_that_peft_trains_as_a_whole_is_no_half():
    config = peft.LoraConfig(target_modules=["q_proj"], modules_to_save=["lm_head"], r=2)
    init_deltas(peft.get_peft_model(llama(tie=False), config), [7])
