"""Optimizers and pytrees of others, each against a loop that knows no pytree."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterator

import optree
import pytest
import torch
import torchopt
from optree.integrations.torch import tree_ravel
from torch import Tensor, nn
from torch.func import grad

from tests.helpers.clients import IDS, STEPS, batch, loss_at, setting, trainable
from tests.helpers.models import V, loss_of, make
from tests.helpers.oracle import edited, row_gradients
from tests.helpers.rows import random_rows
from ttfunc import TokenDeltas, functional_call, patch

NAME = "embed_tokens.weight"
CASES = ["tied", "untied", "biased", "encoder_decoder", "einsum"]


def slope_at(model: nn.Module, params: TokenDeltas, x: Tensor) -> TokenDeltas:
    return grad(lambda p: loss_at(model, p, x))(params)


# --- torch.optim

OPTIMIZERS: dict[str, Callable[[list[Tensor]], torch.optim.Optimizer]] = {
    "SGD": lambda leaves: torch.optim.SGD(leaves, lr=0.1),
    "momentum": lambda leaves: torch.optim.SGD(leaves, lr=0.1, momentum=0.9, nesterov=True),
    "decay": lambda leaves: torch.optim.SGD(leaves, lr=0.1, weight_decay=0.1),
    "Adam": lambda leaves: torch.optim.Adam(leaves, lr=0.1),
    "AMSGrad": lambda leaves: torch.optim.Adam(leaves, lr=0.1, amsgrad=True),
    "AdamW": lambda leaves: torch.optim.AdamW(leaves, lr=0.1, weight_decay=0.1),
    "fused AdamW": lambda leaves: torch.optim.AdamW(leaves, lr=0.1, fused=True),
    "NAdam": lambda leaves: torch.optim.NAdam(leaves, lr=0.1),
    "Adagrad": lambda leaves: torch.optim.Adagrad(leaves, lr=0.1),
    "RMSprop": lambda leaves: torch.optim.RMSprop(leaves, lr=0.1),
    "Rprop": lambda leaves: torch.optim.Rprop(leaves, lr=0.1),
    "LBFGS": lambda leaves: torch.optim.LBFGS(leaves, lr=0.1, max_iter=3),
}


def fit(optimizer: torch.optim.Optimizer, loss: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """Steps of an optimizer, as a training loop takes them."""
    for step in range(STEPS):
        optimizer.step(functools.partial(backward, optimizer, loss, batch(step)))
        yield


def backward(optimizer: torch.optim.Optimizer, loss: Callable[[Tensor], Tensor], x: Tensor):
    optimizer.zero_grad()
    value = loss(x)
    value.backward()
    return value


def fit_rows(model, params: TokenDeltas, name: str, dense: bool) -> dict[str, Tensor]:
    params = trainable(params)
    optimizer = OPTIMIZERS[name](optree.tree_leaves(params))
    for _ in fit(optimizer, lambda x: loss_at(model, params, x, dense)):
        pass
    return optree.tree_map(torch.detach, params).deltas


def fit_full_matrix(model, params: TokenDeltas, name: str) -> dict[str, Tensor]:
    """Training a copy's whole matrix, of which all but the rows are put back at each step."""
    model = edited(model, params)
    weight = model.get_parameter(NAME).requires_grad_()
    others = torch.tensor([i for i in range(V) if i not in IDS])
    frozen = weight.detach()[others]
    weight.register_hook(lambda gradient: gradient.index_fill(0, others, 0))
    for _ in fit(OPTIMIZERS[name]([weight]), lambda x: loss_of(model(x))):
        weight.data[others] = frozen
    return {NAME: weight.detach()[IDS]}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_torch_optim_trains_the_rows_as_it_would_in_the_full_matrix(case: str, name: str):
    model, params = setting(case)
    found, expected = fit_rows(model, params, name, False), fit_full_matrix(model, params, name)
    assert (found[NAME] - params.deltas[NAME]).abs().max() > 0.01
    torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("case", CASES)
def test_sgd_on_dense_rows_is_that_of_the_full_matrix_bit_for_bit(case: str):
    model, params = setting(case)
    found = fit_rows(model, params, "SGD", dense=True)
    assert torch.equal(found[NAME], fit_full_matrix(model, params, "SGD")[NAME])


def test_the_norm_of_the_gradient_is_clipped_to_that_of_the_rows():
    model, params = setting()
    params = trainable(params)
    loss_at(model, params, batch(0)).backward()
    reference = edited(model, params).requires_grad_()
    loss_of(reference(batch(0))).backward()
    norm = torch.nn.utils.clip_grad_norm_(optree.tree_leaves(params), 1e-3)
    torch.testing.assert_close(norm, row_gradients(reference, params)[NAME].norm())
    torch.testing.assert_close(params.deltas[NAME].grad.norm().item(), 1e-3, rtol=1e-3, atol=0)


# --- TorchOpt

TORCHOPT = {
    "SGD": torchopt.sgd(lr=0.1),
    "momentum": torchopt.sgd(lr=0.1, momentum=0.9, nesterov=True),
    "Adam": torchopt.adam(lr=0.1),
    "AdamW": torchopt.adamw(lr=0.1, weight_decay=0.1),
    "RMSprop": torchopt.rmsprop(lr=0.1, alpha=0.99),
}


@pytest.mark.parametrize("name", TORCHOPT)
def test_torchopt_steps_as_torch_optim_does(name: str):
    model, params = setting()
    optimizer, trained = TORCHOPT[name], params
    state = optimizer.init(trained)
    for step in range(STEPS):
        gradient = slope_at(model, trained, batch(step))
        updates, state = optimizer.update(gradient, state, params=trained, inplace=False)
        trained = torchopt.apply_updates(trained, updates, inplace=False)
    assert isinstance(trained, TokenDeltas)
    expected = fit_rows(model, params, name, dense=False)
    # TorchOpt takes the powers of Adam's betas in float32, whatever the rows are.
    rtol = 1e-3 if name.startswith("Adam") else 1e-8
    torch.testing.assert_close(trained.deltas, expected, rtol=rtol, atol=1e-2 * rtol)


def test_a_gradient_through_a_step_of_torchopt_is_that_through_autograd_on_the_full_matrix():
    model, params = setting()
    optimizer = torchopt.sgd(lr=0.1, momentum=0.9)

    def outer(start: TokenDeltas) -> Tensor:
        state, rows = optimizer.init(start), start
        for step in range(2):
            gradient = slope_at(model, rows, batch(step))
            updates, state = optimizer.update(gradient, state, inplace=False)
            rows = torchopt.apply_updates(rows, updates, inplace=False)
        return loss_at(model, rows, batch(2))

    start = params.deltas[NAME].clone().requires_grad_()
    base, ids = model.get_parameter(NAME).detach(), torch.tensor(IDS)

    def plain(rows: Tensor, x: Tensor) -> Tensor:
        weight = base.index_copy(0, ids, rows)
        return loss_of(torch.func.functional_call(model, {NAME: weight}, (x,)))

    rows, momentum = start, torch.zeros_like(start)
    for step in range(2):
        (slope,) = torch.autograd.grad(plain(rows, batch(step)), rows, create_graph=True)
        momentum = 0.9 * momentum + slope
        rows = rows - 0.1 * momentum
    (expected,) = torch.autograd.grad(plain(rows, batch(2)), start)
    torch.testing.assert_close(grad(outer)(params).deltas[NAME], expected, rtol=1e-8, atol=1e-10)


# --- optree and torch's own pytree


def test_a_flat_vector_of_the_rows_is_a_view_for_solvers():
    model, params = setting("untied")
    vector, unravel = tree_ravel(params)
    assert vector.shape == (len(IDS) * params.deltas[NAME].shape[1],)
    gradient = grad(lambda v: loss_at(model, unravel(v), batch(0)))(vector)
    expected = grad(lambda p: loss_at(model, p, batch(0)))(params)
    torch.testing.assert_close(unravel(gradient).deltas, expected.deltas)


def test_maps_of_optree_and_torch_agree():
    model, params = setting()
    before = copy.deepcopy(params.deltas)
    doubled = optree.tree_map(lambda a, b: a + b, params, params)
    also = torch.utils._pytree.tree_map(lambda a: 2 * a, params)
    assert torch.equal(doubled.deltas[NAME], also.deltas[NAME])
    assert torch.equal(params.deltas[NAME], before[NAME])
    assert optree.tree_structure(doubled) == optree.tree_structure(params)
    largest = optree.tree_reduce(torch.maximum, optree.tree_map(torch.max, params))
    assert largest == before[NAME].max()
    assert loss_at(model, doubled, batch(0)) != loss_at(model, params, batch(0))


@pytest.mark.parametrize("functional", [False, True])
def test_weight_decay_pulls_towards_the_start_and_leaves_what_no_batch_reads(functional: bool):
    model = make("untied").requires_grad_(False)  # whose head does not read the embedding
    start = random_rows(model, [7, 3])
    x = torch.tensor([[7, 1, 7, 2]])  # without token 3

    def loss(offset: TokenDeltas) -> torch.Tensor:
        moved = optree.tree_map(torch.add, start, offset)
        return loss_of(functional_call(model, patch(moved), (x,)))

    offset = optree.tree_map(lambda row: torch.zeros_like(row).requires_grad_(), start)
    if functional:
        optimizer = torchopt.adamw(1e-2, weight_decay=0.5)
        state = optimizer.init(offset)
        for _ in range(5):
            updates, state = optimizer.update(grad(loss)(offset), state, params=offset)
            offset = torchopt.apply_updates(offset, updates, inplace=False)
    else:
        optimizer = torch.optim.AdamW(optree.tree_leaves(offset), lr=1e-2, weight_decay=0.5)
        for _ in range(5):
            optimizer.zero_grad()
            loss(offset).backward()
            optimizer.step()
    (moved,) = optree.tree_leaves(offset)
    assert moved[0].abs().min() > 0
    assert moved[1].count_nonzero() == 0
    # Where no batch reads the row any more, decay alone is left, and brings it back to its start.
    before, x = moved.detach().clone(), torch.tensor([[1, 2]])
    gradient = grad(loss)(optree.tree_map(torch.Tensor.detach, offset))
    moved = moved.detach().requires_grad_()
    (moved.grad,) = optree.tree_leaves(gradient)
    torch.optim.AdamW([moved], lr=1e-2, weight_decay=0.5).step()
    torch.testing.assert_close(moved, before * (1 - 1e-2 * 0.5))
