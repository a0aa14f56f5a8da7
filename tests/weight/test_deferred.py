"""The patched weight as a tensor: whatever is done with it, it gives what the copy would give."""

from __future__ import annotations

import optree
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.helpers.models import D, Fused, V, loss_of, make, tokens
from tests.helpers.weights import HIDDEN, IDS, MATRIX, TOKENS, weights
from ttfunc import functional_call, init_deltas, patch
from ttfunc.weight.deferred import patched

ROWS = torch.randn(len(IDS), D)


def test_a_maximal_norm_rescales_the_copy_and_not_the_base():
    weight, full, _ = weights()
    base = weight.source.base.clone()
    found = F.embedding(TOKENS, weight, max_norm=1.0)
    torch.testing.assert_close(found, F.embedding(TOKENS, full, max_norm=1.0))
    assert torch.equal(weight.source.base, base)


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
    assert weight.source.uses() == set()


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
    assert dense.source.uses() == set()
    assert torch.equal(dense.as_subclass(Tensor), full)
    assert torch.equal(F.linear(HIDDEN, dense), F.linear(HIDDEN, full))
    assert torch.equal(HIDDEN @ dense.T, HIDDEN @ full.T)
    assert dense.source.uses() == {"dense"}
    found = torch.autograd.grad(F.embedding(TOKENS, dense).pow(2).sum(), rows)
    assert torch.equal(found[0], torch.autograd.grad(full[TOKENS].pow(2).sum(), rows)[0])
    with torch.no_grad():
        dense.mul_(2)
    assert torch.equal(dense + 0, 2 * full)


def test_it_prints_as_the_matrix_it_is():
    weight, full, _ = weights()
    assert repr(weight) == repr(full)


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
