"""A second device for a machine that has none: `pytest --device pretend`.

It computes on the CPU (pretend_device.cpp, which is compiled at the first use), but its tensors are
of another device, so that an operation on a tensor that was left on the CPU raises. That is what
a GPU would do; what a GPU computes, and how fast, it does not show.
"""

from __future__ import annotations

import contextlib
from pathlib import Path
from types import ModuleType

import torch
from torch.utils import cpp_extension


class _Pretend(ModuleType):
    device = contextlib.nullcontext  # there is one

    """What torch.Generator, autocast and torch.random ask of a device's module."""

    def is_available(self) -> bool:
        return True

    def is_initialized(self) -> bool:
        return True

    def device_count(self) -> int:
        return 1

    def current_device(self) -> int:
        return 0

    def _is_in_bad_fork(self) -> bool:
        return False

    def manual_seed_all(self, seed: int) -> None:
        """Its numbers are drawn by the CPU's generator, which has its seed."""

    def get_rng_state(self, device: object = None) -> torch.Tensor:
        return torch.get_rng_state()

    def set_rng_state(self, state: torch.Tensor, device: object = None) -> None:
        torch.set_rng_state(state)

    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.bfloat16, torch.float16]


def register() -> None:
    """Make `torch.device("pretend")` a device."""
    source = Path(__file__).with_suffix(".cpp")
    cpp_extension.load("pretend_device", [str(source)], extra_cflags=["-O1"])
    torch.utils.rename_privateuse1_backend("pretend")
    torch._register_device_module("pretend", _Pretend("pretend"))
    torch.utils.generate_methods_for_privateuse1_backend()
