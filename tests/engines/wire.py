"""Recipes of what the rows move between ranks: bytes, counted in the collectives of a step."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch.distributed as dist
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tests.engines.fsdp import shard
from tests.engines.tensor_parallel import split
from tests.engines.work import IDS, TEXT, Recipes, started
from tests.helpers.llama import llama
from tests.helpers.rows import random_rows
from ttfunc import TokenModule, functional_call, init_deltas, patch

RECIPES = Recipes()
OPERATIONS = {"c10d", "_c10d_functional", "_c10d_functional_autograd"}
NOTHING_MOVED = ("wait", "barrier", "_wrap_tensor")
FLAG = 8  # bytes; DDP tells the ranks whether each takes part


class Wire(TorchDispatchMode):
    """Counts the bytes of the tensors that collectives bring together."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace in OPERATIONS and not any(word in str(func) for word in NOTHING_MOVED):
            sizes = [one.nbytes for one in tree_leaves(args) if isinstance(one, Tensor)]
            largest = max(sizes, default=0)
            self.bytes += largest if largest > FLAG else 0
        return func(*args, **(kwargs or {}))


def moved(call: Callable[[], object]) -> int:
    """Bytes of a call's collectives on this rank."""
    with Wire() as wire:
        call()
    return wire.bytes


def floor(model: Any) -> Callable[[], None]:
    """A step of the frozen model: the output of the embedding alone requires grad."""

    def step() -> None:
        hook = model.get_input_embeddings().register_forward_hook(
            lambda module, args, out: out.detach().requires_grad_()
        )
        model(input_ids=TEXT, labels=TEXT).loss.backward()
        hook.remove()

    return step


def trained(model: Any, params: Any) -> Callable[[], None]:
    def step() -> None:
        kwargs = {"input_ids": TEXT, "labels": TEXT}
        functional_call(model, patch(params), kwargs=kwargs).loss.backward()
        dist.all_reduce(started(params).grad)

    return step


def over(step: Callable[[], None], other: Callable[[], None]) -> int:
    """What a step moves more than another, each after a first one."""
    other()
    base = moved(other)
    step()
    return moved(step) - base


def excess(found: int, params: Any) -> dict[str, float]:
    """What was moved beside the k·D numbers of the rows, in bytes."""
    return {"bytes": float(found - started(params).nbytes)}


@RECIPES.recipe("DDP over a TokenModule: a step")
def ddp() -> dict[str, float]:
    model = llama()
    params = random_rows(model, IDS, requires_grad=True)
    module = DistributedDataParallel(TokenModule(model, params))
    step = lambda: module(input_ids=TEXT, labels=TEXT).loss.backward()  # noqa: E731
    step()  # DDP sends what its buckets are to be, once
    return excess(moved(step), params)


@RECIPES.recipe("FSDP2: a step, over that of the frozen model")
def fsdp() -> dict[str, float]:
    model = llama()
    params = random_rows(model, IDS, requires_grad=True)
    shard(model)
    return excess(over(trained(model, params), floor(model)), params)


@RECIPES.recipe("tensor parallelism: a step, over that of the frozen model")
def tensor_parallel() -> dict[str, float]:
    model = llama()
    params = random_rows(model, IDS, requires_grad=True)
    split(model)

    def step() -> None:  # the gradient is whole on each rank
        kwargs = {"input_ids": TEXT, "labels": TEXT}
        functional_call(model, patch(params), kwargs=kwargs).loss.backward()

    return excess(over(step, floor(model)), params)


@RECIPES.recipe("FSDP2: init_deltas")
def start_on_fsdp() -> dict[str, float]:
    model = shard(llama())
    found: list[Any] = []
    count = moved(lambda: found.append(init_deltas(model, IDS)))
    return excess(count, found[0])


@RECIPES.recipe("tensor parallelism, untied: init_deltas")
def start_on_tensor_parallel() -> dict[str, float]:
    model = split(llama(tie=False))
    found: list[Any] = []
    count = moved(lambda: found.append(init_deltas(model, IDS)))
    return excess(count, found[0])
