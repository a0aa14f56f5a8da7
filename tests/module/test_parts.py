"""The modules and tensors that a TokenModule shows of its model."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tests.helpers.lessons import TOKENS, bridge, merged
from tests.helpers.rows import random_rows
from ttfunc import merge
from ttfunc.module.token_module import TokenModule
from ttfunc.weight.deferred import PatchedWeight

X = torch.tensor([TOKENS])


def test_the_weight_of_the_head_is_the_patched_one():
    module = bridge()
    plain, patched = module.base, merged(module)
    for head in (module.get_output_embeddings(), module.lm_head):
        assert isinstance(head, nn.Linear)
        assert isinstance(head.weight, PatchedWeight)
        assert head.bias is None
        assert torch.equal(head.weight.detach().clone(), patched.lm_head.weight)
        assert not torch.equal(head.weight.detach().clone(), plain.lm_head.weight)
    h = torch.randn(3, 16)
    expected = F.linear(h, patched.lm_head.weight)
    torch.testing.assert_close(module.lm_head(h), expected)
    torch.testing.assert_close(module.lm_head.forward(h), expected)
    module.lm_head(h).sum().backward()
    (row,) = module.parameters()
    torch.testing.assert_close(row.grad, h.sum(0).expand(3, 16))


def test_a_parameter_of_the_model_is_the_patched_one():
    model = nn.Embedding(9, 4).requires_grad_(False)
    module = TokenModule(model, random_rows(model, [2]))
    (row,) = module.parameters()
    assert torch.equal(module.weight.detach()[torch.tensor([2])], row)


@pytest.mark.parametrize("name", ["base_model", "model", "get_decoder"])
def test_the_backbone_runs_with_the_rows(name):
    module = bridge()
    part = getattr(module, name)
    part = part() if name == "get_decoder" else part
    expected = merged(module).model(X).last_hidden_state
    found = part(X).last_hidden_state
    assert torch.equal(found, expected)
    assert not torch.equal(found, module.base.model(X).last_hidden_state)
    assert torch.equal(part.embed_tokens(X), merged(module).model.embed_tokens(X))
    assert torch.equal(part.forward(X).last_hidden_state, expected)
    assert module.model.layers is module.base.model.layers


def test_a_hook_and_an_attribute_of_a_part_are_those_of_the_model():
    module, seen = bridge(), []
    embedding = module.get_input_embeddings()
    assert isinstance(embedding, nn.Embedding)
    handle = embedding.register_forward_hook(lambda *args: seen.append(args[0].noise))
    embedding.noise = 5
    assert module.base.get_input_embeddings().noise == 5
    module(X)
    assert seen == [5]
    handle.remove()
    del module.get_input_embeddings().noise
    module(X)
    assert seen == [5]
    assert not hasattr(module.base.get_input_embeddings(), "noise")


# Parts of parts, and what a part is not


class Shelf(nn.Module):
    """Holds its head in containers of every kind."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(20, 4)
        self.heads = nn.ModuleList([nn.Linear(4, 20, bias=False), nn.Linear(4, 4)])
        self.heads[0].weight = self.embed.weight
        self.sequence = nn.Sequential(self.embed)
        self.named = nn.ModuleDict({"head": self.heads[0]})
        self.listed = [self.heads[0]]
        self.ready = self.heads[0].forward

    def forward(self, x):
        return self.heads[0](self.embed(x))

    @property
    def doubled(self):
        return self.embed.weight * 2


@pytest.mark.parametrize(
    "read",
    [
        lambda m, h: m.heads[0](h),
        lambda m, h: next(iter(m.heads))(h),
        lambda m, h: next(m.heads.children())(h),
        lambda m, h: m.heads[:1][0](h),
        lambda m, h: m.named["head"](h),
        lambda m, h: m.listed[0](h),
        lambda m, h: m.ready(h),
        lambda m, h: h @ m.doubled.T,
        lambda m, h: h @ next(m.heads.parameters()).T,
        lambda m, h: h @ m.sequence[0].weight.T,
        lambda m, h: m.get_submodule("heads.0")(h),
    ],
)
def test_a_module_in_a_container_has_the_rows_and_their_gradient(read):
    torch.manual_seed(0)
    model = Shelf().requires_grad_(False)
    module = TokenModule(model, random_rows(model, [3, 7], targets="embed"))
    full, h = Shelf(), torch.randn(2, 4)
    full.load_state_dict(merge(model.state_dict(), module.params()))
    expected, found = read(full, h), read(module, h)
    torch.testing.assert_close(found, expected)
    (row,) = module.parameters()
    factor = torch.randn_like(expected)
    (of_full,) = torch.autograd.grad((expected * factor).sum(), full.embed.weight)
    (of_row,) = torch.autograd.grad((found * factor).sum(), row)
    torch.testing.assert_close(of_row, of_full[[3, 7]])


@pytest.mark.parametrize(
    "name", ["state_dict", "load_state_dict", "save_pretrained", "set_input_embeddings"]
)
def test_a_part_neither_saves_nor_writes_weights(name):
    with pytest.raises(AttributeError, match=f"'{name}' of a part of a TokenModule would"):
        getattr(bridge().base_model, name)


def test_a_part_is_not_copied_alone():
    with pytest.raises(TypeError, match="Copy the TokenModule, and take the part of the copy"):
        copy.deepcopy(bridge().base_model)


def test_a_part_of_a_copy_has_the_modes_of_the_copy():
    module = bridge().train()
    copied = copy.deepcopy(module).eval()
    assert not copied.base_model.training
    assert module.base_model.training
    with pytest.raises(RuntimeError, match="Switch the whole copy"):
        copied.base_model.eval()
    module.base_model.eval()
    assert not module.base.model.training
