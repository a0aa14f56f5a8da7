"""Recipes of four ranks: FSDP2 over tensor parallelism, and FSDP2 with replicas."""

from __future__ import annotations

from typing import Any

import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Replicate
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

from tests.engines.work import Recipes, again, made, starts_alike, stepped
from tests.helpers.llama import llama
from ttfunc import merge

RECIPES = Recipes()


def both(model: Any) -> Any:
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "tensor"))
    plan: dict[str, Any] = {
        "model.embed_tokens": RowwiseParallel(input_layouts=Replicate()),
        "lm_head": ColwiseParallel(output_layouts=Replicate()),
    }
    for i in range(len(model.model.layers)):
        plan[f"model.layers.{i}.mlp.up_proj"] = ColwiseParallel()
        plan[f"model.layers.{i}.mlp.gate_proj"] = ColwiseParallel()
        plan[f"model.layers.{i}.mlp.down_proj"] = RowwiseParallel()
    parallelize_module(model, mesh["tensor"], plan)
    for block in model.model.layers:
        fully_shard(block, mesh=mesh["data"])
    return fully_shard(model, mesh=mesh["data"])


@RECIPES.recipe("FSDP2 over tensor parallelism", tie=True)
@RECIPES.recipe("FSDP2 over tensor parallelism, untied", tie=False)
def fsdp_and_tp(tie: bool) -> dict[str, float]:
    model, params, truth = made(tie=tie)
    return stepped(both(model), params, truth)


@RECIPES.recipe("FSDP2 over tensor parallelism, untied, rows made after a forward")
def late() -> dict[str, float]:
    model, params, truth = made(tie=False)
    both(model)
    model(torch.tensor([[1, 2]]))
    return stepped(model, again(model, params), truth)


@RECIPES.recipe("merge of a state dict split twice")
def merged() -> dict[str, float]:
    model, params, _ = made(tie=False)
    both(model)
    found, truth = merge(model.state_dict(), params), merge(llama(tie=False).state_dict(), params)
    (name,) = params.deltas
    return {"tensor": float(not torch.equal(found[name].full_tensor(), truth[name]))}


@RECIPES.recipe("where rows start, of a matrix split twice")
def starts() -> dict[str, float]:
    return starts_alike(llama(tie=False), both(llama(tie=False)))


@RECIPES.recipe("FSDP2 with replicas")
def replicas() -> dict[str, float]:
    model, params, truth = made()
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))
    for block in model.model.layers:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return stepped(model, again(model, params), truth)
