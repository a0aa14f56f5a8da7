"""The reads of a matrix with replaced rows that is split over ranks as a DTensor.

The `(k, D)` values are the same on each rank, and each rank puts the rows of its part of the matrix
there. No rank sends anything of the size of the matrix or the logits that the model would not send
itself. DTensor's own rules sum the gradients of the rows.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ttfunc.rows.token_ids import TokenIndices, with_rows
from ttfunc.torch_distributed_private import is_dtensor, offset_of_shard
from ttfunc.weight.product import cast_like
from ttfunc.weight.product import product as product_here


def lookup(
    values: Tensor, indices: TokenIndices, tokens: Any, base: Any, padding_idx: int | None = None
) -> Tensor:
    """`F.embedding` of `(...)` tokens, a DTensor: `(..., D)`, whole in the last dimension."""
    from torch.distributed.tensor import DTensor, Partial, Replicate

    frozen: Any = F.embedding(tokens, base)
    split = [one if one.is_shard() else Replicate() for one in tokens.placements]
    gradient = [Partial() if one.is_shard() else Replicate() for one in split]
    rows = _on(base.device_mesh, cast_like(values, base)).to_local(grad_placements=gradient)
    hit, row = indices.find(tokens.to_local(), base.device)
    padding_row = None if padding_idx is None else indices.row_of(padding_idx % len(base))
    replaced = F.embedding(row, rows, padding_idx=padding_row)
    frozen = frozen.redistribute(placements=split).to_local()
    found = torch.where(hit.unsqueeze(-1), replaced, frozen)
    looked_up: Tensor = DTensor.from_local(found, base.device_mesh, split, run_check=False)
    return looked_up


def product(
    values: Tensor, indices: TokenIndices, hidden: Any, base: Any, bias: Any = None
) -> Tensor:
    """`F.linear` of `(..., D)` hidden states, a DTensor: `(..., V)`, split as F.linear splits it.

    For each dimension of the mesh: if the base is split by token, so are the logits; if it is split
    by feature, each rank has a partial sum of the logits; if each rank has all of it, the split of
    the logits is the one of the hidden states.
    """
    from torch.distributed.tensor import DTensor

    if not is_dtensor(hidden):
        return F.linear(hidden, base, bias)  # torch's own error
    last = hidden.ndim - 1
    each = [_split(h, b, last) for h, b in zip(hidden.placements, base.placements, strict=True)]
    of_states, of_logits, of_states_grad, of_rows_grad = map(list, zip(*each, strict=True))
    states = hidden.redistribute(placements=of_states).to_local(grad_placements=of_states_grad)
    rows, ids = part(values, indices, base, of_rows_grad)
    partial = any(one.is_partial() for one in of_logits)
    bias_here = None if bias is None or partial else _bias_here(bias, base)
    logits = product_here(states, base.to_local(), rows, bias_here, ids)
    shape = torch.Size((*hidden.shape[:-1], len(base)))
    found: Tensor = DTensor.from_local(
        logits,
        base.device_mesh,
        of_logits,
        run_check=False,
        shape=shape,
        stride=torch.empty(shape, device="meta").stride(),
    )
    return found if bias is None or not partial else found + _on(base.device_mesh, bias)


def materialise(values: Tensor, indices: TokenIndices, base: Any) -> Tensor:
    """The matrix itself, a DTensor like the base; no rank sends anything."""
    rows, ids = part(values, indices, base)
    return like(base, with_rows(base.to_local(), ids.ids_on(base.device), rows))


def part(
    values: Tensor, indices: TokenIndices, base: Any, gradient: Any = None
) -> tuple[Tensor, TokenIndices]:
    """The `(k', D')` rows in this rank's part of the matrix, and their ids counted in that part.

    gradient: how the gradient of these rows is split over the ranks; by default each rank has the
    gradient of its own part.
    """
    from torch.distributed.tensor import Partial

    if gradient is None:
        gradient = [Partial() if _by_token(one) else one for one in base.placements]
    rows = _on(base.device_mesh, cast_like(values, base))
    whole = rows.placements[0]
    across = [whole if one.is_replicate() or _by_token(one) else one for one in base.placements]
    local = rows.redistribute(placements=across).to_local(grad_placements=gradient)
    start = offset_of_shard(base)[0]
    here, ids = indices.within(start, start + len(base.to_local()))
    return local[here], ids


def _split(hidden: Any, base: Any, last: int) -> tuple[Any, Any, Any, Any]:
    """How a product is split in one dimension of a mesh.

    Returns the splits of the states, of the logits, of the states' gradient and of the rows'.
    """
    from torch.distributed.tensor import Partial, Replicate, Shard

    if _by_token(base):  # each rank has some tokens
        return (Replicate(), Shard(last), Partial(), Partial())
    if not base.is_replicate():  # each rank has some features
        return (Shard(last), Partial(), Shard(last), Shard(1))
    if hidden.is_shard() and hidden.dim != last:  # each rank has some positions
        return (hidden, hidden, hidden, Partial())
    return (Replicate(), Replicate(), Replicate(), Replicate())


def _bias_here(bias: Any, base: Any) -> Tensor:
    """The part of a bias that belongs to this rank's part of the matrix."""
    from torch.distributed.tensor import Replicate, Shard

    split = [Shard(0) if _by_token(one) else Replicate() for one in base.placements]
    local: Tensor = _on(base.device_mesh, bias).redistribute(placements=split).to_local()
    return local


def _on(mesh: Any, tensor: Any) -> Any:
    """The tensor as a DTensor; of a plain one each rank has all."""
    from torch.distributed.tensor import DTensor, Replicate

    if is_dtensor(tensor):
        return tensor
    return DTensor.from_local(tensor, mesh, [Replicate()] * mesh.ndim, run_check=False)


def _by_token(placement: Any) -> bool:
    """Whether each rank has some rows of the matrix."""
    # FSDP2 over tensor parallelism has shards of its own kind, for which is_shard() is false.
    return bool(not placement.is_replicate() and placement.dim == 0)


def like(matrix: Any, local: Tensor) -> Tensor:
    """A DTensor with this rank's part `local`, split as `matrix` is."""
    from torch.distributed.tensor import DTensor

    return DTensor.from_local(
        local,
        matrix.device_mesh,
        matrix.placements,
        run_check=False,
        shape=matrix.shape,
        stride=matrix.stride(),
    )
