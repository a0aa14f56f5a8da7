"""Tensors beside a token matrix with a number for each token: biases, and adapters around it."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch.nn.functional as F
from torch import Tensor, nn

from ttfunc.engines.ownership import shape_of
from ttfunc.model.held import held_in, tensors_of, way_to
from ttfunc.model.matrix import Matrix
from ttfunc.model.targets import copied_whole

# For each part of a LoRA the dimension of its tokens; None if it has none.
_OF_LORA = {"lora_B": 0, "lora_embedding_A": 1, "lora_A": None, "lora_embedding_B": None}
# Parts of other adapters that have no number for each token: they act before the product, or on a
# few entries of the matrix.
_WITHOUT = {"lora_E", "ranknum", "lora_magnitude_vector", "oft_R", "oft_embedding_R", "hra_u"}
_WITHOUT |= {"shira_weight", "trainable_tokens_delta", "trainable_tokens_original"}
_LAYERS = re.compile(r"(?<=\.)base_layer\.")


class Beside(NamedTuple):
    """A tensor, its name, the modules from the model to it, and its dimension of the tokens."""

    name: str
    way: list[nn.Module]
    tensor: Tensor
    dimension: int


def beside(way: list[nn.Module], name: str, height: int) -> Iterator[Beside]:
    """The tensors to lengthen by zeros when the matrix at the end of the way gets new tokens.

    height: of the matrix. Raises ValueError for an adapter that cannot be lengthened by zeros.
    """
    yield from biases(way, name, height)
    *parts, attribute = name.split(".")
    weight = way[-1]._parameters.get(attribute)
    wide = weight is not None and shape_of(weight)[-1] == height
    for depth in range(len(way)):
        if parts[depth : depth + 1] == ["base_layer"]:
            yield from _of_adapters(way[: depth + 1], parts[:depth], height, wide)


def biases(way: list[nn.Module], name: str, height: int) -> Iterator[Beside]:
    """The biases of the logits, in the modules that lead to the matrix."""
    parts = name.split(".")[:-1]
    for depth, module in enumerate(way):
        for attribute, tensor in tensors_of(module):
            shape = shape_of(tensor)
            if is_bias(attribute, shape, height):
                full = ".".join((*parts[:depth], attribute))
                yield Beside(full, way[: depth + 1], tensor, len(shape) - 1)


def is_bias(name: str, shape: Sequence[int], height: int) -> bool:
    """Whether a name and a shape are those of a bias of the logits of `height` tokens."""
    return name.endswith("bias") and tuple(shape) in {(height,), (1, height)}


def bias_names(
    shapes: Mapping[str, Sequence[int]],
    matrix: Iterable[str],
    height: int,
    known: Sequence[str] | None = None,
) -> list[str]:
    """The biases in a state dict with these shapes, beside the matrix or above it.

    known: their names in the model, if that is at hand; the state dict may have other names.
    """
    if known is not None and any(name in shapes for name in known):
        return [name for name in known if name in shapes and is_bias(name, shapes[name], height)]
    holders = [name.rpartition(".")[0] + "." for name in matrix]
    last = None if known is None else {name.rpartition(".")[2] for name in known}
    return [
        name
        for name, shape in shapes.items()
        if is_bias(name, shape, height)
        and any(holder.startswith(name[: name.rfind(".") + 1]) for holder in holders)
        and (last is None or name.rpartition(".")[2] in last)
    ]


def check_beside(model: nn.Module, matrix: Matrix) -> None:
    """Raise ValueError if an adapter around the matrix has no place for new tokens."""
    if copied := next((name for name in matrix.names if ".original_module." in name), None):
        whole = copied.partition(".original_module.")[0]
        raise copied_whole(whole, ", and the copy has no rows for new tokens")
    for name, _ in matrix.slots:
        for _ in beside(way_to(model, name), name, matrix.shape[0]):
            pass


def lengthened(tensor: Tensor, dimension: int, by: int) -> Tensor:
    """The tensor with `by` zeros at the end of the dimension, or without its last `-by` numbers."""
    return F.pad(tensor, (*(0, 0) * (tensor.ndim - 1 - dimension), 0, by))


def adapters_in(
    shapes: Mapping[str, Sequence[int]], matrix: Iterable[str], height: int
) -> dict[str, int]:
    """The parts of LoRAs around a matrix in a state dict, each with the dimension of the tokens."""
    around = {name[: one.start()] for name in matrix for one in _LAYERS.finditer(name)}
    found = {}
    for name, shape in shapes.items():
        part = next((name[len(one) :].split(".")[0] for one in around if name.startswith(one)), "")
        dimension = _OF_LORA.get(part)
        if dimension is not None and dimension < len(shape) and shape[dimension] == height:
            found[name] = dimension
    return found


def _of_adapters(
    way: list[nn.Module], names: list[str], height: int, wide: bool
) -> Iterator[Beside]:
    """The parts of adapters in a layer that PEFT has put around another one.

    wide: whether the matrix is as wide as it is high, so that a size alone says nothing.
    """
    layer: Any = way[-1]
    idle = getattr(layer, "merged", False) or getattr(layer, "disable_adapters", False)
    active = () if idle else getattr(layer, "active_adapters", ())
    for one in held_in(layer):
        path, shape = one.name.split("."), shape_of(one.tensor)
        if "base_layer" in path:
            continue  # of the layer within
        dimension = _OF_LORA.get(path[0], -1)
        if dimension is None:
            continue
        full = ".".join((*names, *path))
        if dimension >= 0 and shape[dimension] == height:
            yield Beside(full, [*way, *way_to(layer, one.name)[1:]], one.tensor, dimension)
        elif not set(active).isdisjoint(path) and (
            dimension >= 0 or path[0] not in _WITHOUT or (height in shape and not wide)
        ):
            raise ValueError(
                f"{full!r} {tuple(shape)}, of the adapter around "
                f"{'.'.join((*names, 'base_layer'))!r}, is made for {height} tokens, and new ones "
                "would have no place in it. Leave this layer out of the adapter's target_modules, "
                "merge the adapter, or resize the model (model.resize_token_embeddings) before "
                "the adapter is made, and train rows of tokens that it has."
            )
