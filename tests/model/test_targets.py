"""Finding the token matrices, and all that is tied to them."""

from __future__ import annotations

import re

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.nn.utils import parametrize
from transformers import OPTConfig, OPTForCausalLM

from tests.helpers.llama import llama
from tests.helpers.models import CORPUS, D, V, make
from ttfunc.model.targets import find_targets

PEFT = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is:FutureWarning")


class Towers(nn.Module):
    """Two towers with embeddings of one name, and one of another that ends alike."""

    def __init__(self) -> None:
        super().__init__()
        self.text = nn.ModuleDict({"emb": nn.Embedding(V, D), "pos_emb": nn.Embedding(4, D)})
        self.image = nn.ModuleDict({"emb": nn.Embedding(V, D), "norm": nn.LayerNorm(D)})
        self.head = nn.Linear(D, V)


@pytest.mark.parametrize("case", CORPUS)
def test_the_input_embedding_is_found(case: str):
    model = make(case)
    ((name, module),) = find_targets(model, None).items()
    assert module is model.embed_tokens
    assert model.get_submodule(name) is module


@pytest.mark.parametrize(
    ("targets", "names"),
    [
        ("text.emb", ["text.emb"]),
        ("emb", ["text.emb", "image.emb"]),
        ("pos_emb", ["text.pos_emb"]),
        ("head", ["head"]),
        (["text.emb", "head"], ["text.emb", "head"]),
        (["emb", "text.emb"], ["text.emb", "image.emb"]),
        (re.compile(r"text\..*"), ["text.emb", "text.pos_emb"]),
    ],
)
def test_targets_are_found_by_name_suffix_list_and_pattern(targets, names: list[str]):
    assert list(find_targets(Towers(), targets)) == names


@pytest.mark.parametrize(
    ("targets", "error", "match"),
    [
        ("nothing", ValueError, "'nothing' matches no module.*Candidates: 'text.emb'"),
        ("mb", ValueError, "'mb' matches no module"),
        ("", TypeError, "'' is a Towers: only Embedding and Linear"),
        (["text.emb", "nothing"], ValueError, "'nothing' matches no module"),
        (re.compile("emb"), ValueError, r"re.compile\('emb'\) matches no module"),
        (r"text\..*", ValueError, "for a regular expression give re.compile"),
        ([], ValueError, "targets is empty"),
        ([3], TypeError, "must be module names, got int"),
        (5, TypeError, "must be module names, got int"),
        ([None], TypeError, "must be module names, got NoneType"),
        ("image.norm", TypeError, "'image.norm' is a LayerNorm: only Embedding and Linear"),
        ("text", TypeError, "'text' is a ModuleDict"),
        ("text.emb.weight", ValueError, "'text.emb.weight' is a parameter.*targets='text.emb'"),
        ("emb.weight", ValueError, "is a parameter, .*Give targets='emb'"),
        ("nothing.weight", ValueError, "'nothing.weight' matches no module"),
        (None, ValueError, "cannot tell which module is the input embedding of Towers.*targets="),
    ],
)
def test_unknown_and_ambiguous_targets_are_refused(targets, error, match: str):
    with pytest.raises(error, match=match):
        find_targets(Towers(), targets)


def test_the_only_embedding_and_the_one_named_embed_tokens_are_found():
    alone = nn.Sequential(nn.Embedding(V, D), nn.Linear(D, V))
    assert list(find_targets(alone, None)) == ["0"]
    named = nn.ModuleDict({"embed_tokens": nn.Embedding(V, D), "positions": nn.Embedding(4, D)})
    assert list(find_targets(named, None)) == ["embed_tokens"]
    itself = nn.Embedding(V, D)
    assert find_targets(itself, None) == {"": itself}


def test_a_model_that_cannot_name_its_embedding_is_searched():
    class Composite(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.words = nn.Embedding(V, D)

        def get_input_embeddings(self):
            raise NotImplementedError

    assert list(find_targets(Composite(), None)) == ["words"]


def test_a_weight_that_is_no_float_parameter_is_refused():
    model = make("untied")
    parametrize.register_parametrization(model.embed_tokens, "weight", nn.Identity())
    with pytest.raises(TypeError, match="has no parameter named weight"):
        find_targets(model, None)
    model = make("untied")
    model.embed_tokens.weight = nn.Parameter(torch.zeros(V, D, dtype=torch.int8), False)
    with pytest.raises(TypeError, match="weight of dtype torch.int8: only floating-point"):
        find_targets(model, "embed_tokens")


def test_the_model_itself_is_a_target():
    head = nn.Linear(D, V)
    assert find_targets(head, "") == {"": head}
    with pytest.raises(ValueError, match='targets="" is the model itself'):
        find_targets(head, None)


@PEFT
@pytest.mark.parametrize("config", [{}, {"use_dora": True}])
def test_a_layer_within_an_adapter_is_meant_by_the_name_of_what_is_around_it(config):
    model = get_peft_model(
        llama(tie=False), LoraConfig(target_modules=["lm_head", "embed_tokens"], r=2, **config)
    )
    for target in ("lm_head", "embed_tokens"):
        ((name, module),) = find_targets(model, target).items()
        assert name.endswith(f"{target}.base_layer")
        assert module is model.get_submodule(name)
        assert find_targets(model, [target, f"{target}.base_layer"]) == {name: module}
    assert list(find_targets(model.get_submodule("base_model.model.lm_head"), "")) == ["base_layer"]
    assert find_targets(model, None) == find_targets(model, "embed_tokens")


@PEFT
def test_an_adapter_around_the_embedding_of_a_model_with_positions_hides_nothing():
    config = OPTConfig(
        vocab_size=V,
        hidden_size=D,
        ffn_dim=D,
        num_hidden_layers=1,
        num_attention_heads=2,
        tie_word_embeddings=False,
    )
    model = get_peft_model(OPTForCausalLM(config), LoraConfig(target_modules=["embed_tokens"], r=2))
    ((name, _),) = find_targets(model, None).items()
    assert name.endswith("decoder.embed_tokens.base_layer")
    plain = nn.ModuleDict({"embed_tokens": nn.Embedding(V, D), "positions": nn.Embedding(4, D)})
    model = get_peft_model(plain, LoraConfig(target_modules=["embed_tokens"], r=2))
    ((name, _),) = find_targets(model, None).items()
    assert name.endswith(".embed_tokens.base_layer")


@PEFT
@pytest.mark.parametrize("targets", [None, "embed_tokens"])
def test_a_copy_of_the_whole_embedding_is_refused(targets):
    config = LoraConfig(target_modules=["q_proj"], modules_to_save=["embed_tokens"], r=2)
    model = get_peft_model(llama(tie=False), config)
    with pytest.raises(ValueError, match="whole copy of .*embed_tokens', .*modules_to_save"):
        find_targets(model, targets)


class Codes(torch.Tensor):
    """As torchao's: it says a float's dtype, and has codes."""

    def dequantize(self) -> torch.Tensor:
        return self.as_subclass(torch.Tensor)


def test_codes_that_say_the_dtype_of_a_float_are_refused():
    model = make("untied")
    model.lm_head.weight = nn.Parameter(torch.zeros(V, D).as_subclass(Codes), False)
    with pytest.raises(TypeError, match=r"dtype torch.float32 \(Codes\): only floating-point"):
        find_targets(model, "lm_head")
    model.lm_head.weight = nn.Parameter(torch.zeros(V, D, dtype=torch.float8_e4m3fn), False)
    assert list(find_targets(model, "lm_head")) == ["lm_head"]
    model.lm_head.weight_scale_inv = nn.Parameter(torch.ones(1, 1), False)
    with pytest.raises(TypeError, match="dtype torch.float8_e4m3fn: only floating-point"):
        find_targets(model, "lm_head")
