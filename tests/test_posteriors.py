"""posteriors on a pytree of rows, against its formulas."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import optree
import pytest
import torch
from torch import Tensor, nn

from tests.helpers.clients import STEPS, batch, loss_at, setting
from tests.helpers.models import loss_of
from tests.helpers.oracle import edited, row_gradients
from ttfunc import TokenDeltas

with warnings.catch_warnings():  # tensordict's, of the defaults in posteriors' own classes
    warnings.filterwarnings("ignore", ".*default of the field", FutureWarning)
    import posteriors

NAME = "embed_tokens.weight"


def log_posterior_of(model: nn.Module) -> Callable[[TokenDeltas, Tensor], tuple[Tensor, Tensor]]:
    def log_posterior(params: TokenDeltas, x: Tensor) -> tuple[Tensor, Tensor]:
        prior = sum(-(leaf**2).sum() / 2 for leaf in optree.tree_leaves(params))
        return prior - loss_at(model, params, x), torch.tensor([])

    return log_posterior


def score(model: nn.Module, params: TokenDeltas, x: Tensor) -> Tensor:
    """The gradient of the same log posterior, by an edited copy."""
    reference = edited(model, params).requires_grad_()
    loss_of(reference(x)).backward()
    return -params.deltas[NAME] - row_gradients(reference, params)[NAME]


@pytest.mark.parametrize("inplace", [False, True])
def test_sgld_walks_by_its_formula(inplace: bool):
    model, params = setting()
    lr, temperature = 0.01, 0.5
    sampler = posteriors.sgmcmc.sgld.build(log_posterior_of(model), lr=lr, temperature=temperature)
    state = sampler.init(optree.tree_map(torch.clone, params))
    torch.manual_seed(3)
    for step in range(STEPS):
        state, _ = sampler.update(state, batch(step), inplace=inplace)
    assert isinstance(state.params, TokenDeltas)

    torch.manual_seed(3)
    expected = params
    for step in range(STEPS):
        slope = score(model, expected, batch(step))
        noise = torch.randn_like(slope) * (2 * lr * temperature) ** 0.5
        rows = expected.deltas[NAME] + lr * slope + noise
        expected = TokenDeltas({NAME: rows}, expected.specs)
    torch.testing.assert_close(state.params.deltas[NAME], expected.deltas[NAME])


def test_a_diagonal_laplace_precision_is_a_loop_over_the_examples():
    model, params = setting()
    transform = posteriors.laplace.diag_fisher.build(log_posterior_of(model), init_prec_diag=1.0)
    state = transform.init(params)
    for step in range(2):
        state, _ = transform.update(state, batch(step))
    examples = torch.cat([batch(0), batch(1)])
    precision = 1 + sum(score(model, params, x.unsqueeze(0)) ** 2 for x in examples)
    torch.testing.assert_close(state.prec_diag.deltas[NAME], precision)

    torch.manual_seed(3)
    sample = posteriors.laplace.diag_fisher.sample(state)
    torch.manual_seed(3)
    expected = params.deltas[NAME] + torch.randn(precision.shape) * precision**-0.5
    torch.testing.assert_close(sample.deltas[NAME], expected)
    assert loss_at(model, sample, batch(0)).isfinite()


def test_a_full_laplace_precision_is_a_loop_over_the_examples():
    model, params = setting("untied")
    transform = posteriors.laplace.dense_fisher.build(
        log_posterior_of(model), init_prec=torch.eye(24, dtype=torch.float64)
    )
    state, _ = transform.update(transform.init(params), batch(0))
    scores = [score(model, params, x.unsqueeze(0)).ravel() for x in batch(0)]
    expected = torch.eye(24) + sum(torch.outer(one, one) for one in scores)
    torch.testing.assert_close(state.prec, expected)
