"""The patched weight as a tensor: whatever is done with it, it gives what the copy would give."""

from __future__ import annotations

import copy

import optree
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.helpers.models import D, Fused, V, loss_of, make, tokens
from ttfunc import functional_call, init_deltas, patch
from ttfunc.indices import TokenIndices
from ttfunc.weight.deferred import PatchedWeight, patched
from ttfunc.weight.reads import Replaced

IDS = [7, 3, 20]
HIDDEN, MATRIX, VECTOR = torch.randn(2, 4, D), torch.randn(D, 6), torch.randn(D)
TOKENS = torch.tensor([[3, 7, 0], [20, 20, 1]])
ROWS = torch.randn(len(IDS), D)


def weights(dtype: torch.dtype = torch.float32) -> tuple[PatchedWeight, Tensor, Tensor]:
    """A deferred weight, the copy that it stands for, and their rows."""
    generator = torch.Generator().manual_seed(0)
    base = torch.randn(V, D, generator=generator).to(dtype)
    rows = torch.randn(len(IDS), D, generator=generator).to(dtype).requires_grad_()
    weight = patched(base, Replaced(rows, TokenIndices(tuple(IDS))), None, dense=False)
    return weight, base.index_copy(0, torch.tensor(IDS), rows), rows


def check(read, how: set[str]) -> None:
    """`read` gives the same on both, values and gradients, and uses the deferred one as told."""
    weight, full, rows = weights()
    found, expected = read(weight), read(full)
    assert type(found) is Tensor
    torch.testing.assert_close(found, expected)
    assert weight.source.uses == how
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
        lambda w: w[:9],
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
        (lambda w: torch.addmm(torch.ones(V), HIDDEN, w.t()), "mat1 must be a matrix"),
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


def test_a_maximal_norm_rescales_the_copy_and_not_the_base():
    weight, full, _ = weights()
    base = weight.source.base.clone()
    found = F.embedding(TOKENS, weight, max_norm=1.0)
    torch.testing.assert_close(found, F.embedding(TOKENS, full, max_norm=1.0))
    assert torch.equal(weight.source.base, base)


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


@pytest.mark.parametrize(
    "about",
    [
        lambda w: w.shape,
        lambda w: w.size(),
        lambda w: w.size(-1),
        lambda w: (w.dtype, w.device, w.layout, w.itemsize, w.nbytes, w.get_device()),
        lambda w: (w.ndim, w.dim(), w.numel(), len(w), torch.numel(w), w.element_size()),
        lambda w: (w.is_cuda, w.is_cpu, w.is_meta, w.is_sparse, w.is_quantized),
        lambda w: (w.is_floating_point(), torch.is_complex(w), w.is_signed()),
        lambda w: (w.is_contiguous(), w.storage_offset()),
        lambda w: (w.T.shape, w.mT.is_contiguous(), len(w.t())),
        lambda w: (w.requires_grad, w.is_leaf, w.grad_fn is None),
        lambda w: isinstance(w, Tensor),
        lambda w: (MATRIX.double().to(w).dtype, MATRIX.double().type_as(w.T).dtype),
    ],
)
def test_questions_about_it_are_answered_without_work(about):
    weight, full, _ = weights()
    assert about(weight) == about(full)
    assert weight.source.uses == set()


@pytest.mark.parametrize(
    "write",
    [
        lambda w: w.mul_(2),
        lambda w: w.zero_(),
        lambda w: w.__setitem__(0, 1.0),
        lambda w: w.__iadd__(1),
        lambda w: w.T.copy_(torch.zeros(D, V)),
        lambda w: torch.add(torch.ones(V, D), 1, out=w),
        lambda w: torch.nn.init.normal_(w),
        lambda w: setattr(w, "data", torch.zeros(V, D)),
        lambda w: w.data_ptr(),
        lambda w: w.register_hook(print),
        lambda w: w.retain_grad(),
        lambda w: w.requires_grad_(False),
        lambda w: F.relu(w, inplace=True),
        lambda w: torch._foreach_add_([torch.ones(2), w], 1),
        lambda w: torch.ops.aten.add_.Tensor(w, 1),
        lambda w: torch.ops.aten.add.out(torch.ones(V, D), 1, out=w),
    ],
)
def test_writing_to_it_is_refused(write):
    weight, _, _ = weights()
    base = weight.source.base.clone()
    with torch.no_grad(), pytest.raises(RuntimeError, match="on a patched weight.*would be lost"):
        write(weight)
    assert torch.equal(weight.source.base, base)


class OldStyle(torch.autograd.Function):
    """The loss and its gradients made in the forward pass, as fused linear cross-entropy does."""

    @staticmethod
    def forward(ctx, hidden: Tensor, weight: Tensor) -> Tensor:
        logits = hidden @ weight.t()
        ctx.save_for_backward(
            2 * logits @ weight, 2 * logits.flatten(0, 1).T @ hidden.flatten(0, 1)
        )
        return logits.pow(2).sum()

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, Tensor]:
        to_hidden, to_weight = ctx.saved_tensors
        return grad * to_hidden, grad * to_weight


@pytest.mark.parametrize("head", [OldStyle, Fused])
def test_a_fused_head_of_the_models_own_gets_the_right_gradients(head):
    weight, full, rows = weights()
    found, expected = (
        torch.autograd.grad(head.apply(torch.tanh(F.embedding(TOKENS, w)), w).pow(2).sum(), rows)
        for w in (weight, full)
    )
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-3)


def test_a_dense_weight_is_the_copy_itself():
    weight, full, rows = weights()
    dense = patched(weight.source.base, weight.source.rows, None, dense=True)
    assert dense.shape == full.shape
    assert dense.requires_grad
    assert dense.source.uses == set()
    assert torch.equal(dense.as_subclass(Tensor), full)
    assert torch.equal(F.linear(HIDDEN, dense), F.linear(HIDDEN, full))
    assert torch.equal(HIDDEN @ dense.T, HIDDEN @ full.T)
    assert dense.source.uses == {"dense"}
    found = torch.autograd.grad(F.embedding(TOKENS, dense).pow(2).sum(), rows)
    assert torch.equal(found[0], torch.autograd.grad(full[TOKENS].pow(2).sum(), rows)[0])
    with torch.no_grad():
        dense.mul_(2)
    assert torch.equal(dense + 0, 2 * full)


def test_it_prints_as_the_matrix_it_is():
    weight, full, _ = weights()
    assert repr(weight) == repr(full)


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


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # torch.compile looks at it
@pytest.mark.parametrize("case", ["transpose", "einsum", "function", "reading"])
def test_a_compiled_model_takes_a_patch_made_outside(case: str):
    torch._dynamo.reset()
    model, plain = make(case).requires_grad_(False), make(case).requires_grad_(False)
    model.compile(backend="aot_eager")
    x = tokens(*IDS)
    for scale in (1.0, -1.0):  # the graph of one patch must not serve another's rows
        found, expected = (
            torch.autograd.grad(
                loss_of(functional_call(one, patch(params), (x,))), optree.tree_leaves(params)
            )
            for one in (model, plain)
            for params in [init_deltas(one, IDS, init=scale * ROWS, requires_grad=True)]
        )
        torch.testing.assert_close(found, expected)
