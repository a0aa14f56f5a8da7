"""Which places of a model a call gives other weights to."""

from __future__ import annotations

import torch
from torch import nn

from tests.helpers.models import D, V, make
from ttfunc import init_deltas, patch
from ttfunc.call.slots import find_slots, is_patch

NAME = "embed_tokens.weight"


def test_a_patch_goes_to_every_holder_and_counts_its_own_reads():
    model = make("encoder_decoder")
    weights = patch(init_deltas(model, [3]))
    slots = find_slots(model, weights)
    assert [slot.name for slot in slots] == [NAME, "lm_head.weight"]
    assert all(slot.held is model.embed_tokens.weight for slot in slots)
    assert all(slot.weight is weights[NAME] for slot in slots)
    assert slots[0].stand_in is slots[1].stand_in is not weights[NAME]
    slots[0].stand_in + 0
    assert slots[1].stand_in.source.uses == {"dense"}
    assert weights[NAME].source.uses == set()


def test_a_plain_tensor_stands_for_itself():
    model = make("untied")
    weights = {"lm_head.weight": torch.zeros(V, D)}
    (slot,) = find_slots(model, weights)
    assert slot.stand_in is slot.weight is weights["lm_head.weight"]
    assert slot.held is model.lm_head.weight


def test_two_parameters_over_one_memory_are_two_places():
    model = make("storage_tied")
    slots = find_slots(model, patch(init_deltas(model, [3])))
    assert {id(slot.held) for slot in slots} == {
        id(model.embed_tokens.weight),
        id(model.lm_head.weight),
    }


def test_what_a_patch_is():
    model = nn.Sequential(nn.Embedding(9, 2))
    assert is_patch(patch(init_deltas(model, [3]))["0.weight"])
    assert is_patch(patch(init_deltas(model, [3]), dense=True)["0.weight"])
    assert not is_patch(model[0].weight)


def test_a_tie_through_memory_that_comes_or_goes_is_seen_by_the_next_call():
    torch.manual_seed(0)
    model = nn.ModuleDict({"a": nn.Embedding(9, 4), "b": nn.Linear(4, 9, bias=False)})
    model.forward = lambda x: model["b"](model["a"](x))  # of the model as it is
    weights = {"a.weight": torch.randn(9, 4)}

    def held() -> dict[str, bool]:
        return {slot.name: True for slot in find_slots(model, weights)}

    assert held() == {"a.weight": True}
    model["b"].weight = nn.Parameter(model["a"].weight.data)
    assert held() == {"a.weight": True, "b.weight": True}
    model.double()
    weights["a.weight"] = weights["a.weight"].double()
    assert held() == {"a.weight": True}
