"""A head for a loss that multiplies by the weight itself, by chunks, and knows no rows.

Such a loss gives gradients of its hidden states H, `(T, D)`, and of its weight W, `(V, D)`, which
has the size of the matrix. With `H' = (H, 0)` and `W' = (W, E)`, where the `(V, k)` matrix E has a
1 for each trained token, `H' W'ᵀ = H Wᵀ`. The last k columns of the gradient of H' are then that of
the trained tokens' logits, `G_S`, and the gradient of the rows is `G_Sᵀ H`. So W' needs none.
"""

from __future__ import annotations

from typing import Any, TypeGuard

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable

from ttfunc.weight.deferred import PatchedWeight
from ttfunc.weight.lazy import Lazy, lazy
from ttfunc.weight.source import Source


def can_fuse(weight: object) -> TypeGuard[PatchedWeight]:
    """Whether it is a weight whose rows can get their gradient so."""
    # What an engine owns is read where it is gathered, by slices of the weight itself.
    if not isinstance(weight, PatchedWeight) or weight.source.gathered is not None:
        return False
    if not weight.deferred:
        return False
    rows = weight.source.rows
    return rows.fixed() and rows.values.requires_grad and torch.is_grad_enabled()


def longer_states(hidden: Tensor, weight: PatchedWeight) -> Tensor:
    """`(..., D + k)` hidden states: k columns of 0, whose gradient is that of the rows."""
    values = weight.source.rows.values
    return _Longer.apply(hidden, values)  # type: ignore[no-untyped-call, no-any-return]


class _Longer(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, rows: Tensor) -> Tensor:
        ctx.save_for_backward(hidden)
        ctx.dtype = rows.dtype
        return F.pad(hidden, (0, len(rows)))

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, gradient: Tensor) -> tuple[Tensor, Tensor]:
        (hidden,) = ctx.saved_tensors  # type: ignore[attr-defined]
        width = hidden.shape[-1]
        wide = torch.promote_types(hidden.dtype, torch.float32)
        of_logits = gradient[..., width:].flatten(0, -2).to(wide)
        of_rows = of_logits.T @ hidden.flatten(0, -2).to(wide)
        return gradient[..., :width], of_rows.to(ctx.dtype)  # type: ignore[attr-defined]


def longer_weight(weight: PatchedWeight) -> Lazy:
    """The constant `(V, D + k)` weight; a slice of it is made when it is read."""
    source = weight.source
    shape = (len(weight), source.base.shape[1] + len(source.rows.values))
    # The loss reads it again in its backward, when the rows may have been written to.
    rows = source.rows.map(lambda values: values.detach().clone())
    source = source._replace(rows=rows)

    def piece(start: int, stop: int) -> Tensor:
        return _longer_piece(source, start, stop)

    return lazy(source.base, shape, lambda: piece(0, shape[0]), piece)


def _longer_piece(source: Source, start: int, stop: int) -> Tensor:
    """Its rows from `start` to `stop`."""
    source.reads.product = True  # also late: the rows are a copy of their own
    base, values = source.base, source.rows.values
    indices: Any = source.rows.ids
    width, known = base.shape[1], min(stop, len(base))
    here = [row for row, token in enumerate(indices.ids) if start <= token < stop]
    at = torch.tensor([indices.ids[row] - start for row in here], device=base.device)
    with torch.no_grad():
        # In one piece: a part may be half of the matrix, and is made at each read.
        part = base.new_empty(stop - start, width + len(values))
        part[: max(0, known - start), :width] = base[start:known]
        part[:, width:] = 0
        if here:
            part[at, :width] = values[here].to(base.device, base.dtype)
            part[at, torch.tensor(here, device=base.device) + width] = 1
    return part
