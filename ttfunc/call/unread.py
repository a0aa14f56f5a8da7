"""Patched matrices that a call has not read, so that their rows had no effect."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import Any
from weakref import WeakSet

from torch import nn

from ttfunc.call.slots import Slot, is_patch
from ttfunc.model.matrix import Matrix, way_to

# The matrices whose rows were left out at the input once, and were told to be.
_TOLD: WeakSet[Matrix] = WeakSet()


def check_read(model: nn.Module, slots: Sequence[Slot], kwargs: Mapping[str, Any]) -> None:
    """Raise RuntimeError where a call has read no patched matrix; warn where it left one unread.

    A call to which the caller gives embeddings looks no token up. Then an unread input matrix is no
    error, and what was left out is said once for each matrix.
    """
    embeddings = _embeddings_in(kwargs)
    unread: dict[tuple[str, ...], None] = {}
    read = False
    for slot in {id(slot.stand_in): slot for slot in slots}.values():
        if not (is_patch(slot.weight) and is_patch(slot.stand_in)):
            continue
        uses = slot.stand_in.source.uses
        for how in uses:
            setattr(slot.weight.source.reads, how, True)
        matrix = slot.weight.source.matrix or slot.matrix
        left_out = bool(embeddings) and uses <= {"product"} and _is_looked_up(model, slot.matrix)
        if left_out and not matrix.looked_up and matrix not in _TOLD:
            _TOLD.add(matrix)
            warnings.warn(_left_out(model, matrix, embeddings), stacklevel=4)
        if left_out or "product" in uses:
            matrix.looked_up = False  # the next call is given other embeddings
        read |= left_out or bool(uses)
        if not (left_out or uses):
            unread[slot.matrix.names] = None
    for names in unread:
        message = (
            f"the call did not read the patched matrix {names}: its rows had no effect. Either "
            f"this {type(model).__name__} does not use the matrix here: choose one that it uses "
            "with init_deltas(targets=...), or call it without this weight. Or it reaches its "
            "modules in a way that a call cannot copy: use torch.func.functional_call, which "
            "changes the model itself during the call."
        )
        if not read:
            raise RuntimeError(message)
        warnings.warn(message, stacklevel=4)


def _embeddings_in(kwargs: Mapping[str, Any]) -> str:
    """The name of the argument in which the caller gives embeddings; "" if there is none."""
    given = (name for name, value in kwargs.items() if value is not None)
    return next((name for name in given if name.endswith("inputs_embeds")), "")


def _is_looked_up(model: nn.Module, matrix: Matrix) -> bool:
    """Whether an Embedding holds the matrix."""
    return any(isinstance(way_to(model, name)[-1], nn.Embedding) for name, _ in matrix.slots)


def _left_out(model: nn.Module, matrix: Matrix, embeddings: str) -> str:
    name = matrix.names[0]
    return (
        f"this {type(model).__name__} was given {embeddings} and looked no token up in {name!r}, "
        "so its rows had no effect at the input. Embeddings that were looked up in the model "
        "itself have the model's own rows. Give token ids, or look them up with the rows: "
        f"TokenModule(model, params).get_input_embeddings()(ids), or "
        f"F.embedding(ids, patch(params)[{name!r}])."
    )
