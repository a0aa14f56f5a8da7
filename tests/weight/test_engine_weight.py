"""A weight that reads what its module has at the time."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from tests.helpers.mesh import mesh_of_one
from tests.helpers.rows import random_rows
from ttfunc import init_deltas, patch, patch_mixed
from ttfunc.engines.ownership import EngineParameters
from ttfunc.weight.deferred import PatchedWeight
from ttfunc.weight.engine_weight import Place, owned
from ttfunc.weight.placeholder import Reads

V, D, IDS = 11, 4, [7, 2]


@pytest.fixture
def mesh():
    with mesh_of_one() as mesh:
        yield mesh


def made(**options) -> tuple[nn.Module, PatchedWeight, Tensor, Reads, Place]:
    torch.manual_seed(0)
    model = nn.Linear(D, V, bias=False).requires_grad_(False)
    params = random_rows(model, IDS, targets="", requires_grad=True, **options)
    weight, reads, place = (
        patch(params)["weight"],
        Reads(),
        Place(model, "weight", EngineParameters()),
    )
    return model, owned(weight, place, reads), params.deltas["weight"], reads, place


def test_it_reads_what_the_module_has_by_then():
    model, weight, rows, reads, _ = made()
    hidden = torch.randn(3, D)
    for _ in range(2):
        model.weight = nn.Parameter(torch.randn(V, D), requires_grad=False)
        expected = F.linear(hidden, model.weight).index_copy(1, torch.tensor(IDS), hidden @ rows.T)
        torch.testing.assert_close(F.linear(hidden, weight), expected)
        assert torch.equal(F.embedding(torch.tensor([7, 1]), weight)[1], model.weight[1])
    assert reads.product
    assert reads.lookup
    assert not reads.dense


def test_its_questions_are_answered_without_a_read():
    model, weight, _, reads, _ = made()
    model.half()
    assert (weight.shape, weight.dtype, len(weight)) == ((V, D), torch.float16, V)
    assert weight.requires_grad
    assert not vars(reads)["dense"]


def test_what_an_engine_puts_into_the_copy_comes_first():
    model, weight, _, _, place = made()
    copy = nn.Linear(D, V, bias=False)
    copy._parameters["weight"] = place.placed
    place.copy = copy
    assert place.held() is model.weight
    copy._parameters["weight"] = torch.ones(V, D)
    assert weight.now().source.base.sum() == V * D


def test_what_is_not_gathered_is_refused():
    model, weight, *_ = made()
    model.weight = nn.Parameter(torch.empty(0))
    with pytest.raises(RuntimeError, match=r"weight of Linear is not gathered here"):
        F.linear(torch.randn(3, D), weight)


def test_any_other_use_gets_the_matrix_of_that_time():
    model, weight, rows, reads, _ = made()
    model.weight.data.zero_()
    expected = torch.zeros(V, D).index_copy(0, torch.tensor(IDS), rows.detach())
    assert torch.equal((weight * 1).detach(), expected)
    (gradient,) = torch.autograd.grad((weight * 2).sum(), rows)
    assert torch.equal(gradient, torch.full((2, D), 2.0))
    assert reads.dense


def test_someone_s_own_function_gets_it_and_gives_the_gradient():
    class Head(torch.autograd.Function):
        @staticmethod
        def forward(ctx, hidden: Tensor, weight: Tensor) -> Tensor:
            ctx.save_for_backward(hidden, weight)
            return hidden @ weight.t()

        @staticmethod
        def backward(ctx, gradient: Tensor) -> tuple[Tensor, Tensor]:
            hidden, weight = ctx.saved_tensors
            return gradient @ weight, gradient.t() @ hidden

    model, weight, rows, _, _ = made()
    hidden = torch.randn(3, D, requires_grad=True)
    plain = model.weight.index_copy(0, torch.tensor(IDS), rows)
    truth = torch.autograd.grad((hidden @ plain.T).square().sum(), (hidden, rows))
    found = torch.autograd.grad(Head.apply(hidden, weight).square().sum(), (hidden, rows))
    torch.testing.assert_close(found, truth)


def test_a_split_matrix_takes_no_new_tokens_and_no_mixed_batch(mesh):
    torch.manual_seed(0)
    model = nn.Linear(D, V, bias=False).requires_grad_(False)
    grown = init_deltas(model, [V], targets="", grow=True)
    weights = [
        (patch(grown)["weight"], r"1 new tokens .*Resize the model before"),
        (patch_mixed([random_rows(model, IDS, targets="")], [0])["weight"], "a mixed patch on"),
    ]
    model.weight = nn.Parameter(distribute_tensor(model.weight.data, mesh, [Shard(0)]))
    for weight, words in weights:
        with pytest.raises(RuntimeError, match=words):
            owned(weight, Place(model, "weight", EngineParameters()), Reads()).now()


def test_a_part_of_a_matrix_is_multiplied_and_not_looked_up_in(mesh):
    torch.manual_seed(0)
    hidden, here = torch.randn(3, D), 6  # so many rows are on this rank: of the tokens, 2
    for kind in (nn.Linear(D, V, bias=False), nn.Embedding(V, D)):
        kind.requires_grad_(False)
        weights = patch(random_rows(kind, IDS, targets=""))
        expected = F.linear(hidden, weights["weight"])[:, :here]
        local = kind.weight.detach()[:here].clone()
        part = DTensor.from_local(
            local, mesh, [Shard(0)], run_check=False, shape=torch.Size((V, D)), stride=(D, 1)
        )
        kind.weight = nn.Parameter(part, requires_grad=False)
        place = Place(kind, "weight", EngineParameters())
        weight = owned(weights["weight"], place, Reads())
        place.copy = type(kind)(V, D)
        place.copy._parameters["weight"] = local  # as a tool's forward puts it there
        if isinstance(kind, nn.Linear):
            torch.testing.assert_close(F.linear(hidden, weight), expected)
        else:
            with pytest.raises(RuntimeError, match=r"weight of Embedding is not gathered here"):
                F.embedding(torch.tensor([2]), weight)
