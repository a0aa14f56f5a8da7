"""Each function of torch that reads a deferred weight, with or without a copy of the matrix."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.helpers.models import D, V
from tests.helpers.weights import HIDDEN, MATRIX, TOKENS, VECTOR, weights
from ttfunc.weight.deferred import patched


def check(read, how: set[str]) -> None:
    """`read` gives the same on both, values and gradients, and uses the deferred one as told."""
    weight, full, rows = weights()
    found, expected = read(weight), read(full)
    assert type(found) is Tensor
    torch.testing.assert_close(found, expected)
    assert weight.source.uses() == how
    if expected.requires_grad:
        factor = torch.randn_like(expected)
        torch.testing.assert_close(
            torch.autograd.grad((found * factor).sum(), rows),
            torch.autograd.grad((expected * factor).sum(), rows),
            rtol=1e-4,
            atol=1e-5,
        )


@pytest.mark.parametrize(
    "read",
    [
        lambda w: F.embedding(TOKENS, w),
        lambda w: F.embedding(TOKENS, w, padding_idx=3),
        lambda w: F.embedding(input=TOKENS, weight=w, padding_idx=-3),
        lambda w: w[TOKENS],
        lambda w: w[TOKENS - V],
        lambda w: w[TOKENS.int()],
        lambda w: w[2:20],
        lambda w: w[-5:],
        lambda w: w[5:5],
        lambda w: torch.cat([w[:9], w[9:]]),
        lambda w: F.embedding(TOKENS, w.to(torch.float64)),
    ],
)
def test_lookups_need_no_copy(read):
    check(read, {"lookup"})


@pytest.mark.parametrize(
    "read",
    [
        lambda w: F.linear(HIDDEN, w),
        lambda w: F.linear(HIDDEN, w, torch.ones(V)),
        lambda w: F.linear(VECTOR, weight=w, bias=None),
        lambda w: HIDDEN @ w.T,
        lambda w: HIDDEN @ w.t(),
        lambda w: HIDDEN @ w.mT,
        lambda w: HIDDEN @ w.T.T.T,
        lambda w: HIDDEN.matmul(w.transpose(0, 1)),
        lambda w: torch.matmul(HIDDEN, w.transpose(-1, -2)),
        lambda w: torch.matmul(HIDDEN, torch.transpose(w, 1, -2)),
        lambda w: torch.matmul(VECTOR, torch.t(w)),
        lambda w: torch.mm(HIDDEN[0], w.permute(1, 0)),
        lambda w: HIDDEN[0].mm(w.permute((-1, -2))),
        lambda w: torch.addmm(torch.ones(V), HIDDEN[0], w.t()),
        lambda w: w @ MATRIX,
        lambda w: w @ VECTOR,
        lambda w: torch.matmul(w, HIDDEN.mT),
        lambda w: torch.einsum("bld,vd->blv", HIDDEN, w),
        lambda w: torch.einsum("vd, bld -> bvl", w, HIDDEN),
        lambda w: torch.einsum("...d,vd->...v", HIDDEN, w),
        lambda w: torch.einsum("bld,dv->lvb", HIDDEN, w.T),
        lambda w: torch.einsum("d,vd->v", VECTOR, w),
        lambda w: F.linear(HIDDEN.double(), w.double()),
        lambda w: F.linear(HIDDEN, w.detach()),
        lambda w: HIDDEN.double() @ w.T.to(dtype=torch.float64),
        lambda w: F.linear(HIDDEN, w.to("cpu").type_as(w)),
    ],
)
def test_products_need_no_copy(read):
    check(read, {"product"})


@pytest.mark.filterwarnings("ignore:This overload of addmm is deprecated")
@pytest.mark.parametrize(
    "read",
    [
        lambda w: w + 0,
        lambda w: w[3],
        lambda w: w[:9, :2],
        lambda w: w[2:20:3],
        lambda w: w[torch.arange(V) > 9],
        lambda w: w[TOKENS[0], TOKENS[1, 0] - 20],
        lambda w: torch.cat([w, w.T.T]),
        lambda w: w.norm(dim=1),
        lambda w: w.T @ torch.ones(V),
        lambda w: w @ w.T,
        lambda w: F.linear(w, MATRIX.T),
        lambda w: F.linear(w, w),
        lambda w: torch.einsum("bld,vd->bl", HIDDEN, w),
        lambda w: torch.einsum("bld,vd", HIDDEN, w),
        lambda w: torch.einsum("bld,vd->bv", HIDDEN, w),
        lambda w: torch.einsum("vd,vd->v", w, w),
        lambda w: torch.addmm(torch.ones(V), HIDDEN[0], w.t(), beta=2),
        lambda w: torch.addmm(2, torch.ones(V), HIDDEN[0], w.t()),
        lambda w: torch.addmm(2, torch.ones(V), 3, HIDDEN[0], w.t()),
        lambda w: torch.ones(V).addmm(2, HIDDEN[0], w.t()),
        lambda w: torch.ones(V).addmm(HIDDEN[0], w.t()),
        lambda w: torch.baddbmm(torch.ones(V), HIDDEN, w.T.expand(2, D, V)),
        lambda w: torch.tensordot(HIDDEN, w, dims=([2], [1])),
        lambda w: F.linear(HIDDEN[0], w, torch.ones(4, V)),
        lambda w: F.linear(HIDDEN[0], w, torch.ones(1)),
        lambda w: torch.addmm(torch.ones(4, V), HIDDEN[0], w.t()),
        lambda w: F.linear(torch.eye(D).to_sparse(), w),
        lambda w: w.to(torch.int64),
        lambda w: F.embedding(TOKENS, w, scale_grad_by_freq=True),
        lambda w: F.embedding_bag(TOKENS, w),
        lambda w: w.permute(0, 1) * 2,
        lambda w: w.transpose(0, -2) * 2,
        lambda w: w.T.contiguous(),
        lambda w: w.view(-1),
        lambda w: w.clone(),
        lambda w: w.data * 1,
        lambda w: torch.stack([w, w])[1],
        lambda w: copy.deepcopy(w.detach()) * 1,
        lambda w: torch.ops.aten.mul(w, 2),
        lambda w: torch.tensor(w.tolist()),
    ],
)
def test_everything_else_gets_the_copy(read):
    check(read, {"dense"})


@pytest.mark.parametrize(
    "multiply",
    [
        lambda w, out: torch.addmm(torch.ones(V), HIDDEN[0], w.t(), out=out),
        lambda w, out: torch.addmm(input=torch.ones(V), mat1=HIDDEN[0], mat2=w.t(), out=out),
        lambda w, out: torch.mm(HIDDEN[0], w.t(), out=out),
        lambda w, out: torch.matmul(HIDDEN[0], w.t(), out=out),
    ],
)
def test_a_product_is_written_where_it_is_asked_for(multiply):
    weight, full, _ = weights()
    found, expected = torch.empty(2, 4, V)
    with torch.no_grad():
        assert multiply(weight, found) is found
        torch.testing.assert_close(found, multiply(full, expected))


@pytest.mark.parametrize(
    ("multiply", "match"),
    [
        (lambda w: torch.mm(HIDDEN, w.t()), "self must be a matrix"),
        (lambda w: torch.mm(w, VECTOR), "mat2 must be a matrix"),
        (lambda w: torch.addmm(torch.ones(V), HIDDEN, w.t()), "must be a matrix"),
    ],
)
def test_what_torch_does_not_multiply_is_refused_as_torch_does(multiply, match: str):
    weight, full, _ = weights()
    for one in (full, weight):
        with pytest.raises(RuntimeError, match=match):
            multiply(one)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("autocast", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("dense", [False, True])
@pytest.mark.parametrize(
    "read",
    [lambda w: w + 0, lambda w: F.linear(HIDDEN, w), lambda w: torch.vmap(torch.tanh)(w)],
)
def test_a_matrix_in_one_half_precision_is_copied_under_autocast_to_the_other(
    read, dense: bool, autocast: torch.dtype, dtype: torch.dtype
):
    weight, full, _ = weights(dtype)
    with torch.autocast("cpu", autocast):
        made = patched(weight.source.base, weight.source.rows, None, dense=dense)
        found, expected = read(made), read(full)
    assert found.dtype == expected.dtype
    torch.testing.assert_close(found, expected, rtol=0.05, atol=0.05)


@pytest.mark.parametrize("dense", [False, True])
@pytest.mark.parametrize(
    "read",
    [
        lambda w, sparse: F.embedding(TOKENS, w, 3, sparse=sparse),
        lambda w, sparse: F.embedding(TOKENS, w, max_norm=1.0, sparse=sparse),
        lambda w, sparse: F.embedding_bag(TOKENS, w, mode="sum", sparse=sparse),
        lambda w, sparse: F.embedding_bag(TOKENS, w, None, None, 2, False, "sum", sparse),
    ],
)
def test_the_gradient_of_the_rows_is_dense_where_a_matrix_would_get_a_sparse_one(read, dense: bool):
    weight, full, rows = weights()
    weight = patched(weight.source.base, weight.source.rows, None, dense=dense)
    found, expected = (
        torch.autograd.grad(read(w, sparse).cos().sum(), rows, retain_graph=True)
        for w, sparse in ((weight, True), (full * 1, False))
    )
    torch.testing.assert_close(found, expected)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_nested_hidden_states_get_the_copy():
    weight, full, _ = weights()
    hidden = torch.nested.nested_tensor([HIDDEN[0], HIDDEN[1, :2]])
    found, expected = F.linear(hidden, weight), F.linear(hidden, full)
    for one, other in zip(found.unbind(), expected.unbind(), strict=True):
        torch.testing.assert_close(one, other)


def test_addmm_under_autocast_keeps_its_dtype():
    weight, full, _ = weights()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = torch.addmm(torch.ones(V), HIDDEN[0], weight.t())
        expected = torch.addmm(torch.ones(V), HIDDEN[0], full.t())
    assert found.dtype == expected.dtype == torch.bfloat16
    torch.testing.assert_close(found, expected)
