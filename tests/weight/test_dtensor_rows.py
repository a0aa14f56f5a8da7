"""The reads of a DTensor with replaced rows, against those of the whole matrix."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from tests.helpers.mesh import mesh_of_one
from ttfunc.rows.token_ids import TokenIndices
from ttfunc.weight.dtensor_rows import like
from ttfunc.weight.placeholder import Reads, matrix_placeholder
from ttfunc.weight.rows import Rows

V, D, IDS = 11, 4, TokenIndices((7, 2, 10))
PLACED = {"tokens": Shard(0), "features": Shard(1), "none": Replicate()}


@pytest.fixture
def mesh():
    with mesh_of_one() as mesh:
        yield mesh


def made() -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    return torch.randn(V, D), torch.randn(3, D, requires_grad=True), torch.randn(2, 5, D)


def test_the_lookup(mesh):
    base, rows, _ = made()
    tokens = torch.tensor([[7, 1, 2, 2], [0, 10, 7, 3]])
    expected = Rows(rows, IDS).lookup(tokens, base, 7)
    (truth,) = torch.autograd.grad(expected.square().sum(), rows)
    for placed, split in itertools.product(PLACED.values(), (Replicate(), Shard(0))):
        whole = distribute_tensor(base, mesh, [placed])
        given = DTensor.from_local(tokens, mesh, [split])
        found = Rows(rows, IDS).lookup(given, whole, 7)
        assert found.placements == (split,)
        assert torch.equal(found.to_local(), expected)
        (gradient,) = torch.autograd.grad(found.to_local().square().sum(), rows)
        torch.testing.assert_close(gradient, truth)


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("placed", PLACED)
def test_the_product(placed: str, biased: bool, mesh):
    base, rows, hidden = made()
    bias = torch.randn(V) if biased else None
    hidden.requires_grad_()
    expected = Rows(rows, IDS).product(hidden, base, bias)
    truth = torch.autograd.grad(expected.square().sum(), (rows, hidden))
    whole = distribute_tensor(base, mesh, [PLACED[placed]])
    for split in (Replicate(), Shard(0), Shard(2)):
        given = DTensor.from_local(hidden, mesh, [split])
        found = Rows(rows, IDS).product(given, whole, bias)
        assert found.shape == expected.shape
        torch.testing.assert_close(found.full_tensor(), expected)
        gradients = torch.autograd.grad(found.full_tensor().square().sum(), (rows, hidden))
        torch.testing.assert_close(gradients, truth)


@pytest.mark.parametrize("placed", PLACED)
def test_the_matrix_itself_stays_where_it_is(placed: str, mesh):
    base, rows, _ = made()
    whole = distribute_tensor(base, mesh, [PLACED[placed]])
    found = Rows(rows, IDS).materialise(whole)
    assert found.placements == whole.placements
    assert torch.equal(found.full_tensor(), Rows(rows, IDS).materialise(base))
    assert torch.equal(like(whole, whole.to_local()).full_tensor(), base)


def test_plain_states_are_refused_as_torch_refuses_them(mesh):
    base, rows, hidden = made()
    whole = distribute_tensor(base, mesh, [Shard(0)])
    with pytest.raises(RuntimeError, match="mixed torch.Tensor and DTensor"):
        Rows(rows, IDS).product(hidden, whole)


def test_what_some_ranks_do_not_have_is_refused(mesh):
    base, rows, _ = made()
    whole = distribute_tensor(base, mesh, [Shard(0)])
    with pytest.raises(RuntimeError, match=r"rows 2 to 5 .*Leave the matrix out"):
        Rows(rows, IDS).piece(whole, 2, 5)
    assert matrix_placeholder(Rows(rows, IDS), whole, Reads()).isnan().all()


def test_rows_are_mapped_one_by_one():
    _, rows, _ = made()
    doubled = Rows(rows, IDS).map(lambda values: values * 2)
    assert torch.equal(doubled.values, rows * 2)
    assert doubled.ids is IDS
