"""What is refused before a call on a sharded model; more ranks are in tests/engines."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Shard, distribute_tensor

from tests.helpers.llama import llama
from tests.helpers.mesh import mesh_of_one
from tests.helpers.rows import random_rows
from ttfunc import functional_call, init_deltas, merge, patch

X = torch.tensor([[7, 3, 1]])


@pytest.fixture
def mesh():
    with mesh_of_one() as mesh:
        yield mesh


def split(model: nn.Module, mesh) -> None:
    """The embedding as a DTensor; torch's tensor parallelism leaves it so."""
    weight = distribute_tensor(model.weight.data, mesh, [Shard(0)])
    model.weight = nn.Parameter(weight, requires_grad=False)


def test_a_patch_of_another_model_is_refused(mesh):
    model, other = llama(), llama()
    early = random_rows(other, [7])
    fully_shard(model, mesh=mesh)
    with pytest.raises(
        ValueError, match=r"stale patch: .* another model than the LlamaForCausalLM"
    ):
        functional_call(model, patch(early), X)


def test_a_matrix_with_other_values_or_another_shape_is_refused(mesh):
    for weight, words in (
        (torch.ones(23, 8), "other values since"),
        (torch.ones(29, 8), "has shape"),
    ):
        model = nn.Embedding(23, 8).requires_grad_(False)
        params = random_rows(model, [7])
        model.weight = nn.Parameter(weight, requires_grad=False)
        split(model, mesh)
        with pytest.raises(ValueError, match=words):
            functional_call(model, patch(params), X)


def test_ties_that_changed_before_the_model_was_sharded_are_refused(mesh):
    for tie, words in ((True, "more than one parameter"), (False, "to more places than it did")):
        model = llama(tie=tie)
        params = random_rows(model, [7], targets="embed_tokens")
        weight = model.model.embed_tokens.weight
        model.lm_head.weight = nn.Parameter(weight.clone(), requires_grad=False) if tie else weight
        fully_shard(model, mesh=mesh)
        with pytest.raises(ValueError, match=words):
            functional_call(model, patch(params), X)


def test_a_copy_and_a_transform_are_refused_on_a_matrix_that_is_split(mesh):
    model = nn.Embedding(23, 8).requires_grad_(False)
    copied = patch(random_rows(model, [7]), dense=True)
    split(model, mesh)
    params = init_deltas(model, [7])
    with pytest.raises(RuntimeError, match=r"the patch is a copy of .*Leave dense out"):
        functional_call(model, copied, X)
    with pytest.raises(RuntimeError, match=r"dense=True copies it, .*Leave dense out"):
        patch(params, dense=True)
    with pytest.raises(RuntimeError, match=r"torch.func transform over 'weight'"):
        torch.func.grad(lambda p: functional_call(model, patch(p), X).sum())(params)


def test_the_whole_matrix_is_let_go_of_at_the_first_call(mesh):
    model = llama()
    params = random_rows(model, [7])
    (spec,) = params.specs.values()
    whole = spec.matrix.tensor
    fully_shard(model, mesh=mesh)
    assert spec.matrix.tensor is whole
    functional_call(model, patch(params), X)
    assert all(tensor is not whole for _, tensor in spec.matrix.slots)


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.bfloat16])
def test_rows_are_merged_into_a_split_matrix_of_any_dtype(dtype: torch.dtype, mesh):
    model = nn.Embedding(23, 8).requires_grad_(False)
    params = random_rows(model, [7, 3])
    weight = model.weight.to(dtype)
    held = distribute_tensor(weight.view(torch.uint8), mesh, [Shard(0)]).to_local().view(dtype)
    whole = torch.distributed.tensor.DTensor.from_local(held, mesh, [Shard(0)])
    found = merge({"weight": whole}, params)["weight"].to_local()
    expected = merge({"weight": weight}, params)["weight"]
    assert torch.equal(found.view(torch.uint8), expected.view(torch.uint8))
