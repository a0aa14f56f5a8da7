"""Whether a patch can be right where an engine owns its parameter; if not, the call is refused.

Nothing here changes the model. What one rank is refused, all are.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ttfunc.call.stale import stale_patch, tied_since
from ttfunc.engines.ownership import is_sharded, is_split_twice, shape_of
from ttfunc.engines.shards import rows_at
from ttfunc.model.matrix import Matrix, count_places
from ttfunc.rows.token_ids import TokenIndices
from ttfunc.torch_distributed_private import fsdp_manages
from ttfunc.torch_private import outside_of_transforms, transforms_active
from ttfunc.weight.deferred import PatchedWeight
from ttfunc.weight.engine_weight import Place
from ttfunc.weight.source import Source


def check_owned(
    model: nn.Module, weight: PatchedWeight, matrix: Matrix, places: Sequence[Place]
) -> None:
    """Raise RuntimeError for a call that engines cannot do, ValueError for a stale patch.

    `matrix` has what was in the places when the parameters were made, or at the last call.
    """
    _check_call(weight, matrix, places)
    for (name, known), place in zip(matrix.slots, places, strict=True):
        _check_fresh(model, name, known, place.kept, weight.source, matrix)
    _check_ties(model, matrix, places)


def _check_call(weight: PatchedWeight, matrix: Matrix, places: Sequence[Place]) -> None:
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


def _check_fresh(
    model: nn.Module, name: str, known: Tensor, now: Tensor | None, source: Source, matrix: Matrix
) -> None:
    # What was sharded since is another tensor, in the same model.
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
    """Whether a matrix has the rows of what it was before; asked once, as that is let go of."""
    indices = source.rows.ids
    if not isinstance(indices, TokenIndices) or known.is_meta:
        return True
    ids = indices.within(0, len(known))[1].on(known.device).ids
    with outside_of_transforms(), torch.no_grad():
        found = rows_at(now, ids.to(now.device))
        expected = known.index_select(0, ids)
        return torch.equal(found.cpu(), expected.to(found.dtype).cpu())


def _check_ties(model: nn.Module, matrix: Matrix, places: Sequence[Place]) -> None:
    """Raise ValueError where the places are not those of one matrix, as far as an engine tells.

    Tensor parallelism, and FSDP2 of some of them alone, make separate parameters of a tied one.
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
