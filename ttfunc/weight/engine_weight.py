"""A patched weight over a parameter that an engine owns: each read is of what was gathered."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ttfunc.engines.ownership import EngineParameters, is_owned, is_zero3, shape_of
from ttfunc.model.beside import lengthened
from ttfunc.torch_distributed_private import fsdp_manages, is_dtensor
from ttfunc.weight.deferred import PatchedWeight
from ttfunc.weight.dtensor_rows import part
from ttfunc.weight.lazy import Lazy, lazy
from ttfunc.weight.placeholder import Reads, matrix_placeholder
from ttfunc.weight.rows import Rows
from ttfunc.weight.source import Source


class Place:
    """Where a parameter of an engine is: in a module, and in the copy that a call runs on.

    Most engines write the gathered weight to the module. Some (transformers' plans) run their own
    code on the copy, and write it there.

    placed: the tensor in both when the call began. kept: the parameter as the engine keeps it.
    """

    def __init__(self, module: nn.Module, attribute: str, engines: EngineParameters) -> None:
        self.module, self.attribute = module, attribute
        self.copy = module  # until the call makes one
        placed: Any = module._parameters.get(attribute)
        self.placed = placed
        self.kept: Any = engines.of(module, attribute, placed)

    @property
    def owned(self) -> bool:
        """Whether an engine owns the parameter."""
        return is_owned(self.module, self.attribute)

    def held(self) -> Tensor | None:
        """The tensor that is there now."""
        here = self.copy._parameters.get(self.attribute)
        if here is self.placed or isinstance(here, Lazy):
            return self.module._parameters.get(self.attribute)
        return here


def owned(weight: PatchedWeight, place: Place, reads: Reads) -> PatchedWeight:
    """The weight over the tensor that a place holds at each read; `reads` notes the reads."""
    source = weight.source
    nan = matrix_placeholder(source.rows, source.base, reads, whole=False)

    def gathered(source: Source, read: bool) -> Source:
        return _by_now(source, place, read=read)

    # Nothing is deferred: a gathered matrix is gone after the call.
    return weight.with_source(
        source._replace(placeholder=nan, memory=None, defers=False, reads=reads, gathered=gathered)
    )


def longer(tensor: Tensor, dimension: int, by: int, place: Place | None) -> Tensor:
    """The tensor with `by` zeros at the end of a dimension; of an engine's, made at each read."""
    if place is None:
        return lengthened(tensor, dimension, by)
    if is_zero3(tensor) and tensor.requires_grad and torch.is_grad_enabled():
        # DeepSpeed's F.linear passes gradients only to a module's own parameters.
        raise RuntimeError(
            f"{by} new tokens, and a {place.attribute} of {type(place.module).__name__} "
            f"{tuple(shape_of(tensor))} with a number for each token, which ZeRO-3 has split and "
            "which is trained: it would get no gradient. Freeze it, leave the head and the "
            "embedding out of the adapter's target_modules, or resize the model before it is "
            "split (model.resize_token_embeddings)."
        )
    shape = list(shape_of(tensor))
    shape[dimension] += by
    return lazy(tensor, tuple(shape), lambda: _longer_by_now(shape, dimension, by, place))


def _by_now(source: Source, place: Place, *, read: bool) -> Source:
    """The source over what the place holds; a question needs to know no more than its dtype."""
    held: Any = place.held()
    there = held is not None and not is_dtensor(held) and held.shape == source.base.shape
    source = source._replace(gathered=None)
    if not read:  # a model's dtype is asked for at any time, of parameters that are not gathered
        return source._replace(base=held.detach()) if there else source
    if is_dtensor(held) and not (fsdp_manages(place.module) and held is place.kept):
        rows = _over_ranks(source)
    elif there:
        rows = source.rows
    elif _is_part(held, place):
        values, ids = _over_ranks(source)
        rows = Rows(*part(values, ids, place.kept))
    else:
        raise _not_gathered(place)
    return source._replace(base=held.detach(), rows=rows)


def _longer_by_now(shape: list[int], dimension: int, by: int, place: Place) -> Tensor:
    held: Any = place.held()
    if is_zero3(held):  # its dictionary gathers what is taken from it in a forward
        held = place.module._parameters[place.attribute]
    if held is None or is_dtensor(held) or held.ndim != len(shape):
        raise _not_gathered(place)
    found = lengthened(held, dimension, by)
    if list(found.shape) != shape:
        raise _not_gathered(place)
    return found


def _not_gathered(place: Place) -> RuntimeError:
    return RuntimeError(
        f"the {place.attribute} of {type(place.module).__name__} is not gathered here: its "
        "engine gathers it while that module runs. Read it in the module's forward, or leave "
        "it out of the sharding."
    )


def _over_ranks(source: Source) -> Any:
    if not source.rows.fixed():
        raise RuntimeError(
            "a mixed patch on a matrix that is split over ranks (tensor parallelism). Call the "
            "model separately for each adapter's examples."
        )
    if source.new_tokens():
        raise RuntimeError(
            f"{source.new_tokens()} new tokens for a matrix that is split over ranks (tensor "
            "parallelism), whose logits are split too. Resize the model before it is split: "
            "model.resize_token_embeddings(...)."
        )
    return source.rows


def _is_part(held: Any, place: Place) -> bool:
    """Whether the tensor is this rank's part of the parameter, which a product may use."""
    if held is None or is_dtensor(held) or not is_dtensor(place.kept):
        return False
    if isinstance(place.module, nn.Embedding):  # only its tool knows which tokens are here
        return False
    return bool(held.shape == place.kept.to_local().shape)
