"""What a traced graph makes."""

from __future__ import annotations

import torch
from torch import nn

VIEWS = {"detach", "alias", "expand", "mT", "permute", "t", "transpose", "view", "lift_fresh_copy"}


class Of(nn.Module):
    """A function of some modules, as a module: `f(*modules, *args)`."""

    def __init__(self, f, *modules: nn.Module) -> None:
        super().__init__()
        self.f, self.parts = f, nn.ModuleList(modules)

    def forward(self, *args):
        return self.f(*self.parts, *args)


def copies(graph: torch.fx.Graph, shape: tuple[int, int]) -> list[str]:
    """The nodes that make a matrix of this shape, or its transpose, in memory of its own."""
    return [
        node.name
        for node in graph.nodes
        if node.op == "call_function"
        and isinstance(value := node.meta.get("val"), torch.Tensor)
        and tuple(value.shape) in (shape, shape[::-1])
        and node.target._schema.name.partition("::")[2] not in VIEWS
    ]


def constants(exported: torch.export.ExportedProgram, size: int) -> list[str]:
    """The constants of the graph, beside the parameters, that have so many elements or more."""
    return [name for name, one in exported.constants.items() if one.numel() >= size]
