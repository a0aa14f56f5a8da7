"""Whether a patch belongs to the model as it is, and what has happened where it does not."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain

import torch
from torch import Tensor, nn

from ttfunc.model.matrix import Matrix
from ttfunc.model.memory import memory_of
from ttfunc.model.owners import is_sharded, shape_of
from ttfunc.torch_private import fsdp_manages, transforms_active
from ttfunc.weight.deferred import PatchedWeight
from ttfunc.weight.owned import Place
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
        if now is tensor and (tensor is known or _is_patched(tensor, source, matrix, memory)):
            known = tensor
            continue
        raise ValueError(
            f"stale patch: the parameter {name!r} that it was made from "
            f"{_what_is_there(now)} in this {type(model).__name__}: "
            f"{_why(model, name, now, source.matrix)}"
        )


def check_owned(
    model: nn.Module, weight: PatchedWeight, matrix: Matrix, places: Sequence[Place]
) -> None:
    """Raise where a patch cannot be right in places that an engine owns."""
    source, made_from = weight.source, matrix.path.model()
    for (name, known), place in zip(matrix.slots, places, strict=True):
        now = place.kept
        # What was sharded since is another tensor, in the same model.
        same = now is known or (not is_sharded(known) and made_from in set(model.modules()))
        if now is None or not same:
            raise ValueError(
                f"stale patch: the parameter {name!r} that it was made from "
                f"{_what_is_there(now)} in this {type(model).__name__}: "
                f"{_why(model, name, now, source.matrix)}"
            )
        if shape_of(now) != source.base.shape:
            raise ValueError(
                f"stale patch: the parameter {name!r} that it was made from has shape "
                f"{tuple(shape_of(now))} now, not {tuple(source.base.shape)}: call "
                "init_deltas on this model."
            )
    if not weight.deferred:
        raise RuntimeError(
            f"patch(params, dense=True) is a copy of {matrix.names}, which an engine has sharded "
            "since then. Leave dense out."
        )
    if torch.compiler.is_dynamo_compiling():
        raise RuntimeError(
            f"an engine owns {matrix.names[0]!r} and gathers it in hooks, which a compiled call "
            "does not follow. Compile the model's blocks (block.compile()), and not the call."
        )
    if transforms_active() and any(
        is_sharded(p.kept) and not fsdp_manages(p.module) for p in places
    ):
        raise RuntimeError(
            f"a torch.func transform over {matrix.names[0]!r}, which is split over ranks: DTensor "
            "and ZeRO-3 have no rules for it, with a patch or without. Use loss.backward() or "
            "torch.autograd.grad."
        )


def _is_patched(tensor: Tensor, source: Source, matrix: Matrix, memory: object) -> bool:
    own = source.matrix
    if not (own is None or own is matrix or any(tensor is one for _, one in own.slots)):
        return False
    return memory is None or memory_of(tensor) == memory


def _what_is_there(now: Tensor | None) -> str:
    if now is None:
        return "is not there"
    return f"is another one, {tuple(now.shape)} in {now.dtype} on {now.device}"


def _why(model: nn.Module, name: str, now: Tensor | None, matrix: Matrix | None) -> str:
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
