"""Which matrix of the model each weight of a call belongs to."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import chain
from typing import Any, TypeGuard

from torch import Tensor, nn

from ttfunc.call.known_paths import Model
from ttfunc.model.held import tensor_under
from ttfunc.model.matrix import Matrix, count_places, matrices_of
from ttfunc.model.memory import memory_of
from ttfunc.model.names import did_you_mean, peft_twin
from ttfunc.weight.deferred import PatchedWeight


def is_patch(weight: Any) -> TypeGuard[PatchedWeight]:
    """Whether it comes from `patch`."""
    return isinstance(weight, PatchedWeight)


def matrices_of_weights(
    model: nn.Module, weights: Mapping[str, Tensor], at: Model | None
) -> dict[str, Matrix]:
    """The matrix of each weight: a patch's own, or the model's matrix under the weight's name."""
    found: dict[str, Matrix | None] = {}
    tensors: dict[str, Tensor] = {}
    for name, weight in weights.items():
        own = weight.source.matrix if is_patch(weight) else None
        tensor = _other_tensor(model, name, own)
        found[name] = own
        if tensor is not None:
            tensors[name] = tensor
    if tensors:
        found |= _searched(model, tensors, at)
    return found  # type: ignore[return-value]


def _other_tensor(model: nn.Module, name: str, own: Matrix | None) -> Tensor | None:
    """The tensor that a name stands for in this model; None if it is the weight's own matrix.

    Since the rows were made, PEFT may have wrapped the model or the matrix's module, or may have
    unwrapped it.
    """
    if own is not None and tensor_under(model, name) is None:
        twin = peft_twin(name)
        if tensor_under(model, twin) is own.current:
            name = twin
        elif name in own.names and count_places(model, [own.current]):
            return own.current
    return None if own is not None and name in own.names else _named(model, name)


def _searched(
    model: nn.Module, tensors: Mapping[str, Tensor], at: Model | None
) -> dict[str, Matrix]:
    known = {} if at is None else at.known.matrices
    names = [name for name in tensors if name in known]
    if len(names) == len(tensors) and all(
        _is_still_there(model, known[name], tensor) for name, tensor in tensors.items()
    ):
        return {name: known[name] for name in tensors}
    found = dict(zip(tensors, matrices_of(model, list(tensors.values())), strict=True))
    if at is not None:
        at.known.matrices = found
    return found


def _is_still_there(model: nn.Module, matrix: Matrix, tensor: Tensor) -> bool:
    """Whether the matrix has this tensor, and all of its places are still tied."""
    held = [tensor_under(model, name) for name, _ in matrix.slots]
    known = [one for _, one in matrix.slots]
    return (
        any(one is tensor for one in known)
        and all(one is now for one, now in zip(known, held, strict=True))
        and len(set(map(memory_of, known))) == 1
    )


def _named(model: nn.Module, name: str) -> Tensor:
    current = tensor_under(model, name)
    if current is None:
        names = [n for n, _ in chain(model.named_parameters(), model.named_buffers())]
        hint = did_you_mean(name, names)
        raise KeyError(f"{type(model).__name__} has no parameter or buffer named {name!r}.{hint}")
    return current
