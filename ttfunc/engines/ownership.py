"""Parameters that an engine owns: FSDP2's, DTensors of tensor parallelism, and those of ZeRO-3.

An engine keeps a part of such a parameter on each rank, and lets a module have all of it, or a
part, while the module runs. So what the module holds between calls is not what a call reads.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ttfunc.torch_distributed_private import fsdp_gathered, fsdp_manages, is_dtensor, is_fsdp1


def engines_at_work() -> bool:
    """Whether there may be engines at all: they need a process group."""
    return torch.distributed.is_available() and torch.distributed.is_initialized()


def is_zero3(tensor: object) -> bool:
    """Whether DeepSpeed's ZeRO-3 has partitioned it."""
    return hasattr(tensor, "ds_id")


def is_sharded(tensor: object) -> bool:
    """Whether this rank has only a part of it."""
    return is_dtensor(tensor) or is_zero3(tensor)


def is_split_twice(tensor: Any) -> bool:
    """Whether it is split in more than one dimension of a mesh: FSDP2 over tensor parallelism."""
    return is_dtensor(tensor) and sum(not one.is_replicate() for one in tensor.placements) > 1


def is_owned(module: nn.Module, attribute: str) -> bool:
    """Whether an engine owns a parameter of a module, gathered at the moment or not."""
    return is_sharded(module._parameters.get(attribute)) or fsdp_manages(module)


class EngineParameters:
    """Parameters as their engines keep them, also where a module has gathered one at the moment."""

    def __init__(self) -> None:
        self._gathered = fsdp_gathered() if engines_at_work() else {}

    def of(self, module: nn.Module, attribute: str, held: Tensor) -> Tensor:
        """The engine's parameter for the tensor that a module holds; that tensor if it has none."""
        return self._gathered.get((id(module), attribute), held)


def shape_of(tensor: Tensor) -> torch.Size:
    """The shape of the whole parameter."""
    return tensor.ds_shape if is_zero3(tensor) else tensor.shape  # type: ignore[attr-defined]


def base_for_call(tensor: Tensor) -> Tensor:
    """The matrix as the base of a patched weight, detached; NaN of its shape if it is sharded.

    A call reads a sharded matrix through the module that its engine gathers it into.
    """
    if not is_sharded(tensor):
        return tensor.detach()
    nan = torch.full((), torch.nan, dtype=tensor.dtype, device=tensor.device)
    return nan.expand(shape_of(tensor))


def counts_on_module(hook: object) -> bool:
    """Whether a hook keeps counts on its module, for a backward that knows that module alone."""
    return (getattr(hook, "__module__", None) or "").startswith("deepspeed.")


def check_engine(model: nn.Module) -> None:
    """Raise TypeError for a model in an engine that hides the weights from its modules."""
    if any(map(is_fsdp1, model.modules())):
        raise TypeError(
            f"{type(model).__name__} is in FullyShardedDataParallel (FSDP1), which keeps flat "
            "parameters in place of the modules' own. Use FSDP2: torch.distributed.fsdp."
            "fully_shard(model), in accelerate and Trainer fsdp_version=2."
        )
