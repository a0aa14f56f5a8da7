"""What a TokenModule shows of its model's data and methods, and what is set on it."""

from __future__ import annotations

import types

import peft
import pytest
import torch
from torch import nn
from transformers import GenerationConfig, LlamaForCausalLM, T5Config, T5ForConditionalGeneration

import tests.helpers.oracle as oracle
from tests.helpers.lessons import NAME, TOKENS, bridge, student
from tests.helpers.llama import llama
from tests.helpers.rows import random_rows
from ttfunc import merge
from ttfunc.module.token_module import TokenModule

X = torch.tensor([TOKENS])


# Data


def test_plain_data_is_that_of_the_model():
    module = bridge()
    assert module.config is module.base.config
    assert (module.device, module.dtype) == (torch.device("cpu"), torch.float32)
    assert module.main_input_name == "input_ids"
    for name in ("no_such_name", "_no_such_name", "__no_such_name__"):
        assert not hasattr(module, name)


def test_a_private_note_about_the_model_is_not_read():
    module = bridge()
    module.base._is_accelerate_prepared = True
    assert not hasattr(module, "_is_accelerate_prepared")
    assert not hasattr(module, "_no_split_modules")


def test_the_config_that_generate_reads_is_set_on_the_model():
    module = bridge()
    module.generation_config = GenerationConfig(max_new_tokens=2, pad_token_id=0, eos_token_id=None)
    assert module.base.generation_config is module.generation_config
    assert module.generate(torch.tensor([[1, 2]])).shape == (1, 4)


def test_the_config_that_the_model_reads_is_set_on_the_model():
    module = bridge()
    config = type(module.config).from_dict({**module.config.to_dict(), "return_dict": False})
    module.config = config
    assert module.base.config is config
    assert isinstance(module(X), tuple)


def test_the_loss_that_the_model_reads_is_set_on_the_model():
    module = bridge()
    module.loss_function = lambda **inputs: inputs["logits"].sum()
    out = module(X, labels=X)
    assert torch.equal(out.loss, out.logits.sum())


@pytest.mark.parametrize("name", ["forward", "training_note", "vocab_size", "_private", "lm_head"])
def test_what_else_is_set_stays_on_the_module(name):
    module = bridge()
    base = module.base
    base.forward = types.MethodType(type(base).forward, base)  # as accelerate leaves it behind
    base.training_note = "of the base"
    before = dict(vars(base)), dict(base._modules)
    value = lambda *args: "set"  # noqa: E731
    setattr(module, name, value)
    assert getattr(module, name) is value
    assert (dict(vars(base)), dict(base._modules)) == before
    if name == "forward":
        assert module(X) == "set"


# Methods


@pytest.mark.parametrize("name", ["push_to_hub", "tie_weights", "resize_token_embeddings"])
def test_a_method_that_writes_weights_is_refused(name):
    module = bridge()
    assert not hasattr(module, name)
    with pytest.raises(AttributeError, match=f"'{name}' of the LlamaForCausalLM .* does not use"):
        getattr(module, name)


def test_a_method_of_the_model_runs_with_the_rows():
    class Scorer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Embedding(9, 4)
            self.called = 0

        def forward(self, x):
            return self.table(x)

        def score(self, x, *, scale=1.0):
            self.called += 1
            return self.table(x).sum() * scale

        def greeting(self):
            return "hello"

    model = Scorer().requires_grad_(False)
    module = TokenModule(model, random_rows(model, [2]))
    (row,) = module.parameters()
    assert torch.equal(module.score(torch.tensor([2]), scale=2.0), row.sum() * 2)
    assert module.greeting() == "hello"
    assert (module.called, model.called) == (1, 1)
    with pytest.raises(TypeError, match="missing 1 required positional argument: 'x'"):
        module.score()


@pytest.mark.parametrize("grown", [False, True], ids=["replaced", "new"])
def test_it_saves_the_merged_model(tmp_path, grown):
    model = student()
    ids = [len(model.lm_head.weight), len(model.lm_head.weight) + 1] if grown else TOKENS
    module = TokenModule(model, random_rows(model, ids, grow=grown))
    module.save_pretrained(tmp_path)
    loaded = LlamaForCausalLM.from_pretrained(tmp_path)
    x = torch.tensor([ids])
    with torch.no_grad():
        torch.testing.assert_close(loaded(x).logits, module(x).logits)
        merged = merge(model.state_dict(), module.params())
    assert torch.equal(loaded.state_dict()[NAME], merged[NAME])
    assert loaded.config.vocab_size == (52 if grown else 50)
    assert (model.config.vocab_size, len(model.lm_head.weight)) == (50, 50)


def test_the_methods_that_run_on_the_model_read_no_matrix():
    module = bridge().train()
    before = oracle.snapshot(module.base)
    assert module.can_generate()
    assert module._supports_logits_to_keep()
    module.add_model_tags("a tag")
    assert module.base.model_tags == ["a tag"]
    del module.base.model_tags
    assert oracle.snapshot(module.base) == before


def test_what_a_collator_asks_of_a_model_with_two_stacks():
    config = T5Config(
        vocab_size=60, d_model=16, d_ff=16, d_kv=8, num_layers=1, num_heads=2,
        decoder_start_token_id=0,
    )  # fmt: skip
    model = T5ForConditionalGeneration(config).eval().requires_grad_(False)
    module = TokenModule(model, random_rows(model, [7, 3]))
    labels = torch.tensor([[5, 7, 3]])
    shifted = module.prepare_decoder_input_ids_from_labels(labels=labels)
    assert shifted.tolist() == [[0, 5, 7]]
    full = T5ForConditionalGeneration(config).eval()
    full.load_state_dict(merge(model.state_dict(), module.params()))
    encoder = module.get_encoder()
    x = torch.tensor([[7, 9, 3]])
    expected = full.get_encoder()(x).last_hidden_state
    torch.testing.assert_close(encoder(x).last_hidden_state, expected)


# A PeftModel


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")
def test_a_module_over_a_peft_model_is_taken_for_the_model_in_it():
    config = peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
    model = peft.get_peft_model(llama(vocabulary=50, width=16), config)
    module = TokenModule(model, random_rows(model, TOKENS), train_base=True)
    assert type(module).__name__ == "LlamaForCausalLM"
    with torch.no_grad():
        assert torch.equal(module.lm_head(module.base_model(X).last_hidden_state), module(X).logits)
    assert module.peft_config is model.peft_config
    assert module.params().deltas.keys() == {f"base_model.model.{NAME}"}


def test_a_state_dict_that_is_not_its_own_is_not_saved(tmp_path):
    module = bridge()
    with pytest.raises(ValueError, match=r"'model.embed_tokens.weight'.* is not that of this"):
        module.save_pretrained(tmp_path / "a", state_dict=module.base.state_dict())
    assert not (tmp_path / "a").exists()
    module.save_pretrained(save_directory=tmp_path / "b", state_dict=module.state_dict())
    loaded = LlamaForCausalLM.from_pretrained(tmp_path / "b")
    with torch.no_grad():
        torch.testing.assert_close(loaded(X).logits, module(X).logits)
