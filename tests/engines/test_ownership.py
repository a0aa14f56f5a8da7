"""Whose a parameter is, and what of it is between calls."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from tests.helpers.llama import llama
from tests.helpers.mesh import mesh_of_one
from ttfunc import init_deltas
from ttfunc.engines.ownership import (
    EngineParameters,
    base_for_call,
    check_engine,
    counts_on_module,
    engines_at_work,
    is_owned,
    shape_of,
)


@pytest.fixture
def mesh():
    with mesh_of_one() as mesh:
        yield mesh


def test_a_plain_model_has_no_owner():
    model = llama()
    embedding = model.get_input_embeddings()
    assert not engines_at_work()
    assert not is_owned(embedding, "weight")
    assert EngineParameters().of(embedding, "weight", embedding.weight) is embedding.weight


def test_fsdp_keeps_shards_while_the_module_has_all(mesh):
    model = fully_shard(llama(), mesh=mesh)
    embedding = model.get_input_embeddings()
    shards = embedding.weight
    assert engines_at_work()
    assert is_owned(embedding, "weight")
    model(torch.tensor([[1]]))
    assert not isinstance(embedding.weight, DTensor)
    assert is_owned(embedding, "weight")
    assert EngineParameters().of(embedding, "weight", embedding.weight) is shards


def test_what_fsdp_ignores_is_the_module_s_own(mesh):
    model = llama()
    embedding = model.get_input_embeddings()
    fully_shard(model, mesh=mesh, ignored_params={embedding.weight})
    assert not is_owned(embedding, "weight")
    assert EngineParameters().of(embedding, "weight", embedding.weight) is embedding.weight


def test_a_dtensor_is_owned_and_cannot_be_read(mesh):
    layer = nn.Linear(3, 5, bias=False)
    layer.weight = nn.Parameter(distribute_tensor(layer.weight.data, mesh, [Shard(0)]))
    assert is_owned(layer, "weight")
    nan = base_for_call(layer.weight)
    assert type(nan) is torch.Tensor
    assert nan.shape == shape_of(layer.weight) == (5, 3)
    assert nan.isnan().all()
    assert nan.untyped_storage().nbytes() == 4


def test_a_plain_matrix_is_read_where_it_lies():
    weight = nn.Parameter(torch.ones(5, 3))
    assert base_for_call(weight).data_ptr() == weight.data_ptr()
    assert not base_for_call(weight).requires_grad


def test_a_partitioned_parameter_tells_its_whole_shape():
    weight = nn.Parameter(torch.empty(0))
    weight.ds_id, weight.ds_shape = 1, torch.Size((5, 3))
    assert shape_of(weight) == (5, 3)
    assert base_for_call(weight).shape == (5, 3)


def test_fsdp_1_is_refused_with_the_way_out(mesh):
    inner = nn.Sequential(nn.Embedding(5, 3))
    with pytest.warns(UserWarning, match="FSDP"):  # of a single rank
        model = FullyShardedDataParallel(inner, device_id=torch.device("cpu"))
    with pytest.raises(TypeError, match=r"FSDP1.* Use FSDP2: torch.distributed.fsdp.fully_shard"):
        init_deltas(model, [1])
    check_engine(llama())


def test_hooks_of_deepspeed_count_on_their_module():
    def hook() -> None: ...

    assert not counts_on_module(hook)
    hook.__module__ = "deepspeed.runtime.zero.parameter_offload"
    assert counts_on_module(hook)
