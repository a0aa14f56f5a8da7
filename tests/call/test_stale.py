"""Whether a patch belongs to the model as it is, and what the error says where it does not."""

from __future__ import annotations

import copy

import optree
import pytest
import torch
from torch import nn

from tests.helpers.models import D, V, loss_of, make, tokens
from tests.helpers.oracle import edited
from tests.helpers.rows import random_rows
from ttfunc import functional_call, patch
from ttfunc.call.stale import check_fresh

NAME = "embed_tokens.weight"
X = tokens(7, 3)


def test_a_fresh_patch_is_fresh():
    model = make("tied")
    source = patch(random_rows(model))[NAME].source
    check_fresh(model, source.matrix, [model.embed_tokens.weight] * 2, source)
    with pytest.raises(ValueError, match="stale patch: the parameter 'lm_head.weight'"):
        check_fresh(model, source.matrix, [model.embed_tokens.weight, None], source)


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "base_model.inner."])
def test_a_wrapper_or_a_part_is_called_with_the_matrix_that_it_has(prefix: str):
    """Whatever its name is there."""
    model = make("tied")
    wrapper = model
    for name in reversed(prefix.removesuffix(".").split(".")):
        outer = nn.Module()
        outer.add_module(name, wrapper)
        wrapper = outer
    wrapper.forward = lambda x: model(x)
    params = random_rows(model)
    expected = edited(model, params)(X)
    torch.testing.assert_close(functional_call(wrapper, patch(params), X), expected)
    outside = random_rows(wrapper, targets="embed_tokens")
    torch.testing.assert_close(functional_call(model, patch(outside), X), expected)
    embedded = functional_call(model.embed_tokens, patch(params), X)
    torch.testing.assert_close(embedded, edited(model, params).embed_tokens(X))
    other = nn.ModuleDict({"embed_tokens": nn.Embedding(V, D)})
    with pytest.raises(
        ValueError, match="stale patch: the parameter 'embed_tokens.weight' .*is an"
    ):
        functional_call(other, patch(params), X)


def test_a_copy_is_told():
    model = make("tied")
    with pytest.raises(ValueError, match="another model than the Language.*a deep copy"):
        functional_call(copy.deepcopy(model), patch(random_rows(model)), X)


def test_a_matrix_that_was_moved_is_told():
    model = make("tied")
    weights = patch(random_rows(model))
    model.double()
    with pytest.raises(ValueError, match="cast or moved since then. Call patch again"):
        functional_call(model, weights, X)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_patch_made_once_follows_its_rows_through_training(dtype: torch.dtype):
    model = make("tied").requires_grad_(False).to(dtype)
    params = random_rows(model, requires_grad=True)
    optimizer = torch.optim.SGD(optree.tree_leaves(params), 0.5)
    weights, losses = patch(params), []
    for _ in range(4):
        loss = loss_of(functional_call(model, weights, X).float())
        assert torch.equal(loss, loss_of(functional_call(model, patch(params), X).float()))
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert len(set(losses)) == 4


def test_a_patch_made_once_feeds_a_fused_head_through_training():
    model = make("function").requires_grad_(False)
    params = random_rows(model, requires_grad=True)
    weights = patch(params)
    for _ in range(3):
        found = torch.autograd.grad(
            loss_of(functional_call(model, weights, X)), params.deltas[NAME]
        )
        fresh = torch.autograd.grad(
            loss_of(functional_call(model, patch(params), X)), params.deltas[NAME]
        )
        assert torch.equal(found[0], fresh[0])
        with torch.no_grad():
            params.deltas[NAME].sub_(found[0])


def stepped(model: nn.Module, params) -> None:
    with torch.no_grad():
        params.deltas[NAME].add_(1)


def reloaded(model: nn.Module, params) -> None:
    model.load_state_dict({name: t * 2 for name, t in model.state_dict().items()})


@pytest.mark.parametrize("change", [stepped, reloaded])
@pytest.mark.parametrize("call", [functional_call, torch.func.functional_call])
def test_a_dense_patch_that_cannot_follow_is_stale(change, call):
    model = make("tied").requires_grad_(False)
    params = random_rows(model)
    dense, deferred = patch(params, dense=True), patch(params)
    call(model, dense, X)
    change(model, params)
    with pytest.raises(ValueError, match="stale patch: its rows, or the matrix, were written to"):
        call(model, dense, X)
    torch.testing.assert_close(call(model, deferred, X), call(model, patch(params), X))
    assert torch.equal(
        call(model, patch(params, dense=True), X), call(model, patch(params, dense=True), X)
    )


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_patch_made_without_grad_trains_where_it_is_called_with(mode, dtype: torch.dtype):
    model = make("tied").requires_grad_(False).to(dtype)
    params = random_rows(model, requires_grad=True)
    with mode():
        weights = patch(params)
    found, expected = (
        torch.autograd.grad(loss_of(functional_call(model, w, X).float()), params.deltas[NAME])[0]
        for w in (weights, patch(params))
    )
    assert found.abs().sum() > 0
    assert torch.equal(found, expected)
