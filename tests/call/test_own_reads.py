"""A call that reaches the model's own matrix past its copies is refused."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard

from tests.helpers.mesh import mesh_of_one
from tests.helpers.rows import random_rows
from ttfunc import functional_call, patch

TOKENS = torch.tensor([3, 1])
KNOWN: dict[str, nn.Module] = {}


class Tied(nn.Module):
    """Its head is the embedding that it finds among the globals."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(5, 4)

    def forward(self, tokens: Tensor) -> Tensor:
        return F.linear(self.embed(tokens), KNOWN["embedding"].weight)


def made() -> Tied:
    model = Tied().requires_grad_(False)
    KNOWN["embedding"] = model.embed
    model.registry = Registry(model.embed)
    return model


class Registry:
    """An object that no call copies, and that tells the call to look."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module


def test_the_model_s_own_matrix_is_refused_by_the_name_of_the_function():
    model = made()
    with pytest.raises(RuntimeError, match=r"own 'embed.weight' was given .*Tied.registry"):
        functional_call(model, patch(random_rows(model, [3])), TOKENS)


def test_the_one_that_an_engine_has_gathered_is_refused_too():
    with mesh_of_one() as mesh:
        model = made()
        fully_shard(model, mesh=mesh)
        weights = patch(random_rows(model, [3]))
        with pytest.raises(RuntimeError, match=r"own 'embed.weight' was given to linear"):
            functional_call(model, weights, TOKENS)


def test_a_sharded_model_that_leads_nowhere_else_is_right():
    with mesh_of_one() as mesh:
        model = nn.Sequential(nn.Embedding(5, 4)).requires_grad_(False)
        fully_shard(model, mesh=mesh)
        params = random_rows(model, [3])
        for _ in range(2):
            found = functional_call(model, patch(params), TOKENS)
            assert torch.equal(found[0], params.deltas["0.weight"][0])


def test_an_attribute_of_the_name_of_a_global_does_not_lead_to_the_matrix(monkeypatch):
    model = nn.Sequential(nn.Embedding(5, 4))
    model.looked_up = lambda self, tokens: self.embed(tokens)
    monkeypatch.setitem(globals(), "embed", model[0])  # as in a script
    params = random_rows(model, [3])
    # A compiled call is refused where something may lead past its copies.
    compiled = torch.compile(
        lambda p: functional_call(model, patch(p), TOKENS), backend="eager", fullgraph=True
    )
    torch.testing.assert_close(compiled(params), functional_call(model, patch(params), TOKENS))


def test_a_global_that_a_function_loads_does(monkeypatch):
    model = nn.Sequential(nn.Embedding(5, 4))
    model.looked_up = lambda tokens: embed(tokens)  # noqa: F821
    monkeypatch.setitem(globals(), "embed", model[0])
    with pytest.raises(RuntimeError, match=r"may be read in a compiled call.*Sequential.looked_up"):
        torch.compile(
            lambda p: functional_call(model, patch(p), TOKENS), backend="eager", fullgraph=True
        )(random_rows(model, [3]))
