"""Rows that had no effect: the call did not read their matrix, or made no logits for them."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import Any
from weakref import WeakSet

from torch import Tensor, nn

from ttfunc.call.matrices import is_patch
from ttfunc.call.swaps import Swap
from ttfunc.model.matrix import Matrix
from ttfunc.weight.deferred import PatchedWeight

# Each is warned of once: matrices that were not looked up, because the caller gave embeddings; and
# models that make no logits for their new tokens.
_LEFT_OUT: WeakSet[Matrix] = WeakSet()
_SILENT: WeakSet[nn.Module] = WeakSet()
_CALLER = 4  # frames up to the one that called functional_call


def check_read(model: nn.Module, swaps: Sequence[Swap], kwargs: Mapping[str, Any]) -> None:
    """Raise RuntimeError if a call read no patched matrix; warn if it read some and not others.

    A call with embeddings as its input looks no token up. Then an unread input matrix is no error,
    and one warning for each matrix says that its rows had no effect there.
    """
    embeddings = _embeddings_in(kwargs)
    unread: dict[tuple[str, ...], None] = {}
    read = False
    for swap, weight, in_call in _patches(swaps):
        uses = in_call.source.uses()
        for how in uses:
            setattr(weight.source.reads, how, True)
        matrix = weight.source.matrix or swap.matrix
        left_out = bool(embeddings) and uses <= {"product"} and _is_looked_up(swap)
        if left_out and not matrix.looked_up and matrix not in _LEFT_OUT:
            _LEFT_OUT.add(matrix)
            warnings.warn(_left_out(model, matrix, embeddings), stacklevel=_CALLER)
        if left_out or "product" in uses:
            matrix.looked_up = False  # the next call has other embeddings
        read |= left_out or bool(uses)
        if not (left_out or uses):
            unread[swap.matrix.names] = None
    for names in unread:
        if not read:
            raise RuntimeError(_unread(model, names))
        warnings.warn(_unread(model, names), stacklevel=_CALLER)


def check_logits(
    model: nn.Module, swaps: Sequence[Swap], sizes: Mapping[int, int], out: Any, method: Any
) -> None:
    """Warn, once for a model, if a call read new tokens and made no logits for them."""
    grown = [one.source for _, _, one in _patches(swaps) if one.source.new_tokens()]
    uses = set().union(*(source.uses() for source in grown))
    if isinstance(out, Tensor):  # hidden states may be as wide as the matrix was high
        widths = sizes.keys() - {source.base.shape[1] for source in grown}
        is_short = out.ndim > 2 and out.is_floating_point() and out.shape[-1] in widths
    else:
        logits = getattr(out, "logits", None)
        is_short = isinstance(logits, Tensor) and logits.ndim > 1 and logits.shape[-1] in sizes
    is_silent = is_short or (method == "generate" and uses == {"lookup"})
    # `check_read` has warned of a matrix that was not read at all.
    if is_silent and model not in _SILENT and all(source.uses() for source in grown):
        _SILENT.add(model)
        warnings.warn(_silent(model, sizes), stacklevel=_CALLER)


def _patches(swaps: Sequence[Swap]) -> list[tuple[Swap, PatchedWeight, PatchedWeight]]:
    return [
        (swap, swap.weight, swap.in_call)
        for swap in swaps
        if is_patch(swap.weight) and is_patch(swap.in_call)
    ]


def _embeddings_in(kwargs: Mapping[str, Any]) -> str:
    """The name of the argument in which the caller gives embeddings; "" if there is none."""
    given = (name for name, value in kwargs.items() if value is not None)
    return next((name for name in given if name.endswith("inputs_embeds")), "")


def _is_looked_up(swap: Swap) -> bool:
    """Whether an Embedding holds the matrix."""
    return any(isinstance(way[-1], nn.Embedding) for way in swap.ways)


def _unread(model: nn.Module, names: tuple[str, ...]) -> str:
    return (
        f"the call did not read the patched matrix {names}: its rows had no effect. Either this "
        f"{type(model).__name__} does not use the matrix here: choose one that it uses with "
        "init_deltas(targets=...), or call it without this weight. Or it reaches its modules in a "
        "way that a call cannot copy: use torch.func.functional_call, which changes the model "
        "itself during the call."
    )


def _left_out(model: nn.Module, matrix: Matrix, embeddings: str) -> str:
    name = matrix.names[0]
    return (
        f"this {type(model).__name__} was given {embeddings} and looked no token up in {name!r}, "
        "so its rows had no effect at the input. Embeddings that were looked up in the model "
        "itself have the model's own rows. Give token ids, or look them up with the rows: "
        f"TokenModule(model, params).get_input_embeddings()(ids), or "
        f"F.embedding(ids, patch(params)[{name!r}])."
    )


def _silent(model: nn.Module, sizes: Mapping[int, int]) -> str:
    return (
        f"this {type(model).__name__} read a matrix with new tokens, rows from {dict(sizes)}, and "
        "made no logits for them: it can never say one. Its head is of another matrix (rows of "
        "both ends: init_deltas(targets=[...])), or it cuts its logits by a count of its own. If "
        "they are only to be read, all is well."
    )
