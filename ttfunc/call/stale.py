"""What makes rows, a patch and a tie stale, and what has happened where one is.

What is different where an engine owns a parameter stands in engine_checks.py. Copies that a weight
holds of rows are checked at each read, in weight/source.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain

import torch
from torch import Tensor, nn

from ttfunc.engines.ownership import is_sharded
from ttfunc.model.matrix import Matrix, is_stand_in
from ttfunc.model.memory import memory_of, same_memory
from ttfunc.rows.deltas import RowSpec
from ttfunc.weight.deferred import PatchedWeight
from ttfunc.weight.source import Source


def matrix_of_rows(spec: RowSpec) -> Matrix:
    """The matrix of the rows. Raises RuntimeError if there is none, ValueError if it changed."""
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
    # Engines give each place of a tied matrix a parameter of its own. Dynamo, which cannot read
    # where tensors lie, guards that the two are those it has traced.
    unknown = torch.compiler.is_dynamo_compiling() or is_sharded(a) or is_sharded(b)
    return a is b or unknown or same_memory(a, b)


def check_fresh(
    model: nn.Module, matrix: Matrix, now: Sequence[Tensor | None], source: Source
) -> None:
    """Raise ValueError unless each place of `matrix` still holds the tensor that was patched.

    now: what the model holds in these places.
    """
    # Resizing and casting may keep the Parameter and replace its memory. (torch.compile cannot read
    # data pointers. A patch that is made in the compiled function is fresh.)
    memory = None if torch.compiler.is_dynamo_compiling() else source.memory
    known = None
    for (name, tensor), held in zip(matrix.slots, now, strict=True):
        if isinstance(held, PatchedWeight) and held.source.matrix is not None:
            # This calls a copy, inside of another call: the place holds a weight of the outer call.
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
    """Whether it stands for the matrix while the model that this belongs to is exported."""
    own = matrix if source.matrix is None else source.matrix
    return is_stand_in(now, tensor) and own.holds(now)


def _is_patched(tensor: Tensor, source: Source, matrix: Matrix, memory: object) -> bool:
    own = source.matrix
    if not (own is None or own is matrix or any(tensor is one for _, one in own.slots)):
        return False
    return memory is None or memory_of(tensor) == memory


def tied_since(model: nn.Module, name: str) -> ValueError:
    """For a model with more places of a matrix than there were."""
    return ValueError(
        f"{type(model).__name__} ties {name!r} to more places than it did when the parameters were "
        "made. Make them anew with init_deltas after tying the weights."
    )


def stale_patch(
    model: nn.Module, name: str, now: Tensor | None, matrix: Matrix | None
) -> ValueError:
    """For a place that holds another tensor than the one that was patched, with what to do."""
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
