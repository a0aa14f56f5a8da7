"""Law 8, in one thread: calls inside of calls, and what runs after them."""

from __future__ import annotations

import contextlib

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from tests.helpers.models import D, Language, V, make, tokens
from tests.helpers.oracle import edited, snapshot
from tests.helpers.rows import adapters, random_rows
from ttfunc import functional_call, init_deltas, patch

NAME, NAMES = "embed_tokens.weight", ("embed_tokens", "lm_head")
X = tokens(7, 3)


@contextlib.contextmanager
def inside(module: nn.Module, act, times: int = 1):
    """`act` runs inside the next calls of a module, the calls that it makes included."""
    left = [act] * times

    def hook(*_: object) -> None:
        if left:
            left.pop()()

    handle = module.register_forward_hook(hook)
    yield
    handle.remove()


def test_a_call_inside_a_call_has_weights_of_its_own():
    model = make("tied").requires_grad_(False)
    a, b = adapters(model, [7, 3], [7, 3])
    inner = []

    def act() -> None:
        inner.append(functional_call(model, patch(b), (X,)))

    before = snapshot(model)
    with inside(model.body, act, times=2):
        outer = functional_call(model, patch(a), (X,))
    torch.testing.assert_close(outer, edited(model, a)(X))
    torch.testing.assert_close(inner[0], edited(model, b)(X))
    torch.testing.assert_close(inner[1], edited(model, b)(X))
    assert snapshot(model) == before


def test_a_call_inside_a_call_that_gave_a_plain_tensor_has_its_own():
    model = make("tied").requires_grad_(False)
    params = random_rows(model)
    inner = []

    def act() -> None:
        inner.append(functional_call(model, patch(params), (X,)))

    before = snapshot(model)
    with inside(model.body, act):
        functional_call(model, {NAME: torch.zeros(V, D)}, (X,))
    torch.testing.assert_close(inner[0], edited(model, params)(X))
    assert snapshot(model) == before


def test_a_call_inside_a_call_on_other_matrices_sees_the_model_as_it_is():
    model = make("untied").requires_grad_(False)
    embedding, head = (init_deltas(model, [7, 3], targets=t, init="mean") for t in NAMES)
    inner = []

    def act() -> None:
        inner.append(functional_call(model, patch(head), (X,)))
        inner.append(functional_call(model, {}, (X,)))
        inner.append(model(X))

    before = snapshot(model)
    with inside(model.body, act):
        outer = functional_call(model, patch(embedding), (X,))
    torch.testing.assert_close(outer, edited(model, embedding)(X))
    torch.testing.assert_close(inner[0], edited(model, head)(X))
    assert torch.equal(inner[1], model(X))
    assert torch.equal(inner[2], model(X))
    assert snapshot(model) == before


def test_parameters_made_inside_a_call_are_those_of_the_model():
    model = make("tied").requires_grad_(False)
    made = []
    handle = model.body.register_forward_hook(lambda *_: made.append(init_deltas(model, [3])))
    functional_call(model, patch(init_deltas(model, [7, 3], init="mean")), (X,))
    handle.remove()
    assert torch.equal(made[0].originals[NAME], model.embed_tokens.weight[[3]])


class Reentrant(Language):
    """A model that makes parameters of itself, or calls itself with other rows, as it runs."""

    def forward(self, x: torch.Tensor, inner=None) -> torch.Tensor:
        return super().forward(x) if inner is None else inner(self, x)


def test_a_model_that_calls_itself_with_other_rows():
    model = Reentrant().requires_grad_(False)
    a, b = adapters(model, [7, 3], [7, 3])
    call = functional_call(
        model, patch(a), (X, lambda own, x: own(x) + functional_call(own, patch(b), (x,)))
    )
    torch.testing.assert_close(call, edited(model, a)(X) + edited(model, b)(X))
    with pytest.raises(TypeError, match="is a stand-in of a functional call"):
        functional_call(model, patch(a), (X, lambda own, x: init_deltas(own, [1])))


@pytest.mark.parametrize("reentrant", [True, False])
def test_a_recomputed_checkpoint_of_embedding_and_head_reads_the_rows(reentrant: bool):
    class Checkpointed(Language):
        def forward(self, x: torch.Tensor, h0: torch.Tensor, how: bool | None) -> torch.Tensor:
            def whole(h: torch.Tensor) -> torch.Tensor:
                return self.head(self.mix(self.embed(x) + h))

            return whole(h0) if how is None else checkpoint(whole, h0, use_reentrant=how)

    model = Checkpointed().requires_grad_(False)

    def gradient(how: bool | None, dense: bool) -> torch.Tensor:
        params = init_deltas(model, [7, 3], init="mean", requires_grad=True)
        h0 = torch.zeros(D, requires_grad=True)
        loss = functional_call(model, patch(params, dense=dense), (X, h0, how)).square().sum()
        loss.backward()
        return torch.cat([params.deltas[NAME].grad, h0.grad[None]])

    for dense in (False, True):
        expected = gradient(None, dense)
        assert expected.abs().sum() > 0
        torch.testing.assert_close(gradient(reentrant, dense), expected)


def test_a_generator_reads_the_rows_after_the_call():
    class Streaming(Language):
        def stream(self, x: torch.Tensor):
            for row in x:
                yield self(row[None])

    model = Streaming().requires_grad_(False)
    params = random_rows(model)
    found = torch.cat(list(functional_call(model, patch(params), X, method="stream")))
    torch.testing.assert_close(found, edited(model, params)(X))
