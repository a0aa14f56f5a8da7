"""Recipes of a pipeline: the embedding on the first stage, its tied head on the last."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.pipelining import PipelineStage, ScheduleGPipe

from tests.engines.work import IDS, TEXT, Recipes, compared, started
from tests.helpers.rows import random_rows
from ttfunc import TokenModule, functional_call, init_deltas, patch

RECIPES = Recipes()


def stages() -> tuple[nn.Sequential, nn.Sequential]:
    """Two stages, which have a copy of the matrix each."""
    torch.manual_seed(0)
    first = nn.Sequential(nn.Embedding(23, 8), nn.Linear(8, 8)).requires_grad_(False)
    last = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 23, bias=False)).requires_grad_(False)
    last[1].weight = nn.Parameter(first[0].weight.detach().clone(), requires_grad=False)
    return first, last


def loss_of(logits: Tensor, labels: Tensor) -> Tensor:
    return nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())


@RECIPES.recipe("two stages, the sum of the rows' gradients")
def two_stages() -> dict[str, float]:
    whole = nn.Sequential(*(module for stage in stages() for module in stage))
    whole[3].weight = whole[0].weight
    params = random_rows(whole, IDS, targets="0", requires_grad=True)
    expected = functional_call(whole, patch(params), TEXT)
    loss_of(expected, TEXT).backward()
    truth = expected.detach(), started(params).grad

    rank = dist.get_rank()
    part, target = stages()[rank], ("0", "1")[rank]
    rows = init_deltas(part, IDS, targets=target, init=started(params).detach().clone())
    module = TokenModule(part, rows)
    stage = PipelineStage(module, rank, 2, torch.device("cpu"))
    schedule = ScheduleGPipe(stage, n_microbatches=2, loss_fn=loss_of)
    logits: Any = truth[0]  # the last stage alone has them
    if rank == 0:
        schedule.step(TEXT)
    else:
        logits = schedule.step(target=TEXT, losses=[])
    (trained,) = module.parameters()
    dist.all_reduce(trained.grad)  # of the lookup here, of the product there
    return compared(logits, trained.grad, truth)
