"""What a model holds: each parameter and buffer, by each of its names."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import chain
from typing import NamedTuple

from torch import Tensor, nn


class Held(NamedTuple):
    """A parameter or buffer of a model under one of its names, and the module that holds it."""

    name: str
    module: nn.Module
    attribute: str
    tensor: Tensor

    @property
    def place(self) -> tuple[int, str]:
        """The module and its attribute: one place also where the module has two names."""
        return id(self.module), self.attribute

    @property
    def is_saved(self) -> bool:
        """Whether a state dict of the model has it."""
        return self.attribute not in self.module._non_persistent_buffers_set


def held_in(model: nn.Module) -> Iterator[Held]:
    """Every parameter and buffer of the model, under each of its names."""
    for path, module in model.named_modules(remove_duplicate=False):
        for attribute, tensor in tensors_of(module):
            yield Held(f"{path}.{attribute}".lstrip("."), module, attribute, tensor)


def tensors_of(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """The parameters and buffers of the module itself, by attribute."""
    for attribute, tensor in chain(module._parameters.items(), module._buffers.items()):
        if tensor is not None:
            yield attribute, tensor


def names_of(model: nn.Module) -> dict[str, Tensor]:
    """Every parameter and buffer of a model, by each of its names."""
    return {one.name: one.tensor for one in held_in(model)}


def way_to(model: nn.Module, name: str) -> list[nn.Module]:
    """The modules from the model to the one that holds `name`, as far as they exist."""
    way = [model]
    for part in name.split(".")[:-1]:
        module = way[-1]._modules.get(part)
        if module is None:
            break
        way.append(module)
    return way


def held_at(way: list[nn.Module], name: str) -> Tensor | None:
    """The parameter or buffer at the end of the way to its name; None where there is none."""
    if len(way) <= name.count("."):
        return None
    holder, attribute = way[-1], name.rpartition(".")[2]
    parameter = holder._parameters.get(attribute)
    return holder._buffers.get(attribute) if parameter is None else parameter


def tensor_under(model: nn.Module, name: str) -> Tensor | None:
    """The parameter or buffer that the model has under `name` now."""
    return held_at(way_to(model, name), name)
