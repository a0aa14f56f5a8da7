"""Which tensors of a state dict are written to, and what cannot be told apart there."""

from __future__ import annotations

import pickle

import pytest
import torch

from tests.helpers.models import D, V, make
from tests.helpers.oracle import same_bits
from tests.helpers.rows import random_rows
from ttfunc import merge, unmerge

NAME, HEAD = "embed_tokens.weight", "lm_head.weight"


def test_one_half_of_a_tie_is_not_left_behind():
    """A head that a LoRA wraps has another name, and a state dict out of a file no identities."""
    params = random_rows(make("tied"), [7, 3])
    state = {name: tensor.clone() for name, tensor in make("tied").state_dict().items()}
    state["lm_head.base_layer.weight"] = state.pop(HEAD)
    names = {HEAD: "lm_head.base_layer.weight"}
    for write in (merge, unmerge):
        with pytest.raises(KeyError, match="would be left as it is. Give names=") as error:
            write(state, params)
        assert f"names={names!r}" in error.value.args[0]
    merged = merge(state, params, names=names)
    assert torch.equal(merged["lm_head.base_layer.weight"], merged[NAME])
    state["lm_head.base_layer.weight"] = state[NAME]
    assert torch.equal(merge(state, params)["lm_head.base_layer.weight"], merged[NAME])


IDS = {"head": {"lm_head": [2]}, "input": {"embed_tokens": [2]},
       "both": {"embed_tokens": [1], "lm_head": [2]},
       "the same": {"embed_tokens": [1], "lm_head": [1]}}  # fmt: skip
TIED = {
    "identity": lambda state: {**state, HEAD: state[NAME]},
    "memory": lambda state: {**state, HEAD: state[NAME].view(state[NAME].shape)},
    "in a PeftModel": lambda state: {
        f"base_model.model.{name}": tensor for name, tensor in {**state, HEAD: state[NAME]}.items()
    },
}


@pytest.mark.parametrize("write", [merge, unmerge])
@pytest.mark.parametrize("ends", IDS)
@pytest.mark.parametrize("tie", TIED)
def test_what_was_apart_and_is_one_tensor_here_is_refused(write, ends, tie):
    """Rows of one end would be read at the other end too."""
    params = random_rows(make("untied"), IDS[ends])
    state = TIED[tie](make("untied").state_dict())
    before = {name: tensor.clone() for name, tensor in state.items()}
    with pytest.raises(ValueError, match="cannot be written.*one tensor.*was another matrix when"):
        write(state, params)
    assert same_bits(state, before)
    # Also where the rows have been away from their model, and where the state dict ties by copies.
    with pytest.raises(ValueError, match="cannot be written.*one tensor"):
        write(state, pickle.loads(pickle.dumps(params)))  # noqa: S301
    apart = {name: tensor.clone() for name, tensor in state.items()}
    assert same_bits(unmerge(merge(apart, params), params), apart | unmerge(apart, params))


@pytest.mark.parametrize("write", [merge, unmerge])
def test_no_name_leads_from_one_end_to_the_other(write):
    """As for what a file of a tied model has: one of the two names."""
    params = random_rows(make("untied"), [2], targets="lm_head")
    state = make("tied").state_dict()
    del state[HEAD]
    with pytest.raises(KeyError, match="none of the names"):
        write(state, params)
    with pytest.raises(ValueError, match="cannot be written.*was another matrix when"):
        write(state, params, names={HEAD: NAME})


def test_rows_of_parts_are_written_to_a_tied_whole():
    """A model without a head has nothing apart, and its rows may go to a model that ties one."""
    params = random_rows(make("tied").embed_tokens, [2])
    state = make("tied").state_dict()
    merged = merge(state, params, names={"weight": NAME})
    assert merged[HEAD] is merged[NAME]
    assert torch.equal(merged[NAME][2], params.deltas["weight"][0])


def test_what_is_near_to_a_name_of_the_matrix_is_its_own():
    """The name of another matrix may be the end of its own."""
    model = torch.nn.ModuleDict({"emb": torch.nn.Embedding(V, D), "output": torch.nn.ModuleDict()})
    model["output"]["emb"] = torch.nn.Embedding(V, D)
    params = random_rows(model, [2], targets="output.emb")
    state = model.state_dict()
    held = {f"{way}.{name}": one for way in ("first", "second") for name, one in state.items()}
    merged = merge(held, params, names={"output.emb.weight": "first.output.emb.weight"})
    assert merged["second.output.emb.weight"] is merged["first.output.emb.weight"]
    assert merged["first.emb.weight"] is held["second.emb.weight"]
