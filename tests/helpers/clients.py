"""A model, rows and a loss for those who build on a pytree of tensors."""

from __future__ import annotations

import optree
from torch import Tensor, nn

from tests.helpers.models import loss_of, make, tokens
from tests.helpers.rows import random_rows
from ttfunc import TokenDeltas, functional_call, patch

IDS, STEPS = [7, 3, 20], 5


def setting(case: str = "tied") -> tuple[nn.Module, TokenDeltas]:
    model = make(case).requires_grad_(False).double()
    return model, random_rows(model, IDS)


def batch(step: int) -> Tensor:
    return tokens(*IDS, seed=step)


def loss_at(model: nn.Module, params: TokenDeltas, x: Tensor, dense: bool = False) -> Tensor:
    return loss_of(functional_call(model, patch(params, dense=dense), (x,)))


def trainable(params: TokenDeltas) -> TokenDeltas:
    return optree.tree_map(lambda t: t.clone().requires_grad_(), params)
