"""Code that bypasses deferred logits: functions of someone else, and transforms around them."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.func import grad, vjp, vmap

from tests.helpers.llama import llama
from tests.helpers.logits import LABELS, X, both, deferred
from tests.helpers.models import V
from tests.helpers.rows import random_rows
from ttfunc import functional_call, patch, stack


class Doubled(torch.autograd.Function):
    """As a kernel of someone else's, which never asks `__torch_function__` for its gradient."""

    @staticmethod
    def forward(ctx, logits: Tensor) -> Tensor:
        ctx.save_for_backward(logits)
        return logits.exp().sum(-1)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> Tensor:
        (logits,) = ctx.saved_tensors
        return logits.exp() * gradient.unsqueeze(-1)


def test_a_function_of_someone_else():
    (plain, gradient), (ours, found) = both(lambda y: Doubled.apply(y / 2))
    torch.testing.assert_close(ours, plain)
    torch.testing.assert_close(found, gradient)


def test_a_scripted_function():
    @torch.jit.script
    def scripted(y: Tensor) -> Tensor:
        return (y * 2).logsumexp(-1)

    (plain, gradient), (ours, found) = both(scripted)
    torch.testing.assert_close(ours, plain)
    torch.testing.assert_close(found, gradient)


def test_the_transpose_of_the_logits_themselves():
    model = llama(attn_implementation="eager")
    params, seed = random_rows(model, [7, 3]), torch.linspace(-1, 1, 12 * V).reshape(2, 6, V)

    def pulled_back(waits: bool) -> Tensor:
        def call(params):
            return functional_call(model, patch(params, deferred_logits=waits), X).logits

        return vjp(call, params)[1](seed)[0].deltas["model.embed_tokens.weight"]

    torch.testing.assert_close(pulled_back(True), pulled_back(False))
    (_, gradient), (_, found) = both(
        lambda y: (torch.autograd.backward(y, seed, retain_graph=True), y)[1]
    )
    torch.testing.assert_close(found, gradient)


def test_positions_chosen_by_vmap():
    waits, plain = deferred()

    def each(y: Tensor) -> Tensor:
        flat = y.view(-1, V)
        return vmap(lambda i: F.cross_entropy(flat[i], X.view(-1)[i]))(torch.arange(12))

    torch.testing.assert_close(each(waits), each(plain))


def test_logits_that_leave_a_transform():
    model = llama(attn_implementation="eager")
    params = random_rows(model, [7, 3], requires_grad=True)

    def call(params, waits: bool):
        return functional_call(model, patch(params, deferred_logits=waits), X, {"labels": LABELS})

    def aux(params, waits: bool):
        out = call(params, waits)
        return out.loss, out.logits

    ours = grad(lambda p: aux(p, True), has_aux=True)(params)[1]
    torch.testing.assert_close(ours * 1, grad(lambda p: aux(p, False), has_aux=True)(params)[1])
    members = stack([params, random_rows(model, [7, 3], 1)])
    ours = vmap(lambda p: call(p, True).logits)(members)
    torch.testing.assert_close(ours * 1, vmap(lambda p: call(p, False).logits)(members))
