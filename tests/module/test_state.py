"""The state dict of a TokenModule: the rows, their ids, and what is refused."""

from __future__ import annotations

import copy

import pytest
import torch
from torch.distributed.checkpoint import state_dict as distributed

import tests.helpers.models as models
import tests.helpers.oracle as oracle
from tests.helpers.lessons import IDS, ROWS, TOKENS, bridge, student
from ttfunc import init_deltas
from ttfunc.module.token_module import TokenModule


def test_state_dict_round_trip():
    module, other = bridge(), TokenModule(model := student(), init_deltas(model, TOKENS))
    assert not torch.equal(other.state_dict()[ROWS], module.state_dict()[ROWS])
    other.load_state_dict(module.state_dict())
    assert oracle.same_bits(other.state_dict(), module.state_dict())
    distributed.set_model_state_dict(module, distributed.get_model_state_dict(other))
    assert oracle.same_bits(other.state_dict(), module.state_dict())


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({IDS: torch.tensor([48, 6, 49])}, r"tokens \[48, 6, 49\].*trains \[48, 5, 49\]"),
        ({IDS: torch.tensor([5, 48, 49])}, r"tokens \[5, 48, 49\].*in the same order"),
        ({ROWS: torch.ones(2, 16)}, r"has shape \(2, 16\), and \(3, 16\) is needed"),
        ({ROWS: torch.ones(3, 8)}, r"has shape \(3, 8\), and \(3, 16\) is needed"),
        ({IDS: torch.ones(3, 1)}, r"are the rows of tokens \[\[1.0\], \[1.0\], \[1.0\]\]"),
        ({IDS: None}, r"lacks \['token_indices/model/embed_tokens/weight'\]"),
        ({ROWS: None}, r"lacks \['deltas/model/embed_tokens/weight'\]"),
        ({ROWS: "text"}, r"lacks \['deltas/model/embed_tokens/weight'\]"),
    ],
)
def test_rows_of_another_adapter_are_refused_whole(change, message, strict):
    module = bridge()
    before = copy.deepcopy(module.state_dict())
    state = {ROWS: torch.ones(3, 16), IDS: torch.tensor(TOKENS)} | change
    state = {key: value for key, value in state.items() if value is not None}
    with pytest.raises(RuntimeError, match=message):
        module.load_state_dict(state, strict=strict)
    assert oracle.same_bits(module.state_dict(), before)


def test_of_two_matrices_both_are_loaded_or_none():
    model = models.make("untied").requires_grad_(False)
    module = TokenModule(model, init_deltas(model, {"embed_tokens": [1, 2], "lm_head": [3]}))
    names = {"deltas/embed_tokens/weight", "deltas/lm_head/weight"}
    assert dict(module.named_parameters()).keys() == names
    before = copy.deepcopy(module.state_dict())
    state = {key: tensor * 2 for key, tensor in before.items() if key in names}
    state |= {"token_indices/embed_tokens/weight": torch.tensor([1, 2])}
    state |= {"token_indices/lm_head/weight": torch.tensor([4])}
    with pytest.raises(RuntimeError, match=r"lm_head/weight' are the rows of tokens \[4\]"):
        module.load_state_dict(state)
    assert oracle.same_bits(module.state_dict(), before)
    module.load_state_dict(state | {"token_indices/lm_head/weight": torch.tensor([3])})
    for name, delta in module.params().deltas.items():
        assert torch.equal(delta, module.params().originals[name] * 2)


def test_the_state_dict_of_the_model_is_refused():
    module = bridge()
    with pytest.raises(
        RuntimeError, match=r"lacks .* and begins with \['model.embed_tokens.weight'"
    ):
        module.load_state_dict(student().state_dict(), strict=False)


def test_a_further_entry_is_refused_where_it_is_strict():
    module = bridge()
    state = {**module.state_dict(), "head": torch.ones(1)}
    with pytest.raises(RuntimeError, match='Unexpected key.*"head"'):
        module.load_state_dict(state)
    module.load_state_dict(state, strict=False)
