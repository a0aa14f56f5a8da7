"""The places of a model in which a call puts other weights."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import chain
from typing import Any, NamedTuple, TypeGuard
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from ttfunc.call.engine_checks import check_owned
from ttfunc.call.patch_mixed import check_batch_first
from ttfunc.call.stale import check_fresh
from ttfunc.engines.ownership import Kept, engines_at_work, shape_of
from ttfunc.model.beside import Beside, beside
from ttfunc.model.matrix import (
    Matrix,
    count_same,
    count_slots,
    held_at,
    held_under,
    is_stand_in,
    matrices_of,
    way_to,
)
from ttfunc.model.memory import memory_of
from ttfunc.model.names import did_you_mean, peft_twin
from ttfunc.torch_private import fsdp_manages, is_dtensor, is_traced
from ttfunc.weight.deferred import PatchedWeight
from ttfunc.weight.engine_weight import Place, longer, owned
from ttfunc.weight.reads import Reads
from ttfunc.weight.source import Source


class Slot(NamedTuple):
    """A place of the model, the tensor that it holds, and the weight that a call puts there.

    way: the modules from the model to the place. stand_in: the weight itself, or the same weight
    with a record of its own reads, because other calls may share the weight. place: of a parameter
    that an engine owns; the stand-in is over what is there.
    """

    name: str
    way: list[nn.Module]
    held: Tensor
    weight: Tensor
    stand_in: Tensor
    matrix: Matrix
    place: Place | None = None


def find_slots(model: nn.Module, weights: Mapping[str, Tensor]) -> list[Slot]:
    """One slot for each place of the model in which one of the weights is put."""
    slots: dict[str, Slot] = {}
    others = _searched(model, weights)
    for name, weight in weights.items():
        if name in slots and slots[name].weight is weight:  # by another name of the same matrix
            continue
        if engines_at_work() and not is_patch(weight) and _is_gathered_anyway(model, name, weight):
            continue
        for slot in _slots_of(model, name, weight, weights, others.get(name)):
            first = slots.setdefault(slot.name, slot).weight
            if first is not weight:
                other = next(known for known, one in weights.items() if one is first)
                raise ValueError(
                    f"{other!r} and {name!r} are one tied weight of {type(model).__name__}. Give "
                    "it once: leave out one of the two. A patch counts for both."
                )
    _lengthen_beside(slots)
    found = list(slots.values())
    own = [slot for slot in found if _is_of(slot.weight, slot.matrix) and slot.place is None]
    _check_ties(model, own)
    return found


# The last matrices that were searched for in a model, so that the next step need not search.
_LAST: WeakKeyDictionary[nn.Module, dict[str, Matrix]] = WeakKeyDictionary()


def _searched(model: nn.Module, weights: Mapping[str, Tensor]) -> dict[str, Matrix]:
    """The matrices of the weights that do not come with their own, in this model."""
    tensors: dict[str, Tensor] = {}
    for name, weight in weights.items():
        matrix = weight.source.matrix if is_patch(weight) else None
        known = name
        if matrix is not None and held_under(model, name) is None:
            # The matrix itself, of a model that is in a PeftModel by now, or no longer in one.
            twin = peft_twin(name)
            if held_under(model, twin) is matrix.current:
                known = twin
            elif name in matrix.names and count_slots(model, [matrix.current]):
                # In a layer of an adapter by now.
                tensors[name] = matrix.current
                continue
        if matrix is None or known not in matrix.names:
            # The caller uses another name, as for a wrapper of the model.
            tensors[name] = _named(model, known)
    if not tensors:
        return {}
    if torch.compiler.is_dynamo_compiling() or is_traced():
        return dict(zip(tensors, matrices_of(model, list(tensors.values())), strict=True))
    last = _LAST.get(model)
    if last is None or not _still_there(model, last, tensors):
        last = dict(zip(tensors, matrices_of(model, list(tensors.values())), strict=True))
        _LAST[model] = last
    return last


def _still_there(
    model: nn.Module, last: Mapping[str, Matrix], tensors: Mapping[str, Tensor]
) -> bool:
    """Whether these tensors are in the places where they were last found, and in no others."""
    if last.keys() != tensors.keys():
        return False
    if any(all(one is not tensors[name] for _, one in last[name].slots) for name in last):
        return False
    matrices = {id(matrix): matrix for matrix in last.values()}.values()
    slots = [slot for matrix in matrices for slot in matrix.slots]
    there = all(held_under(model, name) is tensor for name, tensor in slots)
    tied = all(len({memory_of(one) for _, one in matrix.slots}) == 1 for matrix in matrices)
    return there and tied and count_same(model, [tensor for _, tensor in slots]) == len(slots)


def _slots_of(
    model: nn.Module,
    name: str,
    weight: Tensor,
    weights: Mapping[str, Tensor],
    found: Matrix | None,
) -> list[Slot]:
    source = weight.source if is_patch(weight) else None
    # What was not searched for comes with its matrix.
    matrix: Any = found if found is not None or source is None else source.matrix
    if source is not None and source.rows.by_example:
        check_batch_first(model)
    ways = [way_to(model, one) for one, _ in matrix.slots]
    held = [held_at(way, one) for way, (one, _) in zip(ways, matrix.slots, strict=True)]
    if is_patch(weight) and engines_at_work():
        engines, names = Kept(), [one for one, _ in matrix.slots]
        places = [_place(way, one, engines) for way, one in zip(ways, names, strict=True)]
        if any(place.owned for place in places):
            return _owned_slots(model, weight, matrix, ways, places)
    if source is not None and source.matrix is not None:
        check_fresh(model, matrix, held, source)
    elif not _fits(weight, matrix.tensor, weights):
        raise ValueError(
            f"the weight for {name!r} has shape {tuple(weight.shape)}, but that of "
            f"{type(model).__name__} has {tuple(matrix.tensor.shape)}. Give one of that shape."
        )
    counted = is_patch(weight) and not torch.compiler.is_dynamo_compiling()
    stand_in: Any = weight.unread() if counted else weight  # type: ignore[attr-defined]
    if counted and held[0] is not None and is_stand_in(held[0], matrix.tensor):
        stand_in = stand_in.on(held[0])
    return [
        Slot(one, way, tensor if now is None else now, weight, stand_in, matrix)
        for (one, tensor), way, now in zip(matrix.slots, ways, held, strict=True)
    ]


def _place(way: list[nn.Module], name: str, engines: Kept) -> Place:
    return Place(way[-1], name.rpartition(".")[2], engines)


def _owned_slots(
    model: nn.Module,
    weight: PatchedWeight,
    matrix: Matrix,
    ways: list[list[nn.Module]],
    places: list[Place],
) -> list[Slot]:
    """The slots of a matrix of which an engine owns a place."""
    check_owned(model, weight, matrix, places)
    # An engine may have put other tensors in the places; the old ones would stay in memory.
    names = [name for name, _ in matrix.slots]
    matrix.moved_to([place.kept for place in places])
    reads = Reads()
    return [
        Slot(name, way, place.placed, weight, owned(weight, place, reads), matrix, place)
        for name, way, place in zip(names, ways, places, strict=True)
    ]


def _is_gathered_anyway(model: nn.Module, name: str, weight: Tensor) -> bool:
    """Whether it is the model's own parameter, which its engine has gathered in the call.

    Raises ValueError for another one that is sharded: the module runs with a whole one.
    """
    module, held = way_to(model, name)[-1], held_under(model, name)
    if held is None or not fsdp_manages(module):
        return False
    if weight is held or weight is Kept().of(module, name.rpartition(".")[2], held):
        return True
    if is_dtensor(weight):
        raise ValueError(
            f"the weight for {name!r} is a DTensor, and {type(module).__name__} runs with a "
            "gathered one. Give the whole tensor (full_tensor()), or leave it out: the model has "
            "its own."
        )
    return False


def shown_in(slots: Sequence[Slot]) -> dict[nn.Module, dict[str, Tensor]]:
    """For the modules with owned parameters, what is to hide these in a call."""
    shown: dict[nn.Module, dict[str, Tensor]] = {}
    for slot in slots:
        if slot.place is not None:
            shown.setdefault(slot.place.module, {})[slot.place.attribute] = slot.stand_in
    return shown


def sizes_of(slots: Sequence[Slot]) -> dict[int, int]:
    """The heights of the matrices that are another in the call, and what they are there."""
    sources = [slot.weight.source for slot in slots if is_patch(slot.weight)]
    return _grown(sources)


def _grown(sources: Iterable[Source]) -> dict[int, int]:
    return {len(source.base): source.height for source in sources if source.new_tokens}


def _fits(weight: Tensor, held: Tensor, weights: Mapping[str, Tensor]) -> bool:
    """Whether it has the shape of what it is to stand for, or that of a bias for new tokens too."""
    if weight.shape == held.shape:
        return True
    grown = _grown(one.source for one in weights.values() if is_patch(one))
    longer = (*held.shape[:-1], grown.get(held.shape[-1], -1)) if held.ndim else ()
    return tuple(weight.shape) == longer and held.numel() == held.shape[-1]


def _lengthen_beside(slots: dict[str, Slot]) -> None:
    """Where a matrix has new tokens, give what has a number for each token zeros for these."""
    made: dict[int, Tensor] = {}  # a tied one goes by several names
    for slot in [slot for slot in slots.values() if is_patch(slot.weight)]:
        source = slot.weight.source  # type: ignore[attr-defined]
        if not source.new_tokens:
            continue
        for one in beside(slot.way, slot.name, len(source.base)):
            known = slots.get(one.name)
            tensor = one.tensor if known is None else known.weight
            if shape_of(tensor)[one.dimension] != len(source.base):  # as long as it is to be
                continue
            place = _place_beside(one)
            if id(one.tensor) not in made:
                made[id(one.tensor)] = longer(tensor, one.dimension, source.new_tokens, place)
            weight = made[id(one.tensor)]
            slots[one.name] = Slot(
                one.name, one.way, one.tensor, weight, weight, slot.matrix, place
            )


def _place_beside(one: Beside) -> Place | None:
    """The place of a parameter that an engine owns."""
    attribute = one.name.rpartition(".")[2]
    if not engines_at_work() or attribute not in one.way[-1]._parameters:
        return None
    place = Place(one.way[-1], attribute, Kept())
    return place if place.owned else None


def _is_of(weight: Tensor, matrix: Matrix) -> bool:
    return is_patch(weight) and weight.source.matrix is matrix


def _check_ties(model: nn.Module, slots: Sequence[Slot]) -> None:
    if not slots or torch.compiler.is_dynamo_compiling():  # Dynamo traces no sets of ids
        return
    if count_slots(model, [slot.held for slot in slots]) != len(slots):
        raise ValueError(
            f"{type(model).__name__} ties {slots[0].name!r} to more places than it did when the "
            "parameters were made. Make them anew with init_deltas after tying the weights."
        )


def _named(model: nn.Module, name: str) -> Tensor:
    current = held_under(model, name)
    if current is None:
        names = [n for n, _ in chain(model.named_parameters(), model.named_buffers())]
        hint = did_you_mean(name, names)
        raise KeyError(f"{type(model).__name__} has no parameter or buffer named {name!r}.{hint}")
    return current


def is_patch(weight: Tensor) -> TypeGuard[PatchedWeight]:
    """Whether it comes from `patch`."""
    return isinstance(weight, PatchedWeight)
