"""Which tensors of a state dict are written to, and what cannot be told apart there."""

from __future__ import annotations

import pytest
import torch

from tests.helpers.models import make
from tests.helpers.oracle import same_bits
from tests.helpers.rows import random_rows
from ttfunc import init_deltas, merge, unmerge

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


@pytest.mark.parametrize("write", [merge, unmerge])
def test_two_matrices_that_are_one_here_are_refused(write):
    params = init_deltas(make("untied"), [7, 3], targets=["embed_tokens", "lm_head"])
    with pytest.raises(ValueError, match=r"one tensor in the state dict, and both .* \[3, 7\]"):
        write(make("tied").state_dict(), params)
    state = make("tied").state_dict()
    one = random_rows(make("untied"), {"embed_tokens": [1], "lm_head": [2]})
    assert same_bits(unmerge(merge(state, one), one), unmerge(state, one))
