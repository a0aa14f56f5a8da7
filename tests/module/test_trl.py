"""A loss that multiplies by the weight itself, TRL's, against one on the whole matrix."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from trl.kernels import ChunkedLogProbFunction

from tests.helpers.rows import random_rows
from tests.helpers.sizes import Sizes
from ttfunc import patch
from ttfunc.module.trl import can_fuse, longer_states, longer_weight
from ttfunc.weight.deferred import PatchedWeight

V, D, T = 40, 6, 11
IDS = [3, 39, 17]


def made(grown: bool = False) -> tuple[PatchedWeight, Tensor]:
    torch.manual_seed(1)
    model = nn.Embedding(V, D).requires_grad_(False)
    ids = [5, V, V + 1] if grown else IDS
    params = random_rows(model, ids, requires_grad=True, grow=grown)
    made.kept = model  # the parameters do not keep it
    (rows,) = params.deltas.values()
    return patch(params)["weight"], rows


def full(weight: PatchedWeight) -> Tensor:
    """The matrix with the rows in it, which gets a gradient of its own."""
    return weight.source.rows.materialise(weight.source.base).detach().requires_grad_()


def loss_of(hidden: Tensor, weight: Tensor, chunk: int, softcap: float | None) -> Tensor:
    labels = torch.arange(len(hidden)) % len(weight)
    options = (1.3, chunk, softcap, 0.7, ("log_probs", "entropy"))
    log_probs, entropy, *_ = ChunkedLogProbFunction.apply(hidden, weight, None, labels, *options)
    return (log_probs * torch.linspace(0, 1, len(hidden))).sum() + entropy.sum()


@pytest.mark.parametrize("grown", [False, True], ids=["replaced", "new"])
@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("chunk", [7, 100])
def test_the_gradients_are_those_of_the_whole_matrix(chunk, softcap, grown):
    weight, rows = made(grown)
    whole = full(weight)
    hidden = torch.randn(T, D, requires_grad=True)
    expected = loss_of(hidden, whole, chunk, softcap)
    of_hidden, of_whole = torch.autograd.grad(expected, (hidden, whole))
    longer = longer_weight(weight)
    assert longer.shape == (len(whole), D + 3)
    assert not longer.requires_grad
    found = loss_of(longer_states(hidden, weight), longer, chunk, softcap)
    torch.testing.assert_close(found, expected)
    gradients = torch.autograd.grad(found, (hidden, rows))
    ids = list(weight.source.rows.ids.ids)
    torch.testing.assert_close(gradients, (of_hidden, of_whole[ids]), rtol=1e-4, atol=1e-5)
    assert gradients[1].abs().max() > 1e-3


def test_rows_that_are_written_to_before_the_backward_change_no_gradient():
    weight, rows = made()
    hidden = torch.randn(T, D, requires_grad=True)

    def loss() -> Tensor:
        return loss_of(longer_states(hidden, weight), longer_weight(weight), 7, None)

    truth = torch.autograd.grad(loss(), (hidden, rows))
    late = loss()
    with torch.no_grad():
        rows.add_(1)
    torch.testing.assert_close(torch.autograd.grad(late, (hidden, rows)), truth)
    assert not torch.equal(torch.autograd.grad(loss(), hidden)[0], truth[0])


def test_nothing_as_large_as_the_matrix_is_made():
    weight, _ = made()
    hidden = torch.randn(2, D, requires_grad=True)
    with Sizes() as sizes:
        loss_of(longer_states(hidden, weight), longer_weight(weight), 8, None).backward()
    assert max(sizes.found) < V * D
    with Sizes() as sizes:  # and this sees it where it is
        loss_of(hidden, weight, 8, None).backward()
    assert max(sizes.found) >= V * D


@pytest.mark.parametrize(
    "read",
    [
        lambda w, h: h @ w.T,
        lambda w, h: F.linear(h, w),
        lambda w, h: F.linear(h, w[:9]),
        lambda w, h: F.linear(h, w[::2]),
        lambda w, h: F.linear(h, w.to(torch.float64).float()),
        lambda w, h: torch.cat([h @ part.T for part in w.split(7)], dim=1),
    ],
)
def test_any_other_read_is_right_too(read):
    weight, rows = made()
    whole, hidden = full(weight), torch.randn(T, D, requires_grad=True)
    expected = read(whole, hidden)
    found = read(longer_weight(weight), longer_states(hidden, weight))
    torch.testing.assert_close(found, expected)
    factor = torch.randn_like(expected)
    _, of_whole = torch.autograd.grad((expected * factor).sum(), (hidden, whole))
    (of_rows,) = torch.autograd.grad((found * factor).sum(), rows)
    torch.testing.assert_close(of_rows, of_whole[IDS], rtol=1e-4, atol=1e-5)


def test_in_half_precision():
    weight, rows = made()
    source = weight.source
    half = weight.to(torch.bfloat16)
    hidden = torch.randn(T, D).bfloat16()
    found = F.linear(longer_states(hidden, half), longer_weight(half))
    assert found.dtype == torch.bfloat16
    (of_rows,) = torch.autograd.grad(found.float().sum(), rows)
    assert of_rows.dtype == source.rows.values.dtype
    torch.testing.assert_close(of_rows, hidden.float().sum(0).expand(3, D), rtol=0.02, atol=0.02)


def test_in_double_precision():
    torch.manual_seed(1)
    model = nn.Embedding(V, D).double().requires_grad_(False)
    params = random_rows(model, IDS, requires_grad=True)
    (rows,), weight = params.deltas.values(), patch(params)["weight"]
    hidden = torch.randn(T, D, dtype=torch.float64)
    found = F.linear(longer_states(hidden, weight), longer_weight(weight))
    (of_rows,) = torch.autograd.grad(found.sum(), rows)
    torch.testing.assert_close(of_rows, hidden.sum(0).expand(3, D), rtol=0, atol=1e-14)


def test_code_that_does_not_ask_gets_the_numbers_too():
    weight, _ = made()
    longer = longer_weight(weight)
    assert torch.equal(Tensor.as_subclass(longer, Tensor).mul(1), longer[:])


def test_where_no_gradient_is_wanted_it_is_not_needed():
    weight, _ = made()
    assert can_fuse(weight)
    with torch.no_grad():
        assert not can_fuse(weight)
    assert not can_fuse(torch.ones(2, 2))
