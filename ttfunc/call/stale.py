"""Whether a patch belongs to the model as it is, and what has happened where it does not."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain

import torch
from torch import Tensor, nn

from ttfunc.model.matrix import Matrix, is_stand_in
from ttfunc.model.memory import memory_of
from ttfunc.weight.deferred import PatchedWeight
from ttfunc.weight.source import Source


def check_fresh(
    model: nn.Module, matrix: Matrix, held: Sequence[Tensor | None], source: Source
) -> None:
    """Raise ValueError unless each slot of `matrix` still holds the tensor that was patched.

    held: what the model holds in these slots now.
    """
    # Resizing and casting may keep the Parameter and replace its memory. (torch.compile cannot read
    # data pointers. A patch that is made in the compiled function is fresh.)
    memory = None if torch.compiler.is_dynamo_compiling() else source.memory
    known = None
    for (name, tensor), now in zip(matrix.slots, held, strict=True):
        if isinstance(now, PatchedWeight) and now.source.matrix is not None:
            # This calls a copy, inside of another call: the slot holds a weight of the outer call.
            now = next((one for _, one in now.source.matrix.slots if one is tensor), now)
        # torch.export has one stand-in for a tied parameter.
        as_tied = now is held[0] or tensor is not matrix.tensor
        if now is not None and as_tied and _is_traced_of(now, tensor, source, matrix):
            continue
        if now is tensor and (tensor is known or _is_patched(tensor, source, matrix, memory)):
            known = tensor
            continue
        raise ValueError(
            f"stale patch: the parameter {name!r} that it was made from "
            f"{what_is_there(now)} in this {type(model).__name__}: "
            f"{why(model, name, now, source.matrix)}"
        )


def _is_traced_of(now: Tensor, tensor: Tensor, source: Source, matrix: Matrix) -> bool:
    """Whether it stands for the matrix while the model that this belongs to is exported."""
    own = matrix if source.matrix is None else source.matrix
    return is_stand_in(now, tensor) and own.holds(now)


def _is_patched(tensor: Tensor, source: Source, matrix: Matrix, memory: object) -> bool:
    own = source.matrix
    if not (own is None or own is matrix or any(tensor is one for _, one in own.slots)):
        return False
    return memory is None or memory_of(tensor) == memory


def what_is_there(now: Tensor | None) -> str:
    """What a model has in the place of a parameter."""
    if now is None:
        return "is not there"
    return f"is another one, {tuple(now.shape)} in {now.dtype} on {now.device}"


def why(model: nn.Module, name: str, now: Tensor | None, matrix: Matrix | None) -> str:
    """What has happened to a parameter since it was patched, and what to do."""
    if matrix is None:
        return "call patch again."
    named = chain(model.named_parameters(), model.named_buffers())
    others = (other for other, one in named if one is matrix.tensor)
    elsewhere = next((other for other in others if other not in matrix.names), None)
    made_from = matrix.path.model()
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
