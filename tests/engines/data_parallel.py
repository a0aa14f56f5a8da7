"""Recipes with a batch for each rank."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist

from tests.engines.fsdp import shard
from tests.engines.work import (
    IDS,
    LABELS,
    TEXTS,
    Recipes,
    compared,
    distance,
    edited,
    made,
    started,
)
from tests.helpers.llama import llama
from ttfunc import TokenModule, functional_call, patch

RECIPES = Recipes()


def data_parallel(model: Any, params: Any, wrapped: bool) -> dict[str, float]:
    """A step on unequal batches, against one process with all of them."""
    ranks = dist.get_world_size()
    all_labels = torch.cat(LABELS)
    changed: Any = edited(params, llama())
    whole = changed(input_ids=torch.cat(TEXTS), labels=all_labels)
    whole.loss.backward()
    mine = dist.get_rank() % 2
    truth = whole.logits.detach()[[mine]], changed.get_input_embeddings().weight.grad[IDS]

    labels = LABELS[mine]
    count = (labels[:, 1:] != -100).sum()  # of those that are predicted
    total = count.clone()
    dist.all_reduce(total)
    kwargs = {"input_ids": TEXTS[mine], "labels": labels}
    if wrapped:
        over = torch.nn.parallel.DistributedDataParallel(TokenModule(model, params))
        out = over(**kwargs)
        (out.loss * count / total * ranks).backward()  # DDP takes the mean
        (rows,) = over.parameters()
        return compared(out.logits, rows.grad, truth)
    out = functional_call(model, patch(params), kwargs=kwargs)
    (out.loss * count / total).backward()
    for rows in params.deltas.values():
        dist.all_reduce(rows.grad)
    return compared(out.logits, started(params).grad, truth)


@RECIPES.recipe("plain, all_reduce of the rows' gradient", sharded=False, wrapped=False)
@RECIPES.recipe("plain, DDP over a TokenModule", sharded=False, wrapped=True)
@RECIPES.recipe("FSDP2, all_reduce of the rows' gradient", sharded=True, wrapped=False)
@RECIPES.recipe("FSDP2, DDP over a TokenModule", sharded=True, wrapped=True)
def unequal_batches(sharded: bool, wrapped: bool) -> dict[str, float]:
    model, params, _ = made()
    return data_parallel(shard(model) if sharded else model, params, wrapped)


@RECIPES.recipe("torch.func.grad, all_reduce of the rows' gradient")
def func_grad() -> dict[str, float]:
    model, params, _ = made()
    mine = dist.get_rank()
    kwargs = {"input_ids": TEXTS[mine], "labels": LABELS[mine]}
    count = (LABELS[mine][:, 1:] != -100).sum()
    total = count.clone()
    dist.all_reduce(total)

    def loss(params: Any) -> Any:
        return functional_call(model, patch(params), kwargs=kwargs).loss * count / total

    gradient = started(torch.func.grad(loss)(params))
    dist.all_reduce(gradient)
    changed: Any = edited(params, llama())
    changed(input_ids=torch.cat(TEXTS), labels=torch.cat(LABELS)).loss.backward()
    truth = changed.get_input_embeddings().weight.grad[IDS]
    return {"rows": distance(gradient, truth)}
