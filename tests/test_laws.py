"""The laws, over the whole corpus and random rows, against the clone-and-assign oracle."""

from __future__ import annotations

import copy
import warnings

import hypothesis.strategies as st
import optree
import pytest
import torch
from hypothesis import given, settings
from torch import Tensor, nn

from tests.helpers.models import CORPUS, V, loss_of, make, tokens
from tests.helpers.oracle import bits, edited, row_gradients, same_bits, snapshot
from tests.helpers.rows import random_rows
from ttfunc import TokenDeltas, combine, functional_call, init_deltas, merge, patch, unmerge

indices = st.lists(st.integers(0, V - 1), min_size=1, max_size=V, unique=True)
cases = st.sampled_from(sorted(CORPUS))
seeds = st.integers(0, 2**16)
floats = st.sampled_from([torch.float32, torch.bfloat16, torch.float16, torch.float64])

# torch's own leaves its patch in a model that reaches one module by two paths.
SERVED_BY_TORCH = sorted(CORPUS.keys() - {"encoder_decoder"})


def gradients(model: nn.Module, params: TokenDeltas, x: Tensor, dense: bool) -> dict[str, Tensor]:
    def loss(p: TokenDeltas) -> Tensor:
        return loss_of(functional_call(model, patch(p, dense=dense), (x,)))

    return torch.func.grad(loss)(params).deltas


@pytest.mark.parametrize("case", CORPUS)
@settings(max_examples=15)
@given(idx=indices, seed=seeds)
def test_identity(case: str, idx: list[int], seed: int):
    model, x = make(case, seed), tokens(*idx[:18])
    plain = copy.deepcopy(model)(x)  # max_norm rescales the model that it runs in
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*padding_idx")
        params = init_deltas(model, idx)
    assert torch.equal(functional_call(model, patch(params, dense=True), (x,)), plain)
    torch.testing.assert_close(functional_call(model, patch(params), (x,)), plain)


@pytest.mark.parametrize("dense", [False, True], ids=["deferred", "dense"])
@pytest.mark.parametrize("case", CORPUS)
@settings(max_examples=15)
@given(idx=indices, seed=seeds)
def test_agreement(case: str, dense: bool, idx: list[int], seed: int):
    model, x = make(case, seed), tokens(*idx[:18])
    params = random_rows(model, idx, seed)
    reference = edited(model, params)
    expected = reference(x)
    loss_of(expected).backward()

    torch.testing.assert_close(functional_call(model, patch(params, dense=dense), (x,)), expected)
    found = gradients(model, params, x, dense)
    for name, gradient in row_gradients(reference, params).items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("case", CORPUS)
@settings(max_examples=10)
@given(idx=indices, seed=seeds)
def test_the_merged_model_is_the_patched_one(case: str, idx: list[int], seed: int):
    model, x = make(case, seed), tokens(*idx[:18])
    params = random_rows(model, idx, seed)
    merged = copy.deepcopy(model)
    merged.load_state_dict(merge(model.state_dict(), params))
    assert torch.equal(functional_call(model, patch(params, dense=True), (x,)), merged(x))


@pytest.mark.parametrize("case", SERVED_BY_TORCH)
@settings(max_examples=10)
@given(idx=indices, seed=seeds, dense=st.booleans())
def test_torchs_functional_call_gives_the_same(case: str, idx: list[int], seed: int, dense: bool):
    model, x = make(case, seed), tokens(*idx[:18])
    params = random_rows(model, idx, seed)
    ours = functional_call(model, patch(params, dense=dense), (x,))
    theirs = torch.func.functional_call(model, patch(params, dense=dense), (x,))
    assert torch.equal(theirs, ours)


@given(case=cases, idx=indices, seed=seeds, dtype=floats)
def test_inverse(case: str, idx: list[int], seed: int, dtype: torch.dtype):
    model = make(case, seed).to(dtype)
    params = random_rows(model, idx, seed)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    merged = merge(before, params)
    assert not same_bits(merged, before)
    assert same_bits(unmerge(merged, params), before)


@given(case=cases, idx=indices, seed=seeds, dense=st.booleans(), fails=st.booleans())
def test_purity(case: str, idx: list[int], seed: int, dense: bool, fails: bool):
    model, x = make(case, seed), tokens(*idx[:18])
    params = random_rows(model, idx, seed)
    state = model.state_dict()
    before, rows, inputs = snapshot(model), copy.deepcopy(params.deltas), x.clone()
    names, tensors = list(state), {name: bits(tensor) for name, tensor in state.items()}

    gradients(model, params, x, dense)
    unmerge(merge(state, params), params)
    if fails:
        handle = model.body.register_forward_hook(lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError, match="division"):
            functional_call(model, patch(params, dense=dense), (x,))
        handle.remove()

    assert snapshot(model) == before
    assert same_bits(params.deltas, rows)
    assert torch.equal(x, inputs)
    assert list(state) == names
    assert {name: bits(tensor) for name, tensor in state.items()} == tensors


@given(case=cases, idx=indices, seed=seeds)
def test_sharing(case: str, idx: list[int], seed: int):
    model = make(case, seed)
    params = random_rows(model, idx, seed)
    state = model.state_dict()
    merged = merge(state, params)
    patched = {alias for names in params.tied.values() for alias in names}
    assert list(merged) == list(state)
    for name in state:
        assert (merged[name] is state[name]) == (name not in patched)
        for other in state:
            if state[name].data_ptr() == state[other].data_ptr():
                assert merged[name].data_ptr() == merged[other].data_ptr()


@given(case=cases, idx=indices.filter(lambda i: len(i) > 1), seed=seeds, data=st.data())
def test_composition(case: str, idx: list[int], seed: int, data: st.DataObject):
    model, x = make(case, seed), tokens(*idx[:18])
    cut = data.draw(st.integers(1, len(idx) - 1))
    a, b = random_rows(model, idx[:cut], seed), random_rows(model, idx[cut:], seed + 1)
    both = functional_call(model, patch(combine(a, b), dense=True), (x,))
    assert torch.equal(functional_call(model, patch(a, b, dense=True), (x,)), both)
    assert torch.equal(functional_call(model, patch(b, a, dense=True), (x,)), both)
    torch.testing.assert_close(functional_call(model, patch(b, a), (x,)), both)
    state = model.state_dict()
    assert same_bits(merge(state, a, b), merge(merge(state, b), a))
    assert same_bits(unmerge(merge(state, a, b), b, a), state)
    with pytest.raises(ValueError, match="more than one of the parameters"):
        patch(a, combine(b, a))


@given(case=cases, idx=indices, seed=seeds)
def test_ties(case: str, idx: list[int], seed: int):
    model = make(case, seed)
    params = random_rows(model, idx, seed)
    (names,) = params.tied.values()
    tied = case != "untied"
    assert ("lm_head.weight" in names) == tied
    assert len(optree.tree_leaves(params)) == 1
