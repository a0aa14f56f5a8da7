"""Every causal, masked and sequence-to-sequence architecture of transformers, at toy size.

The reference is an edit in place of a copy of the model, and full training of it. No zero hides a
mistake: every parameter is perturbed, head biases and the bias buffers of some included.
"""

from __future__ import annotations

import copy

import pytest
import torch

from tests.helpers.architecture_sizes import EXCLUDED
from tests.helpers.architectures import ARCHITECTURES, IDS, in_place, logits_of, new_rows, toy
from tests.helpers.oracle import same_bits, snapshot
from ttfunc import functional_call, merge, patch, unmerge


@pytest.mark.parametrize("name", [name for name in ARCHITECTURES if name not in EXCLUDED])
def test_patched_is_edited(name: str):
    model, inputs = toy(name)
    params = new_rows(model, name)
    (delta,) = params.deltas.values()
    with torch.no_grad():  # first, as BigBird chooses its kind of attention here
        plain = logits_of(model(**inputs))
    before = snapshot(model)

    # Copied before the calls: RecurrentGemma keeps states of the last one, with their graph.
    merged = copy.deepcopy(model)
    reference, weight = in_place(model, name, params)
    expected = logits_of(reference(**inputs))
    expected.float().pow(2).mean().backward()
    assert not torch.allclose(plain, expected)

    for dense in (True, False):
        weights = patch(params, dense=dense)
        logits = logits_of(functional_call(model, weights, kwargs=inputs))
        (gradient,) = torch.autograd.grad(logits.float().pow(2).mean(), delta)
        if dense:
            assert torch.equal(logits, expected)
        torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)
        scale = weight.grad[IDS].abs().max().item()
        torch.testing.assert_close(gradient / scale, weight.grad[IDS] / scale, rtol=1e-3, atol=1e-4)
    assert snapshot(model) == before

    state = model.state_dict()
    merged.load_state_dict(merge(state, params))
    assert torch.equal(logits_of(merged(**inputs)), expected)
    assert same_bits(unmerge(merged.state_dict(), params), state)

    # torch's own cannot serve a module that is reached by two paths: it leaves its patch in it.
    (matrix,) = (row.matrix for row in params.specs.values())
    if len(matrix.names) == len(matrix.slots):
        theirs = torch.func.functional_call(model, patch(params), (), inputs)
        assert torch.equal(logits_of(theirs), logits)
        assert snapshot(model) == before


def test_the_sweep_is_wide():
    assert len(ARCHITECTURES) - len(EXCLUDED) >= 250
    assert EXCLUDED.keys() <= set(ARCHITECTURES)
