"""What deferred logits do undone, and that anything else gives what it gives to the logits."""

from __future__ import annotations

from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.helpers.llama import llama
from tests.helpers.logits import LABELS, X, both, loss_of, unlearnt
from tests.helpers.models import D, V
from tests.helpers.rows import random_rows
from tests.helpers.sizes import Sizes
from ttfunc import patch
from ttfunc.weight.logits import DeferredLogits, PendingProduct

LOSSES = {
    "flat": lambda y: F.cross_entropy(y.view(-1, V), LABELS.view(-1)),
    "float": lambda y: F.cross_entropy(y.float().flatten(0, 1), LABELS.flatten()),
    "double": lambda y: F.cross_entropy(y.double().flatten(0, 1), LABELS.flatten()),
    "shifted": lambda y: F.cross_entropy(
        y[..., :-1, :].contiguous().reshape(-1, V), LABELS[..., 1:].reshape(-1)
    ),
    "sum": lambda y: F.cross_entropy(y.reshape(-1, V), LABELS.reshape(-1), reduction="sum"),
    "none": lambda y: F.cross_entropy(y.flatten(0, 1), LABELS.flatten(), reduction="none"),
    "ignoring": lambda y: F.cross_entropy(y.flatten(0, 1), X.flatten(), ignore_index=3),
    "smoothed": lambda y: F.cross_entropy(y.view(-1, V), LABELS.view(-1), label_smoothing=0.1),
    "weighted": lambda y: F.cross_entropy(
        y.view(-1, V), LABELS.view(-1), torch.linspace(0.1, 1, V)
    ),
    "scaled": lambda y: F.cross_entropy((y * 0.5 / 3).view(-1, V), LABELS.view(-1)),
    "capped": lambda y: F.cross_entropy(
        (2.0 * torch.tanh(y / 2.0)).squeeze(0).view(-1, V), LABELS.view(-1)
    ),
    "one position": lambda y: F.cross_entropy(y[0, 2], LABELS[0, 2]),
    "chosen": lambda y: F.cross_entropy(y[LABELS >= 0], LABELS[LABELS >= 0]),
    "at": lambda y: F.cross_entropy(y[:, torch.tensor([1, 3])][1], X[1, [1, 3]]),
    "module": lambda y: nn.CrossEntropyLoss(reduction="sum")(y[0], X[0]),
}


@pytest.mark.parametrize("loss", LOSSES)
def test_a_loss_needs_no_logits(loss: str):
    waited = []

    def then(logits: Tensor) -> Tensor:
        if not isinstance(logits, DeferredLogits):
            return LOSSES[loss](logits)
        waited.append(logits)
        with mock.patch.object(PendingProduct, "made", side_effect=AssertionError("made")):
            return LOSSES[loss](logits)

    (plain, gradient), (ours, found) = both(then)
    assert waited
    torch.testing.assert_close(ours, plain)
    assert ours.dtype == plain.dtype
    torch.testing.assert_close(found, gradient)


READS = {
    "class first": lambda y: F.cross_entropy(y.transpose(1, 2), LABELS),
    "probabilities": lambda y: F.cross_entropy(y.view(-1, V), torch.full((12, V), 1 / V)),
    "weighted and smoothed": lambda y: F.cross_entropy(
        y.view(-1, V), LABELS.view(-1), torch.linspace(0.1, 1, V), label_smoothing=0.1
    ),
    "old arguments": lambda y: y.view(-1, V).log_softmax(-1).mean(),
    "log_softmax": lambda y: y.log_softmax(-1)[..., :3],
    "columns": lambda y: y[..., 3:7],
    "a column": lambda y: y[0, :, 4],
    "a new last dimension": lambda y: y[..., None],
    "the last of each": lambda y: y[:, -1],
    "views": lambda y: y.view(1, 12, V)[0].unsqueeze(0).squeeze(0)[::2],
    "a view of pieces": lambda y: y.view(-1),
    "plus": lambda y: y + 1,
    "with itself": lambda y: y * y,
    "with a tensor": lambda y: y * torch.tensor(2.0),
    "clone": lambda y: y.clone(),
    "cat": lambda y: torch.cat([y, y[:, :1]], dim=1),
    "matmul": lambda y: y @ torch.ones(V, 2),
    "in place": lambda y: y.mul_(2),
    "a column written": lambda y: (y.__setitem__((..., 4), 0.0), y)[1],
    "divided in place": lambda y: (y.div_(2), y.view(-1, V))[1],
    "twice": lambda y: F.cross_entropy(y.view(-1, V), X.view(-1)) * y.logsumexp(-1).mean(),
    "integers": lambda y: y.argmax(-1).float() + y[..., 0],
    "to bool": lambda y: y * (y > 0),
    "reversed": lambda y: 1.0 / (y * y + 1),
    # Writes reach all views of one memory, and no copies.
    "a view, then a write": lambda y: (y.view(-1, V), y.zero_(), y)[0] + 1,
    "a write to a column": lambda y: (unlearnt(y[..., 4].fill_, -5.0), loss_of(y))[1],
    "a write to a view's column": lambda y: (y.view(-1, V)[:, 4].fill_(-5.0), loss_of(y))[1],
    "a write to a detached view": lambda y: (y.detach()[..., 4].fill_(-5.0), loss_of(y))[1],
    "a write beside a view": lambda y: (lambda view: (y[..., 4].fill_(-5.0), loss_of(view))[1])(
        y.view(-1, V)
    ),
    "a write to one example": lambda y: (y[0].fill_(-5.0), loss_of(y))[1],
    "a write to a place": lambda y: (y[torch.tensor(0)].mul_(0.5), loss_of(y))[1],
    "a write to turned logits": lambda y: (y.transpose(0, 1).mul_(2.0), loss_of(y))[1],
    "a write to data": lambda y: (y.data.mul_(2), loss_of(y))[1],
    "a write of numpy's": lambda y: (y.detach().numpy().fill(3.0), loss_of(y))[1],
    "a copy, then a write": lambda y: (lambda copy: (y.zero_(), loss_of(copy))[1])(
        y[:, :-1].reshape(-1, V)
    ),
    "chosen, then a write": lambda y: (lambda copy: (y.zero_(), loss_of(copy))[1])(y[X > 3]),
    "a write under no_grad": lambda y: (unlearnt(y.__setitem__, (..., 4), -5.0), loss_of(y))[1],
    "scaled under no_grad": lambda y: loss_of(unlearnt(lambda: y / 2)) + loss_of(y),
    "a target of its own": lambda y: F.mse_loss(
        y[:, 1:].softmax(-1), unlearnt(lambda: y[:, :-1]).softmax(-1)
    ),
    "detached, then trained": lambda y: (y.detach().requires_grad_() * y).sum(),
    "infinite weight": lambda y: F.cross_entropy(
        y.view(-1, V), LABELS.view(-1), torch.tensor([float("inf"), *[0.5] * (V - 1)])
    ),
    "a function that scales": lambda y: loss_of(Reversed.apply(y)),
    "a function that views": lambda y: loss_of(ReversedView.apply(y)),
    "a hook of its node": lambda y: (
        y.grad_fn.register_prehook(lambda g: (g[0] * 3,)),
        loss_of(y),
    )[1],
    "a hook": lambda y: (y.register_hook(lambda g: g * 3) if y.requires_grad else 0, loss_of(y))[1],
}


class Reversed(torch.autograd.Function):
    """A gradient of someone's own, around what deferred logits can do undone."""

    @staticmethod
    def forward(ctx, logits: Tensor) -> Tensor:
        return logits * 2

    @staticmethod
    def backward(ctx, gradient: Tensor) -> Tensor:
        return gradient * -100


class ReversedView(Reversed):
    @staticmethod
    def forward(ctx, logits: Tensor) -> Tensor:
        return logits.view(-1, V)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> Tensor:
        return gradient.view(2, 6, V) * -100


@pytest.mark.parametrize("read", READS)
def test_anything_else_makes_the_logits(read: str):
    (plain, gradient), (ours, found) = both(READS[read])
    torch.testing.assert_close(ours, plain)
    torch.testing.assert_close(found, gradient)


def test_linear_cross_entropy_of_a_bias_that_does_not_fit():
    params = random_rows(llama(), [7, 3])
    weight, hidden = patch(params)["model.embed_tokens.weight"], torch.randn(12, D)
    for length in (V + 1, V - 1):
        with pytest.raises(RuntimeError, match="size|shape|expand"):
            F.linear_cross_entropy(hidden, weight, X.view(-1), linear_bias=torch.ones(length))


def test_linear_cross_entropy():
    model = llama()
    params = random_rows(model, [7, 3], requires_grad=True)
    weight = patch(params)["model.embed_tokens.weight"]
    hidden = torch.randn(12, D, requires_grad=True)
    options = {"label_smoothing": 0.1, "reduction": "sum"}
    with Sizes() as sizes:
        ours = F.linear_cross_entropy(hidden, weight, LABELS.view(-1), **options)
    dense = patch(params, dense=True)["model.embed_tokens.weight"]
    theirs = F.linear_cross_entropy(hidden, dense, LABELS.view(-1), **options)
    torch.testing.assert_close(ours, theirs)
    leaves = [hidden, *params.deltas.values()]
    for one, other in zip(
        torch.autograd.grad(ours, leaves), torch.autograd.grad(theirs, leaves), strict=True
    ):
        torch.testing.assert_close(one, other)
    assert weight.source.uses() == {"product"}
    assert max(sizes.found) < 12 * V
