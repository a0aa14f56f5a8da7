"""Which places of a model a call gives other weights to."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.helpers.models import D, V, make, tokens
from ttfunc import functional_call, init_deltas, patch

NAME = "embed_tokens.weight"
X = tokens(7, 3)


def read_in(model: nn.Module, weights: dict[str, Tensor], *names: str) -> list[Tensor]:
    """What a call has under these names."""
    found: list[Tensor] = []

    def look(module: nn.Module, *_: object) -> None:
        found.extend(dict(module.named_parameters(remove_duplicate=False))[name] for name in names)

    handle = model.register_forward_hook(look)
    functional_call(model, weights, X)
    handle.remove()
    return found


@pytest.mark.parametrize("case", ["tied", "encoder_decoder", "storage_tied"])
def test_a_patch_goes_to_every_place_and_counts_the_reads_of_each_call(case: str):
    model = make(case)
    weights = patch(init_deltas(model, [3]))
    weight = weights[NAME]
    first, second = read_in(model, weights, NAME, "lm_head.weight")
    assert first is second
    assert first.source.uses() == {"lookup", "product"}
    assert weight.source.uses() == {"lookup", "product"}
    first + 0
    assert "dense" not in weight.source.uses()


def test_a_plain_tensor_stands_for_itself():
    model = make("untied")
    weights = {"lm_head.weight": torch.zeros(V, D)}
    assert read_in(model, weights, "lm_head.weight")[0] is weights["lm_head.weight"]


def test_a_tie_through_memory_that_comes_or_goes_is_seen_by_the_next_call():
    torch.manual_seed(0)

    class Pair(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Embedding(9, 4), nn.Linear(4, 9, bias=False)

        def forward(self, x: Tensor) -> Tensor:
            return self.b(self.a(x))

    model, x = Pair().requires_grad_(False), torch.tensor([1, 2])
    weights = {"a.weight": torch.randn(9, 4)}

    def check(tied: bool) -> None:
        head = weights["a.weight"] if tied else model.b.weight
        expected = F.linear(F.embedding(x, weights["a.weight"]), head)
        for _ in range(2):
            assert torch.equal(functional_call(model, weights, x), expected)

    check(tied=False)
    model.b.weight = nn.Parameter(model.a.weight.data, requires_grad=False)
    check(tied=True)
    model.double()
    weights["a.weight"] = weights["a.weight"].double()
    check(tied=False)
