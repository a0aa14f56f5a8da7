"""Which weight a call puts into which places of the model: one pass over the given weights."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import chain
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ttfunc.call.known_paths import Model
from ttfunc.call.matrices import is_patch, matrices_of_weights
from ttfunc.call.patch_mixed import check_batch_first
from ttfunc.call.stale import check_fresh, check_owned
from ttfunc.engines.ownership import EngineParameters, engines_at_work, shape_of
from ttfunc.model.beside import Beside, beside
from ttfunc.model.held import held_at, tensor_under, way_to
from ttfunc.model.matrix import Matrix, is_stand_in
from ttfunc.torch_distributed_private import fsdp_manages, is_dtensor
from ttfunc.weight.deferred import PatchedWeight
from ttfunc.weight.engine_weight import Place, longer, owned
from ttfunc.weight.placeholder import Reads


class Swap(NamedTuple):
    """A matrix of the model, or a tensor beside one, and the weight that replaces it in a call.

    weight: as the caller gave it. in_call: a copy of it that notes its own reads, because other
    calls may have the same weight at the same time. names, ways, held: for each place of the matrix
    a name, the modules that lead there, and the tensor there. in_engine: the places that an engine
    owns, each with a weight over the tensor that the engine puts there.
    """

    names: Sequence[str]
    weight: Tensor
    in_call: Tensor
    matrix: Matrix
    ways: Sequence[list[nn.Module]]
    held: Sequence[Tensor]
    in_engine: Sequence[tuple[Place, Tensor]] = ()

    @property
    def is_own(self) -> bool:
        """Whether the weight is a patch of this matrix, and no engine owns the matrix."""
        of_patch = is_patch(self.weight) and self.weight.source.matrix is self.matrix
        return of_patch and not self.in_engine

    def replacements(self) -> dict[int, Tensor]:
        """The weight for each tensor that it replaces, by the tensor's identity."""
        if self.in_engine:
            return {id(place.placed): weight for place, weight in self.in_engine}
        return {id(tensor): self.in_call for tensor in self.held}


def swaps_of(model: nn.Module, weights: Mapping[str, Tensor], at: Model | None) -> list[Swap]:
    """The swaps of a call. at: the model at this call."""
    swaps: dict[str, Swap] = {}
    wanted = {
        name: weight
        for name, weight in weights.items()
        if not (engines_at_work() and _is_gathered_anyway(model, name, weight))
    }
    for name, matrix in matrices_of_weights(model, wanted, at).items():
        weight = weights[name]
        if name in swaps and swaps[name].weight is weight:  # by another name of the same matrix
            continue
        swap = _swap_of(model, name, weight, matrix, weights)
        for one in swap.names:
            first = swaps.setdefault(one, swap).weight
            if first is not weight:
                other = next(known for known, one in weights.items() if one is first)
                raise _given_twice(model, other, name)
    _lengthen_beside(swaps)
    return list({id(swap): swap for swap in swaps.values()}.values())


def _swap_of(
    model: nn.Module, name: str, weight: Tensor, matrix: Matrix, weights: Mapping[str, Tensor]
) -> Swap:
    """The swap of a matrix; raises ValueError for a stale patch, or a weight of another shape."""
    source = weight.source if is_patch(weight) else None
    if source is not None and source.rows.by_example():
        check_batch_first(model)
    names = [one for one, _ in matrix.slots]
    ways = [way_to(model, one) for one in names]
    if is_patch(weight) and engines_at_work():
        engines = EngineParameters()
        attributes = (one.rpartition(".")[2] for one in names)
        places = [Place(way[-1], one, engines) for way, one in zip(ways, attributes, strict=True)]
        if any(place.owned for place in places):
            return _in_engine(model, weight, matrix, ways, places)
    now = [held_at(way, one) for way, one in zip(ways, names, strict=True)]
    if source is not None and source.matrix is not None:
        check_fresh(model, matrix, now, source)
    elif not _fits(weight, matrix.tensor, weights):
        raise ValueError(
            f"the weight for {name!r} has shape {tuple(weight.shape)}, but that of "
            f"{type(model).__name__} has {tuple(matrix.tensor.shape)}. Give one of that shape."
        )
    held = [
        known if one is None else one for one, (_, known) in zip(now, matrix.slots, strict=True)
    ]
    return Swap(names, weight, _in_call(weight, held[0], matrix), matrix, ways, held)


def _in_call(weight: Tensor, held: Tensor, matrix: Matrix) -> Tensor:
    if not is_patch(weight) or torch.compiler.is_dynamo_compiling():
        return weight
    counted = weight.with_own_reads()
    return counted.over(held) if is_stand_in(held, matrix.tensor) else counted


def _in_engine(
    model: nn.Module,
    weight: PatchedWeight,
    matrix: Matrix,
    ways: list[list[nn.Module]],
    places: list[Place],
) -> Swap:
    """The swap of a matrix of which an engine owns a place."""
    check_owned(model, weight, matrix, places)
    # An engine may have put other tensors in the places; the old ones would stay in memory.
    matrix.moved_to([place.kept for place in places])
    reads = Reads()
    shown = [owned(weight, place, reads) for place in places]
    held, both = [place.placed for place in places], list(zip(places, shown, strict=True))
    names = [name for name, _ in matrix.slots]
    return Swap(names, weight, shown[0], matrix, ways, held, both)


def _is_gathered_anyway(model: nn.Module, name: str, weight: Tensor) -> bool:
    """Whether the weight is the model's own parameter, which its engine gathers for the call.

    Raises ValueError for another sharded tensor, because the module runs with a whole one.
    """
    module, held = way_to(model, name)[-1], tensor_under(model, name)
    if held is None or is_patch(weight) or not fsdp_manages(module):
        return False
    if weight is held or weight is EngineParameters().of(module, name.rpartition(".")[2], held):
        return True
    if is_dtensor(weight):
        raise ValueError(
            f"the weight for {name!r} is a DTensor, and {type(module).__name__} runs with a "
            "gathered one. Give the whole tensor (full_tensor()), or leave it out: the model has "
            "its own."
        )
    return False


def hiding(swaps: Iterable[Swap]) -> dict[nn.Module, dict[str, Tensor]]:
    """For each module with parameters of an engine, the attributes that hide these in a call."""
    found: dict[nn.Module, dict[str, Tensor]] = {}
    for place, weight in chain.from_iterable(swap.in_engine for swap in swaps):
        found.setdefault(place.module, {})[place.attribute] = weight
    return found


def sizes_of(weights: Iterable[Tensor]) -> dict[int, int]:
    """For each matrix with new tokens its height without them, and with them."""
    sources = (weight.source for weight in weights if is_patch(weight))
    return {len(source.base): source.height() for source in sources if source.new_tokens()}


def _fits(weight: Tensor, held: Tensor, weights: Mapping[str, Tensor]) -> bool:
    """Whether the weight has the shape of the tensor, or of a bias that is longer by new tokens."""
    if weight.shape == held.shape:
        return True
    longer = (
        (*held.shape[:-1], sizes_of(weights.values()).get(held.shape[-1], -1)) if held.ndim else ()
    )
    return tuple(weight.shape) == longer and held.numel() == held.shape[-1]


def _lengthen_beside(swaps: dict[str, Swap]) -> None:
    """Give tensors with one number per token (a head's bias) zeros for new tokens."""
    made: dict[int, Tensor] = {}  # a tied one goes by several names
    for name, swap in [(name, swap) for name, swap in swaps.items() if is_patch(swap.weight)]:
        source = swap.weight.source  # type: ignore[attr-defined]
        if not source.new_tokens():
            continue
        way = next(
            way for way, (one, _) in zip(swap.ways, swap.matrix.slots, strict=True) if one == name
        )
        for one in beside(way, name, len(source.base)):
            known = swaps.get(one.name)
            tensor = one.tensor if known is None else known.weight
            if shape_of(tensor)[one.dimension] != len(source.base):  # the caller gave a longer one
                continue
            place = _place_beside(one)
            if id(one.tensor) not in made:
                made[id(one.tensor)] = longer(tensor, one.dimension, source.new_tokens(), place)
            weight = made[id(one.tensor)]
            swaps[one.name] = Swap(
                [one.name],
                weight,
                weight,
                swap.matrix,
                [one.way],
                [one.tensor],
                () if place is None else [(place, weight)],
            )


def _place_beside(one: Beside) -> Place | None:
    """The place of a parameter if an engine owns it."""
    attribute = one.name.rpartition(".")[2]
    if not engines_at_work() or attribute not in one.way[-1]._parameters:
        return None
    place = Place(one.way[-1], attribute, EngineParameters())
    return place if place.owned else None


def _given_twice(model: nn.Module, one: str, other: str) -> ValueError:
    return ValueError(
        f"{one!r} and {other!r} are one tied weight of {type(model).__name__}. Give it once: leave "
        "out one of the two. A patch counts for both."
    )
