"""What the library knows of the insides of torch.distributed: DTensor, FSDP2 and FSDP1.

As for torch_private.py, each meaning has its test in tests/test_torch_private.py. The modules of
torch.distributed are slow to import, so they are looked up where they are imported already.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn

# How the attributes of a module begin in which FSDP2 keeps its state, and all modules in that.
ENGINE_STATE = "__composable_api"


def _is_one(value: object, module: str, name: str) -> bool:
    """Whether it is of a class in a module, which is slow to import, and is not imported here."""
    return isinstance(value, getattr(sys.modules.get(module), name, ()))


def is_dtensor(tensor: object) -> bool:
    """Whether this rank may have a part of it alone."""
    return _is_one(tensor, "torch.distributed.tensor", "DTensor")


def offset_of_shard(matrix: Any) -> tuple[int, ...]:
    """Where this rank's part of a DTensor begins, in each dimension."""
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset as local

    return local(matrix.shape, matrix.device_mesh, matrix.placements)[1]


def is_fsdp1(module: nn.Module) -> bool:
    """Whether it keeps its weights in flat parameters, as FSDP2 does not."""
    return _is_one(module, "torch.distributed.fsdp", "FullyShardedDataParallel")


def fsdp_manages(module: nn.Module) -> bool:
    """Whether FSDP manages parameters of this very module; none of a module that it ignores."""
    return bool(module.__dict__.get("_is_fsdp_managed_module", False))


def fsdp_gathered() -> dict[tuple[int, str], Tensor]:
    """The shard of each parameter that FSDP2 has gathered now, by module and attribute."""
    from torch.distributed import _composable_state as composable

    found = {}
    for reference in list(composable._module_state_mapping.values()):
        for group in _fsdp_groups(reference()):
            for one in group.fsdp_params:
                # Before its first call FSDP2 does not know yet what was loaded into the module.
                if one.sharded_state.name != "SHARDED":
                    info = one._module_info
                    found[id(info.module), info.param_name] = one.sharded_param
                    for place in zip(info.shared_modules, info.shared_param_names, strict=True):
                        found[id(place[0]), place[1]] = one.sharded_param
    return found


def _fsdp_groups(state: object) -> Iterable[Any]:
    """The groups of parameters of a module that FSDP2 manages; before torch 2.12 it had one."""
    one = getattr(state, "_fsdp_param_group", None)
    groups: Iterable[Any] = getattr(state, "_fsdp_param_groups", () if one is None else (one,))
    return groups


def share_engine_state(module: nn.Module, copy: nn.Module) -> None:
    """Let FSDP2 find its state of the module for a copy too, as `model.unshard()` needs."""
    if _is_one(module, "torch.distributed.fsdp", "FSDPModule"):
        from torch.distributed import _composable_state as composable

        composable._module_state_mapping[copy] = composable._module_state_mapping[module]
