"""Recipes of FSDP2."""

from __future__ import annotations

import itertools
import tempfile
from typing import Any

import accelerate
import torch
import torch.distributed as dist
from accelerate.utils.fsdp_utils import fsdp2_prepare_model
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from transformers import LlamaForCausalLM
from transformers.distributed import DistributedConfig

from tests.engines.work import (
    IDS,
    TEXT,
    Recipes,
    again,
    compared,
    made,
    oracle,
    refused,
    said,
    started,
    stepped,
)
from tests.helpers.llama import llama
from tests.helpers.rows import random_rows

RECIPES = Recipes()


def shard(model: Any, **options: Any) -> Any:
    """FSDP2 as its documentation shows it: each block, and the root."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for block in model.model.layers:
        fully_shard(block, mesh=mesh, **options)
    return fully_shard(model, mesh=mesh, **options)


def _nothing(model: Any, params: Any) -> None:
    pass


def _forward(model: Any, params: Any) -> None:
    model(TEXT)


def _no_grad(model: Any, params: Any) -> None:
    with torch.no_grad():
        model(TEXT)


def _backward(model: Any, params: Any) -> None:
    states = torch.randn(*TEXT.shape, model.config.hidden_size, requires_grad=True)
    model(inputs_embeds=states).logits.sum().backward()


def _call(model: Any, params: Any) -> None:
    said(model, params)


HISTORIES = {
    "nothing": _nothing,
    "a forward": _forward,
    "a no_grad forward": _no_grad,
    "a backward": _backward,
    "a call": _call,
}
for (what, before), reshard, early in itertools.product(
    HISTORIES.items(), (True, False), (True, False)
):
    name = f"root wrapped, after {what}{', resharded' * reshard}{', rows made before' * early}"

    @RECIPES.recipe(name, before=before, reshard=reshard, early=early)
    def root_wrapped(before: Any, reshard: bool, early: bool) -> dict[str, float]:
        model, params, truth = made()
        shard(model, reshard_after_forward=reshard)
        params = params if early else again(model, params)
        before(model, params)
        return stepped(model, params, truth)


@RECIPES.recipe("untied")
def untied() -> dict[str, float]:
    model, params, truth = made(tie=False)
    return stepped(shard(model), params, truth)


@RECIPES.recipe("embedding ignored")
def ignored() -> dict[str, float]:
    model, params, truth = made()
    shard(model, ignored_params={model.get_input_embeddings().weight})
    return stepped(model, params, truth)


@RECIPES.recipe("backbone only", early=True)
@RECIPES.recipe("backbone only, untied, rows made after", early=False)
def backbone(early: bool) -> dict[str, float]:
    model, params, truth = made(tie=early)
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    fully_shard(model.model, mesh=mesh)
    return stepped(model, params if early else again(model, params), truth)


@RECIPES.recipe("backbone only, tied, rows made after")
def backbone_late() -> dict[str, float]:
    model, params, _ = made()
    fully_shard(model.model, mesh=init_device_mesh("cpu", (dist.get_world_size(),)))
    return refused(ValueError, "before the model is sharded", lambda: again(model, params))


@RECIPES.recipe("mixed precision")
def mixed_precision() -> dict[str, float]:
    model, params, _ = made()
    other = llama().bfloat16()
    truth = oracle(other, params)
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16)
    model(TEXT)
    shard(model, mp_policy=policy)
    model(TEXT)
    params = again(model, params)
    kept = llama().get_input_embeddings().weight[IDS]
    if not torch.equal(started_originals(params), kept):
        return {"originals": float("inf")}
    out = said(model, params)
    out.loss.backward()
    return {
        f"{name}, of bfloat16": value
        for name, value in compared(out.logits, started(params).grad, truth).items()
    }


def started_originals(params: Any) -> torch.Tensor:
    (originals,) = params.originals.values()
    return originals


@RECIPES.recipe("CPU offload")
def offload() -> dict[str, float]:
    model, params, truth = made()
    return stepped(shard(model, offload_policy=CPUOffloadPolicy(pin_memory=False)), params, truth)


@RECIPES.recipe("transformers' own configuration")
@RECIPES.recipe("transformers' own configuration, untied", tie=False)
def transformers_own(tie: bool = True) -> dict[str, float]:
    params = random_rows(llama(tie=tie), IDS, requires_grad=True)
    truth = oracle(llama(tie=tie), params)
    config = DistributedConfig(fsdp_size=dist.get_world_size())
    model = LlamaForCausalLM.from_pretrained(saved(llama(tie=tie)), distributed_config=config)
    model.eval().requires_grad_(False)
    model(TEXT)
    return stepped(model, again(model, params), truth)


def saved(model: Any) -> str:
    """A folder with the model, the same for all ranks."""
    folder = [tempfile.mkdtemp() if dist.get_rank() == 0 else None]
    dist.broadcast_object_list(folder)
    if dist.get_rank() == 0:
        model.save_pretrained(folder[0])
    dist.barrier()
    return folder[0]


@RECIPES.recipe("accelerate, rows made before", early=True)
@RECIPES.recipe("accelerate, rows made after", early=False)
def accelerated(early: bool) -> dict[str, float]:
    model, params, truth = made()
    model = accelerate_shards(model)
    found = stepped(model, params if early else again(model, params), truth)
    return {**found, "whole": float(not isinstance(model.model.norm.weight, DTensor))}


def accelerate_shards(model: Any) -> Any:
    """By accelerate's FSDP2, which its `prepare` leaves out on CPUs without a word."""
    plugin = accelerate.FullyShardedDataParallelPlugin(
        fsdp_version=2,
        auto_wrap_policy="transformer_based_wrap",
        transformer_cls_names_to_wrap=["LlamaDecoderLayer"],
    )
    accelerator = accelerate.Accelerator(cpu=True)
    accelerator.state.fsdp_plugin = plugin
    return fsdp2_prepare_model(accelerator, model)
