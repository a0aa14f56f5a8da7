"""When rows, a patch or a tie are stale, and the errors that say what has happened.

If an engine owns a parameter, its place holds another tensor at each moment. So the checks compare
what the engine keeps, and refuse calls that engines cannot do. Every rank refuses the same calls.
Nothing here changes the model. Weights that hold copies of rows are checked at each read, in
weight/source.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain

import torch
from torch import Tensor, nn

from ttfunc.engines.ownership import is_sharded, is_split_twice, shape_of
from ttfunc.engines.shards import rows_at
from ttfunc.model.matrix import Matrix, count_places, is_stand_in
from ttfunc.model.memory import memory_of, same_memory
from ttfunc.rows.deltas import RowSpec
from ttfunc.rows.token_ids import TokenIndices
from ttfunc.torch_distributed_private import fsdp_manages
from ttfunc.torch_private import outside_of_transforms, transforms_active
from ttfunc.weight.deferred import PatchedWeight
from ttfunc.weight.engine_weight import Place
from ttfunc.weight.source import Source


def matrix_of_rows(spec: RowSpec) -> Matrix:
    """The matrix of the rows. Raises RuntimeError if they have none, ValueError if it changed."""
    name, matrix = spec.names[0], spec.matrix
    if matrix is None:
        raise RuntimeError(
            f"the parameters for {name!r} belong to no model: pickling leaves the base behind. "
            "Put them on one: optree.tree_map(lambda new, old: old, "
            "init_deltas(model, idx), params)."
        )
    if matrix.shape != spec.shape:
        raise ValueError(
            f"stale parameters: {name!r} had shape {spec.shape} when they were made, and has "
            f"{matrix.shape} now. Make them anew with init_deltas on the model as it is."
        )
    first = matrix.tensor
    if apart := [one for one, other in matrix.slots if not _is_tied(other, first)]:
        raise ValueError(
            f"stale parameters: {apart} shared the memory of {name!r} when the parameters were "
            "made, and no longer do (moving or casting a model separates weights that are not one "
            "Parameter). Tie them again, or make the parameters anew with init_deltas."
        )
    return matrix


def _is_tied(a: Tensor, b: Tensor) -> bool:
    # Engines give each place of a tied matrix its own parameter. Dynamo cannot read where tensors
    # lie in memory, and guards that both are the tensors that it has traced.
    unknown = torch.compiler.is_dynamo_compiling() or is_sharded(a) or is_sharded(b)
    return a is b or unknown or same_memory(a, b)


def check_fresh(
    model: nn.Module, matrix: Matrix, now: Sequence[Tensor | None], source: Source
) -> None:
    """Raise ValueError unless each place of `matrix` still holds the tensor that was patched.

    now: the tensors that the model holds in these places.
    """
    # Resizing and casting may keep the Parameter and replace its memory. torch.compile cannot read
    # data pointers, but a patch that is made in the compiled function is fresh.
    memory = None if torch.compiler.is_dynamo_compiling() else source.memory
    known = None
    for (name, tensor), held in zip(matrix.slots, now, strict=True):
        if isinstance(held, PatchedWeight) and held.source.matrix is not None:
            # A call inside of another one runs on a copy, which holds the outer call's weight.
            held = next((one for _, one in held.source.matrix.slots if one is tensor), held)
        # torch.export has one stand-in for a tied parameter.
        as_tied = held is now[0] or tensor is not matrix.tensor
        if held is not None and as_tied and _is_traced_of(held, tensor, source, matrix):
            continue
        if held is tensor and (tensor is known or _is_patched(tensor, source, matrix, memory)):
            known = tensor
            continue
        raise stale_patch(model, name, held, source.matrix)


def _is_traced_of(now: Tensor, tensor: Tensor, source: Source, matrix: Matrix) -> bool:
    """Whether `now` stands for the matrix because its model is being exported."""
    own = matrix if source.matrix is None else source.matrix
    return is_stand_in(now, tensor) and own.holds(now)


def _is_patched(tensor: Tensor, source: Source, matrix: Matrix, memory: object) -> bool:
    own = source.matrix
    if not (own is None or own is matrix or any(tensor is one for _, one in own.slots)):
        return False
    return memory is None or memory_of(tensor) == memory


def check_owned(
    model: nn.Module, weight: PatchedWeight, matrix: Matrix, places: Sequence[Place]
) -> None:
    """Raise RuntimeError for a call that engines cannot do, ValueError for a stale patch.

    `matrix` has what was in the places when the parameters were made, or at the last call.
    """
    _check_engine(weight, matrix, places)
    for (name, known), place in zip(matrix.slots, places, strict=True):
        _check_kept(model, name, known, place.kept, weight.source, matrix)
    _check_one_matrix(model, matrix, places)


def _check_engine(weight: PatchedWeight, matrix: Matrix, places: Sequence[Place]) -> None:
    name = matrix.names[0]
    if torch.compiler.is_dynamo_compiling():
        raise RuntimeError(
            f"an engine owns {name!r} and gathers it in hooks, which a compiled call does not "
            "follow. Compile the model's blocks (block.compile()), and not the call."
        )
    split = any(is_sharded(one.kept) and not fsdp_manages(one.module) for one in places)
    if split and transforms_active():
        raise RuntimeError(
            f"a torch.func transform over {name!r}, which is split over ranks: DTensor and ZeRO-3 "
            "have no rules for it, with a patch or without. Use loss.backward() or "
            "torch.autograd.grad."
        )
    if not weight.deferred:
        raise RuntimeError(
            f"the patch is a copy of {matrix.names}, which an engine has sharded since then. Leave "
            "dense out, or, for an Embedding with max_norm, leave the matrix out of the sharding."
        )


def _check_kept(
    model: nn.Module, name: str, known: Tensor, now: Tensor | None, source: Source, matrix: Matrix
) -> None:
    # A parameter that was sharded since then is another tensor, in the same model.
    sharded_since = not is_sharded(known) and matrix.model() in set(model.modules())
    if now is None or not (now is known or sharded_since):
        raise stale_patch(model, name, now, source.matrix)
    if shape_of(now) != source.base.shape:
        raise ValueError(
            f"stale patch: the parameter {name!r} that it was made from has shape "
            f"{tuple(shape_of(now))} now, not {tuple(source.base.shape)}: call init_deltas on "
            "this model."
        )
    if is_sharded(now) and not is_sharded(known) and not _has_rows_of(now, known, source):
        raise ValueError(
            f"stale patch: the parameter {name!r} has other values since it is sharded than the "
            "one that the parameters were made from: call init_deltas on this model."
        )


def _has_rows_of(now: Tensor, known: Tensor, source: Source) -> bool:
    """Whether a sharded matrix has the rows that it had before, whose memory is then freed."""
    indices = source.rows.ids
    if not isinstance(indices, TokenIndices) or known.is_meta:
        return True
    ids = indices.within(0, len(known))[1].ids_on(known.device)
    with outside_of_transforms(), torch.no_grad():
        found = rows_at(now, ids.to(now.device))
        expected = known.index_select(0, ids)
        return torch.equal(found.cpu(), expected.to(found.dtype).cpu())


def _check_one_matrix(model: nn.Module, matrix: Matrix, places: Sequence[Place]) -> None:
    """Raise ValueError unless the places hold one matrix, as far as the engine shows it.

    Tensor parallelism makes separate parameters of a tied one; so does FSDP2 of some places alone.
    """
    kept = [place.kept for place in places]
    together = all(fsdp_manages(one.module) and not is_split_twice(one.kept) for one in places)
    if together and any(one is not kept[0] for one in kept):
        raise ValueError(
            f"{matrix.names} were one matrix when the parameters were made, and FSDP2 has more "
            "than one parameter of them. Make them anew with init_deltas on this model."
        )
    if count_places(model, kept) != len(places):
        raise tied_since(model, matrix.slots[0][0])


def tied_since(model: nn.Module, name: str) -> ValueError:
    """The error for a model that has tied a matrix to more places."""
    return ValueError(
        f"{type(model).__name__} ties {name!r} to more places than it did when the parameters were "
        "made. Make them anew with init_deltas after tying the weights."
    )


def stale_patch(
    model: nn.Module, name: str, now: Tensor | None, matrix: Matrix | None
) -> ValueError:
    """The error for a place that holds another tensor than the patched one, and what to do."""
    there = (
        "is not there"
        if now is None
        else f"is another one, {tuple(now.shape)} in {now.dtype} on {now.device}"
    )
    return ValueError(
        f"stale patch: the parameter {name!r} that it was made from {there} in this "
        f"{type(model).__name__}: {_why(model, name, now, matrix)}"
    )


def _why(model: nn.Module, name: str, now: Tensor | None, matrix: Matrix | None) -> str:
    if matrix is None:
        return "call patch again."
    named = chain(model.named_parameters(), model.named_buffers())
    others = (other for other, one in named if one is matrix.tensor)
    elsewhere = next((other for other in others if other not in matrix.names), None)
    made_from = matrix.model()
    if elsewhere is not None:
        return (
            f"here its name is {elsewhere!r}, in a wrapper, a part or a changed form of the model "
            "that the parameters were made from. Call that model, use init_deltas on this one, or "
            f"rename the weight: {{{elsewhere!r}: patch(params)[{name!r}]}}."
        )
    if made_from is not None and made_from is not model:
        return (
            f"this is another model than the {type(made_from).__name__} that the parameters were "
            "made from (for example a deep copy). Call that one, or use init_deltas on this model."
        )
    if isinstance(now, Tensor) and now is matrix.tensor:
        return (
            "it was resized, cast or moved since then. Call patch again. If its shape has changed, "
            "call init_deltas on this model first."
        )
    return (
        "it was replaced, resized, cast or moved since then. Call patch again. If the weights or "
        "their names have changed, call init_deltas on this model first."
    )
