"""What a model sets on itself during a call, which is carried over from the copies."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from tests.helpers.models import D, Language, V, tokens
from tests.helpers.oracle import snapshot
from tests.helpers.rows import random_rows
from ttfunc import functional_call, patch

NAME = "embed_tokens.weight"
X = tokens(7, 3)


class Noting(Language):
    def __init__(self) -> None:
        super().__init__()
        self.calls, self.last = 0, None
        self.register_buffer("running", torch.zeros(D))
        self.stale = "there"

    def forward(self, x: Tensor, error: bool = False) -> Tensor:
        self.calls += 1
        self.used = [self.embed_tokens, self]
        self.last = self.embed_tokens.weight
        h = self.embed(x)
        self.running = 0.9 * self.running + h.mean((0, 1)).detach()
        self.embed_tokens.note = "embedded"
        self.extra = nn.Linear(D, D).requires_grad_(False)
        if hasattr(self, "stale"):
            del self.stale
        if error:
            raise ZeroDivisionError("at the end of the call")
        return self.head(h)


def test_what_a_model_notes_on_itself_is_there_afterwards():
    model, same = Noting().requires_grad_(False), Noting()
    same.load_state_dict(model.state_dict())
    params = random_rows(model)
    with torch.no_grad():
        same.embed_tokens.weight[params.token_indices[NAME]] = params.deltas[NAME]
    weight = model.embed_tokens.weight
    for _ in range(2):
        functional_call(model, patch(params), (X,))
        same(X)
        assert model.calls == same.calls
        torch.testing.assert_close(model.running, same.running)
    assert model.used == [model.embed_tokens, model]
    assert model.last is weight is model.embed_tokens.weight is model.lm_head.weight
    assert model.embed_tokens.note == "embedded"
    assert isinstance(model.extra, nn.Linear)
    assert "extra" in dict(model.named_children())
    assert not hasattr(model, "stale")


def test_a_call_that_raises_notes_nothing():
    model = Noting().requires_grad_(False)
    before, own = snapshot(model), dict(vars(model))
    with pytest.raises(ZeroDivisionError, match="at the end of the call"):
        functional_call(model, patch(random_rows(model)), (X, True))
    assert snapshot(model) == before
    assert vars(model) == own


def test_what_is_set_in_the_place_of_a_patched_weight_is_not_kept():
    class Setting(Language):
        def forward(self, x: Tensor) -> Tensor:
            out = super().forward(x)
            self.embed_tokens.weight = nn.Parameter(torch.zeros(V, D))
            return out

    model = Setting().requires_grad_(False)
    before = snapshot(model)
    functional_call(model, patch(random_rows(model)), (X,))
    assert snapshot(model) == before


def test_rope_deltas_of_a_call_are_read_by_the_next():
    class Rope(Language):
        rope_deltas = None

        def forward(self, x: Tensor) -> Tensor:
            if self.rope_deltas is None:
                self.rope_deltas = x.float().mean()
            return super().forward(x) + self.rope_deltas

    model = Rope().requires_grad_(False)
    params = random_rows(model)
    first = functional_call(model, patch(params), (X,))
    second = functional_call(model, patch(params), (X + 1 - 1,))
    assert model.rope_deltas == X.float().mean()
    assert torch.equal(first, second)
