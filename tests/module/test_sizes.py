"""What a TokenModule says of the size of its vocabulary, with new tokens and without."""

from __future__ import annotations

import copy
import json
import pickle

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig, T5Config, T5ForConditionalGeneration

from tests.helpers.llama import llama
from tests.helpers.models import V
from tests.helpers.oracle import snapshot
from tests.helpers.rows import random_rows
from tests.helpers.trl import module_of
from ttfunc import functional_call, patch
from ttfunc.module.token_module import TokenModule

NEW = [V, V + 1]
PLAIN = {"eos_token_id": None, "bos_token_id": None}


def grown(tie: bool = True, **options) -> TokenModule:
    model = llama(tie=tie, **options)
    return TokenModule(model, random_rows(model, NEW, grow=True)).eval()


@pytest.mark.parametrize("tie", [True, False], ids=["tied", "untied"])
def test_it_says_the_size_that_it_has_in_a_call(tie):
    module = grown(tie)
    before = snapshot(module.base)
    height = module(torch.tensor([NEW])).logits.shape[-1]
    ends = module.get_input_embeddings(), module.get_output_embeddings()
    assert height == V + 2 == len(ends[0].weight) == len(ends[1].weight)
    sizes = [ends[0].num_embeddings, ends[1].out_features, module.vocab_size]
    sizes += [module.model.embed_tokens.num_embeddings, module.model.vocab_size]
    sizes += [module.config.vocab_size, module.config.get_text_config().vocab_size]
    sizes += [module.model.config.vocab_size, module.base_model.config.vocab_size]
    assert sizes == [height] * len(sizes)
    base = module.base
    sizes = [base.config.vocab_size, base.vocab_size, base.lm_head.out_features]
    assert [*sizes, base.model.embed_tokens.num_embeddings] == [V] * 4
    assert snapshot(base) == before
    assert copy.deepcopy(module).config.vocab_size == V + 2


@pytest.mark.parametrize("lora", [False, True], ids=["rows", "rows and LoRA"])
@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")  # PEFT asks for it
def test_a_module_of_old_tokens_shows_the_config_itself(lora):
    module = module_of(lora=lora)
    assert module.config is module.base.config
    long = module_of(lora=lora, grown=True)
    assert long.config.vocab_size == long.base.config.vocab_size + 2


def test_what_is_set_on_the_config_is_set_on_the_model_s_but_for_the_size():
    module = grown()
    own, config = module.base.config, module.config
    config.use_cache = False
    config.get_text_config().pad_token_id = 5
    config.a_setting_of_a_tool = "x"
    assert (own.use_cache, own.pad_token_id, own.a_setting_of_a_tool) == (False, 5, "x")
    own.use_cache = True
    assert config.use_cache
    del config.a_setting_of_a_tool
    assert not hasattr(own, "a_setting_of_a_tool")
    config.vocab_size = V + 2  # as after add_tokens: len(tokenizer)
    assert (config.vocab_size, own.vocab_size) == (V + 2, V)
    module.config = module.config
    assert module.base.config is own
    module.get_input_embeddings().num_embeddings = V + 2
    assert module.base.get_input_embeddings().num_embeddings == V
    assert module(torch.tensor([NEW])).logits.shape[-1] == V + 2


def test_the_config_is_written_and_copied_with_the_size_that_it_says(tmp_path):
    module = grown()
    config = module.config
    assert isinstance(config, LlamaConfig)
    assert config.__class__ is LlamaConfig
    assert config is module.config is module.config.get_text_config()
    assert config.to_dict() == {**module.base.config.to_dict(), "vocab_size": V + 2}
    assert json.loads(config.to_json_string())["vocab_size"] == V + 2
    config.save_pretrained(tmp_path)
    for other in (
        copy.deepcopy(config),
        copy.copy(config),
        pickle.loads(pickle.dumps(config)),  # noqa: S301
        LlamaConfig.from_pretrained(tmp_path),
    ):
        assert type(other) is LlamaConfig
        assert other.vocab_size == V + 2
        other.pad_token_id = 7
    assert config.pad_token_id == module.base.config.pad_token_id == 0
    assert AutoModelForCausalLM.from_config(copy.deepcopy(config)).lm_head.out_features == V + 2


def test_a_config_in_a_config_and_another_part_s():
    config = T5Config(
        vocab_size=V, d_model=16, d_ff=16, d_kv=8, num_layers=1, num_heads=2,
        decoder_start_token_id=0, tie_word_embeddings=True,
    )  # fmt: skip
    model = T5ForConditionalGeneration(config).eval().requires_grad_(False)
    model.config.text_config = copy.deepcopy(config)
    model.config.other_config = LlamaConfig(vocab_size=V + 9)
    module = TokenModule(model, random_rows(model, NEW, grow=True))
    assert module.config.text_config.vocab_size == module.get_encoder().config.vocab_size == V + 2
    assert module.config.other_config is model.config.other_config
    assert module.config.to_dict()["text_config"]["vocab_size"] == V + 2
    module.config.text_config.dropout_rate = 0.25
    assert model.config.text_config.dropout_rate == 0.25
    assert model.config.text_config.vocab_size == V


def test_a_model_with_a_size_and_without_a_config():
    class Sized(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.emb, self.vocab_size = nn.Embedding(V, 4), V

        def forward(self, x):
            return self.emb(x).sum(-1) + self.vocab_size

    model = Sized().requires_grad_(False)
    module = TokenModule(model, random_rows(model, [V], grow=True))
    assert (module.vocab_size, module.emb.num_embeddings, model.vocab_size) == (V + 1, V + 1, V)


@pytest.mark.parametrize("draft_grown", [True, False], ids=["both grown", "a resized draft"])
def test_assisted_generation_of_models_with_new_tokens(draft_grown):
    module, draft = grown(**PLAIN), grown(layers=1, **PLAIN)
    helper = draft
    if not draft_grown:
        helper = copy.deepcopy(draft.base)
        helper.resize_token_embeddings(V + 2, mean_resizing=False)
    x = torch.tensor([[1, V, 3, V + 1]])
    options = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    expected = module.generate(x, **options)
    assert torch.equal(module.generate(x, assistant_model=helper, **options), expected)
    called = functional_call(
        module.base,
        patch(module.params()),
        kwargs={"inputs": x, "assistant_model": helper, **options},
        method="generate",
    )
    assert torch.equal(called, expected)
