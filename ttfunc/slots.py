"""Which places of a model hold what a call gives other weights for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import chain
from typing import NamedTuple, TypeGuard

import torch
from torch import Tensor, nn

from ttfunc.model.targets import Matrix, count_slots, held_under, matrix_of
from ttfunc.names import did_you_mean
from ttfunc.stale import check_fresh
from ttfunc.weight.deferred import PatchedWeight


class Slot(NamedTuple):
    """A place of the model, what it holds, and the weight that is to stand there in a call.

    stand_in: the weight itself, or the same with reads of its own to count: others may share it.
    """

    name: str
    held: Tensor
    weight: Tensor
    stand_in: Tensor
    matrix: Matrix


def find_slots(model: nn.Module, weights: Mapping[str, Tensor]) -> list[Slot]:
    """One for each place of the model that holds one of the weights."""
    slots: dict[str, Slot] = {}
    own: dict[int, Matrix] = {}
    for name, weight in weights.items():
        source = weight.source if is_patch(weight) else None
        matrix = source.matrix if source is not None else None
        if matrix is not None and name in matrix.names:
            own[id(matrix)] = matrix
        else:  # under a name of the caller's own, as in a wrapper of the model
            matrix = matrix_of(model, _named(model, name))
        if source is not None and source.rows.by_example:
            _check_batch_first(model)
        counted = is_patch(weight) and not torch.compiler.is_dynamo_compiling()
        stand_in = weight.unread() if counted else weight  # type: ignore[attr-defined]
        for one, tensor in matrix.slots:
            if source is not None and source.matrix is not None:
                check_fresh(model, one, tensor, source)
            elif weight.shape != tensor.shape:
                raise ValueError(
                    f"the weight for {one!r} has shape {tuple(weight.shape)}, and that of "
                    f"{type(model).__name__} has {tuple(tensor.shape)}."
                )
            now = held_under(model, one)
            slot = Slot(one, tensor if now is None else now, weight, stand_in, matrix)
            if slots.setdefault(one, slot).weight is not weight:
                raise ValueError(
                    f"{name!r} and another of the names {list(weights)} are one tied weight of "
                    f"{type(model).__name__} ({one!r}). Give it once."
                )
    _check_ties(model, [one for matrix in own.values() for one, _ in matrix.slots])
    return list(slots.values())


def _check_ties(model: nn.Module, names: Sequence[str]) -> None:
    if not names or torch.compiler.is_dynamo_compiling():  # which traces no sets of ids
        return
    if count_slots(model, [held_under(model, name) for name in names]) != len(names):
        raise ValueError(
            f"{type(model).__name__} ties {names[0]!r} to more than it did when the parameters "
            "were made. Make them anew with init_deltas after tying the weights."
        )


def _named(model: nn.Module, name: str) -> Tensor:
    current = held_under(model, name)
    if current is None:
        names = [n for n, _ in chain(model.named_parameters(), model.named_buffers())]
        hint = did_you_mean(name, names)
        raise KeyError(f"{type(model).__name__} has no parameter or buffer named {name!r}.{hint}")
    return current


def _check_batch_first(model: nn.Module) -> None:
    if getattr(getattr(model, "config", None), "model_type", None) == "xlnet":
        raise ValueError(
            "a mixed patch needs the examples in the first dimension, and XLNet turns its batch "
            "before it looks tokens up. Call each adapter's examples on their own."
        )


def is_patch(weight: Tensor) -> TypeGuard[PatchedWeight]:
    """Whether it comes from `patch`."""
    return isinstance(weight, PatchedWeight)
