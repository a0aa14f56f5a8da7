"""Recipes of tensor parallelism: torch's `parallelize_module`, and transformers' own plans."""

from __future__ import annotations

import tempfile
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)

from tests.engines.work import (
    IDS,
    TEXT,
    Recipes,
    again,
    compared,
    distance,
    generated,
    made,
    oracle,
    refused,
    said,
    started,
    stepped,
    stepped_as_module,
)
from tests.helpers.llama import llama
from tests.helpers.rows import random_rows
from ttfunc import functional_call, merge, patch, patch_mixed, unmerge

RECIPES = Recipes()


def split(model: Any, head: Any = None, embedding: Any = None) -> Any:
    """The vocabulary of both ends split over the ranks."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    plan = {
        "model.embed_tokens": embedding or RowwiseParallel(input_layouts=Replicate()),
        "lm_head": head or ColwiseParallel(output_layouts=Replicate()),
    }
    return parallelize_module(model, mesh, plan)


@RECIPES.recipe("vocabulary split, logits replicated", tie=True)
@RECIPES.recipe("vocabulary split, logits replicated, untied", tie=False)
def replicated(tie: bool) -> dict[str, float]:
    model, params, truth = made(tie=tie)
    return stepped(split(model), params, truth)


@RECIPES.recipe("untied, rows made after")
def late() -> dict[str, float]:
    model, params, truth = made(tie=False)
    split(model)
    return stepped(model, again(model, params), truth)


@RECIPES.recipe("tied, rows made after")
def late_tied() -> dict[str, float]:
    model, params, _ = made()
    split(model)
    return refused(ValueError, "before the model is sharded", lambda: again(model, params))


@RECIPES.recipe("logits split too")
def split_logits() -> dict[str, float]:
    from torch.distributed.tensor.parallel import loss_parallel

    model, params, truth = made()
    split(model, ColwiseParallel(output_layouts=Shard(-1), use_local_output=False))
    logits = functional_call(model, patch(params), (TEXT,)).logits
    with loss_parallel():
        loss = nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), TEXT[:, 1:].flatten())
        loss.backward()
    return compared(logits, started(params).grad, truth)


@RECIPES.recipe("features split")
def features() -> dict[str, float]:
    model, params, truth = made()
    head = RowwiseParallel(input_layouts=Replicate(), output_layouts=Replicate())
    return stepped(split(model, head, ColwiseParallel(output_layouts=Replicate())), params, truth)


@RECIPES.recipe("a head with a bias", columns=True)
@RECIPES.recipe("a head with a bias, features split", columns=False)
def biased(columns: bool) -> dict[str, float]:
    def model() -> nn.Module:
        torch.manual_seed(0)
        one = nn.Sequential(nn.Embedding(23, 8), nn.Linear(8, 23)).requires_grad_(False)
        one[1].weight = one[0].weight
        return one

    plain, one = model(), model()
    params, rows = (random_rows(m, IDS, requires_grad=True) for m in (plain, one))
    expected = functional_call(plain, patch(params), TEXT)
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    head: Any = ColwiseParallel if columns else RowwiseParallel
    plan = {
        "0": RowwiseParallel(input_layouts=Replicate()),
        "1": head(input_layouts=Replicate(), output_layouts=Replicate()),
    }
    parallelize_module(one, mesh, plan)
    found = functional_call(one, patch(rows), TEXT)
    for logits in (expected, found):
        logits.square().mean().backward()
    return compared(found, started(rows).grad, (expected.detach(), started(params).grad))


@RECIPES.recipe("sequence parallel")
def sequence_parallel() -> dict[str, float]:
    def model() -> nn.Module:
        torch.manual_seed(0)
        ends = nn.Embedding(23, 8), nn.Linear(8, 23, bias=False)
        ends[1].weight = ends[0].weight
        return nn.Sequential(ends[0], nn.LayerNorm(8), ends[1]).requires_grad_(False)

    plain, one = model(), model()
    params, rows = (random_rows(m, IDS, requires_grad=True) for m in (plain, one))
    expected = functional_call(plain, patch(params), TEXT)
    plan = {
        "0": RowwiseParallel(input_layouts=Replicate(), output_layouts=Shard(1)),
        "1": SequenceParallel(),
        "2": ColwiseParallel(input_layouts=Shard(1), output_layouts=Replicate()),
    }
    parallelize_module(one, init_device_mesh("cpu", (dist.get_world_size(),)), plan)
    found = functional_call(one, patch(rows), TEXT)
    for logits in (expected, found):
        logits.square().mean().backward()
    return compared(found, started(rows).grad, (expected.detach(), started(params).grad))


@RECIPES.recipe("torch.func.grad")
def func_grad() -> dict[str, float]:
    model, params, _ = made()
    split(model)
    return refused(
        RuntimeError,
        "loss.backward()",
        lambda: torch.func.grad(lambda p: said(model, p).loss)(params),
    )


@RECIPES.recipe("new tokens")
def grown() -> dict[str, float]:
    model = llama()
    params = random_rows(model, [23], grow=True)
    split(model)
    return refused(RuntimeError, "Resize the model before it is split", lambda: said(model, params))


@RECIPES.recipe("an adapter for each example")
def mixed() -> dict[str, float]:
    model, params, _ = made()
    split(model)
    weights = patch_mixed([params], [0, -1])
    return refused(
        RuntimeError,
        "separately for each adapter",
        lambda: functional_call(model, weights, (TEXT,)),
    )


@RECIPES.recipe("deferred logits")
def deferred() -> dict[str, float]:
    model, params, truth = made()
    split(model)
    weights = patch(params, deferred_logits=True)
    out = functional_call(model, weights, kwargs={"input_ids": TEXT, "labels": TEXT})
    out.loss.backward()
    return compared(out.logits, started(params).grad, truth)


@RECIPES.recipe("a TokenModule over it")
def module() -> dict[str, float]:
    model, params, truth = made()
    return stepped_as_module(split(model), params, truth)


@RECIPES.recipe("generate")
def generate() -> dict[str, float]:
    return generated(llama(), split)


@RECIPES.recipe("merge and unmerge of a sharded state dict")
def merged() -> dict[str, float]:
    model, params, _ = made()
    split(model)
    before = model.state_dict()
    after, truth = merge(before, params), merge(llama().state_dict(), params)
    wrong = [
        n
        for n in params.specs["model.embed_tokens.weight"].names
        if not torch.equal(after[n].full_tensor(), truth[n])
    ]
    back = unmerge(after, params)
    wrong += [
        n
        for n in before
        if isinstance(before[n], DTensor)
        and not torch.equal(back[n].to_local(), before[n].to_local())
    ]
    return {"tensors": float(len(wrong))}


@RECIPES.recipe("transformers' tp_plan", grad=True)
@RECIPES.recipe("transformers' tp_plan, no_grad", grad=False)
@RECIPES.recipe("transformers' tp_plan, untied", tie=False)
def transformers_plan(grad: bool = True, tie: bool = True) -> dict[str, float]:
    from transformers import LlamaForCausalLM
    from transformers.distributed import DistributedConfig

    options = {"tie": tie, "num_key_value_heads": 2}
    params = random_rows(llama(**options), IDS, requires_grad=True)
    truth = oracle(llama(**options), params)
    folder = [tempfile.mkdtemp() if dist.get_rank() == 0 else None]
    dist.broadcast_object_list(folder)
    if dist.get_rank() == 0:
        llama(**options).save_pretrained(folder[0])
    dist.barrier()
    model = LlamaForCausalLM.from_pretrained(
        folder[0], distributed_config=DistributedConfig(tp_size=dist.get_world_size())
    )
    model.eval().requires_grad_(False)
    late = again(model, params)
    if not grad:
        with torch.no_grad():
            return {"logits": distance(said(model, late).logits, truth[0])}
    return stepped(model, late, truth)
