"""Each way to call, on tensors of a GPU that need not be there: no tensor is on another device.

Fake tensors have a device and no values, and an operation on two devices raises. They need a torch
that was built for CUDA: `.ci/versions newest tests/fake_cuda.py`. The backward asks for a real GPU.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
import transformers
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch.func import vmap

import ttfunc
from ttfunc import TokenModule, functional_call, init_deltas, patch, patch_mixed

V, D, IDS = 100, 32, [5, 7, 9]


@pytest.fixture(params=[True, False], ids=["tied", "untied"])
def model(request: pytest.FixtureRequest) -> Iterator[nn.Module]:
    config = transformers.LlamaConfig(
        vocab_size=V,
        hidden_size=D,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        tie_word_embeddings=request.param,
    )
    with FakeTensorMode(), torch.device("cuda"):
        yield transformers.LlamaForCausalLM(config).requires_grad_(False)


def rows_of(model: nn.Module, ids: list[int] = IDS, **options: object) -> ttfunc.TokenDeltas:
    return init_deltas(model, ids, targets=["embed_tokens", "lm_head"], init="mean", **options)


def tokens(top: int = V) -> Tensor:
    return torch.randint(top, (4, 6), device="cuda")


WAYS: dict[str, Callable[[nn.Module], object]] = {
    "plain": lambda model: patch(rows_of(model)),
    "that trains": lambda model: patch(rows_of(model, requires_grad=True)),
    "dense": lambda model: patch(rows_of(model), dense=True),
    "deferred": lambda model: patch(rows_of(model, requires_grad=True), deferred_logits=True),
    "two adapters": lambda model: patch(rows_of(model), rows_of(model, [1])),
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


@pytest.mark.parametrize("half", [torch.float16, torch.bfloat16])
def test_a_call_in_autocast(model: nn.Module, half: torch.dtype):
    with torch.autocast("cuda", half):
        out = functional_call(model, patch(rows_of(model)), (tokens(),))
    assert out.logits.device.type == "cuda"


def test_a_module(model: nn.Module):
    x = tokens()
    out = TokenModule(model, rows_of(model))(input_ids=x, labels=x)
    assert out.loss.device.type == "cuda"


def test_stacked_adapters(model: nn.Module):
    stacked = ttfunc.stack([rows_of(model), rows_of(model)])
    out = vmap(lambda rows: functional_call(model, patch(rows), (tokens(),)).logits)(stacked)
    assert out.device.type == "cuda"


def test_merged_state_dicts(model: nn.Module):
    for rows in (rows_of(model), rows_of(model, [V, V + 1], grow=True)):
        merged = ttfunc.merge(model.state_dict(), rows)
        assert {one.device.type for one in merged.values()} == {"cuda"}


def test_rows_of_a_file_come_to_the_device_of_the_model(model: nn.Module, tmp_path: Path):
    file = tmp_path / "rows.safetensors"
    with torch._subclasses.fake_tensor.unset_fake_temporarily(), torch.device("cpu"):
        config = model.config
        ttfunc.save(rows_of(transformers.LlamaForCausalLM(config)), file)
    rows = ttfunc.load(file, model, check_base=False)
    assert {one.device.type for one in rows.deltas.values()} == {"cuda"}
