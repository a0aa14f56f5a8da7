"""Logits of a small head, deferred or not, and what a test does with them."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.helpers.models import D, V
from tests.helpers.rows import random_rows
from ttfunc import functional_call, patch
from ttfunc.weight.logits import DeferredLogits

X = torch.tensor([[3, 7, 5, 9, 1, 4], [7, 2, 8, 3, 6, 11]])
LABELS = torch.tensor([[-100, -100, 5, 9, -100, 4], [7, 2, 8, -100, 6, 11]])


class Head(nn.Module):
    """An embedding, a tied head with a bias, and what a test does to the logits."""

    def __init__(self, then) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed_tokens = nn.Embedding(V, D)
        self.mix = nn.Linear(D, D)
        self.head = nn.Linear(D, V)
        self.head.weight = self.embed_tokens.weight
        self.then = then
        self.requires_grad_(False)

    def forward(self, x: Tensor) -> object:
        return self.then(self.head(self.mix(self.embed_tokens(x)).tanh()))


def both(then, x: Tensor = X) -> list[tuple[Tensor, Tensor]]:
    """What comes of it, and its gradient, without deferring and with it."""
    model, found = Head(then), []
    for deferred in (False, True):
        params = random_rows(model, [7, 3, 5], requires_grad=True)
        out = functional_call(model, patch(params, deferred_logits=deferred), x)
        weight = torch.linspace(-1, 1, out.numel()).reshape(out.shape)
        (out.float() * weight).sum().backward()
        found.append((out.detach(), params.deltas["embed_tokens.weight"].grad))
    return found


def loss_of(logits: Tensor) -> Tensor:
    return F.cross_entropy(logits.reshape(-1, V), X.reshape(-1)[: logits.numel() // V])


def unlearnt(function, *args) -> Tensor:
    with torch.no_grad():
        return function(*args)


def deferred(dtype: torch.dtype = torch.float32) -> tuple[DeferredLogits, Tensor]:
    """Logits that wait, and the same ones without deferring."""
    model = Head(lambda y: y).to(dtype)
    params = random_rows(model, [7, 3], requires_grad=True)
    waits = functional_call(model, patch(params, deferred_logits=True), X)
    assert type(waits) is DeferredLogits
    return waits, functional_call(model, patch(params), X)
