"""Each way to call, on tensors of a GPU that need not be there: no tensor is on another device.

Fake tensors have a device and no values, and an operation on two devices raises. They need a torch
that was built for CUDA: `.ci/versions newest tests/fake_cuda.py`. The backward, autocast
and what copies a file to the device ask for a real GPU.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import optree
import pytest
import torch
import transformers
from torch import Tensor, nn, vmap
from torch._subclasses import FakeTensorMode

import ttfunc
from ttfunc import TokenModule, functional_call, init_deltas, patch, patch_mixed

V, D, IDS = 100, 32, [5, 7, 9]
BOTH = ["embed_tokens", "lm_head"]


def llama(*, tied: bool) -> nn.Module:
    sizes = {"vocab_size": V, "hidden_size": D, "intermediate_size": 64, "num_hidden_layers": 2}
    config = transformers.LlamaConfig(**sizes, num_attention_heads=4, tie_word_embeddings=tied)
    return transformers.LlamaForCausalLM(config).requires_grad_(False)


@pytest.fixture(params=[True, False], ids=["tied", "untied"])
def model(request: pytest.FixtureRequest) -> Iterator[nn.Module]:
    with FakeTensorMode(), torch.device("cuda"):
        yield llama(tied=request.param)


def rows_of(model: nn.Module, ids: list[int] = IDS, **options: object) -> ttfunc.TokenDeltas:
    return init_deltas(model, ids, targets=BOTH, init="mean", **options)


def tokens() -> Tensor:
    return torch.randint(V, (4, 6), device="cuda")


WAYS: dict[str, Callable[[nn.Module], dict[str, Tensor]]] = {
    "plain": lambda model: patch(rows_of(model)),
    "that trains": lambda model: patch(rows_of(model, requires_grad=True)),
    "dense": lambda model: patch(rows_of(model), dense=True),
    "deferred": lambda model: patch(rows_of(model, requires_grad=True), deferred_logits=True),
    "new tokens": lambda model: patch(rows_of(model, [V, V + 1], grow=True)),
    "mixed": lambda model: patch_mixed([rows_of(model), rows_of(model, [1])], [0, 1, -1, 0]),
    "mixed with new tokens": lambda model: patch_mixed(
        [rows_of(model, [V], grow=True), rows_of(model, [3, V], grow=True)], [0, 1, 1, 0]
    ),
}


@pytest.mark.parametrize("way", WAYS)
def test_a_call(model: nn.Module, way: str):
    x = tokens()
    out = functional_call(model, WAYS[way](model), (x,), {"labels": x})
    assert out.loss.device.type == out.logits.device.type == "cuda"


def test_a_module(model: nn.Module):
    x = tokens()
    out = TokenModule(model, rows_of(model))(input_ids=x, labels=x)
    assert out.loss.device.type == "cuda"


def test_stacked_adapters(model: nn.Module):
    stacked = optree.tree_map(lambda rows: torch.stack([rows, rows + 1]), rows_of(model))
    x = tokens()
    out = vmap(lambda rows: functional_call(model, patch(rows), (x,)).logits)(stacked)
    assert out.device.type == "cuda"


@pytest.mark.parametrize("assignment", [False, True])
def test_a_program_for_any_rows(model: nn.Module, assignment: bool):
    options = {"kwargs": {"use_cache": False, "return_dict": False}, "assignment": assignment}
    program = ttfunc.Exportable(model, targets=BOTH, **options)
    size = (2, 8) if assignment else (8,)
    rows = {name: torch.zeros(*size, D, device="cuda") for name in program.matrices}
    ids = {name: torch.zeros(size, dtype=torch.int64, device="cuda") for name in program.matrices}
    given = (rows, ids) if len(rows) > 1 else (*rows.values(), *ids.values())
    which = (torch.zeros(4, dtype=torch.int64, device="cuda"),) if assignment else ()
    assert program(*given, *which, tokens())[0].device.type == "cuda"


def test_merged_state_dicts(model: nn.Module):
    for rows in (rows_of(model), rows_of(model, [V, V + 1], grow=True)):
        merged = ttfunc.merge(model.state_dict(), rows)
        assert {one.device.type for one in merged.values()} == {"cuda"}
