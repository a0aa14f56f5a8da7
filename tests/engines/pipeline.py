"""Recipes of pipeline stages: the embedding is on the first, and the head that it is tied to on the
last, as a matrix of its own.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.pipelining import PipelineStage, ScheduleGPipe

from tests.engines.work import IDS, TEXT, Recipes, compared, started
from tests.helpers.rows import random_rows
from ttfunc import TokenModule, functional_call, init_deltas, patch

RECIPES = Recipes()


def parts() -> list[nn.Module]:
    """The frozen stages; their ends have the same numbers."""
    torch.manual_seed(0)
    first = nn.Sequential(nn.Embedding(23, 8), nn.Linear(8, 8))
    last = nn.Sequential(nn.Linear(8, 8), nn.GELU(), nn.Linear(8, 23, bias=False))
    last[2].weight = nn.Parameter(first[0].weight.detach().clone())
    return [part.requires_grad_(False) for part in (first, last)]


def loss_of(logits: Tensor, x: Tensor) -> Tensor:
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), x[:, 1:].flatten())


@RECIPES.recipe("GPipe, all_reduce of the rows' gradient")
def gpipe() -> dict[str, float]:
    tied = nn.Sequential(*parts())
    tied[1][2].weight = tied[0][0].weight
    params = random_rows(tied, IDS, requires_grad=True)
    logits = functional_call(tied, patch(params), TEXT)
    loss_of(logits, TEXT).backward()

    rank, here = dist.get_rank(), parts()[dist.get_rank()]
    target = "2" if rank else "0"
    start = started(params).detach().clone()
    module = TokenModule(here, init_deltas(here, IDS, targets=target, init=start))
    stage = PipelineStage(module, rank, 2, torch.device("cpu"))
    schedule = ScheduleGPipe(stage, n_microbatches=2, loss_fn=loss_of)
    if rank == 0:
        schedule.step(TEXT)
        found = logits.detach()  # which are made on the last stage alone
    else:
        found = schedule.step(target=TEXT)
    (rows,) = module.parameters()
    dist.all_reduce(rows.grad)
    return compared(found, rows.grad, (logits.detach(), started(params).grad))
