"""The two reads of a matrix that is split over ranks as a DTensor.

Each rank puts the rows into its own part. Nothing of the size of the matrix or of the logits is
moved that the model would not move itself. DTensor's own rules bring the rows' gradients together.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple, NoReturn

import torch
import torch.nn.functional as F
from torch import Tensor

from ttfunc.rows.token_ids import TokenIndices, with_rows
from ttfunc.torch_private import is_dtensor, offset_of_shard
from ttfunc.weight.placeholder import nan_placeholder
from ttfunc.weight.reads import SharedRows, cast_like
from ttfunc.weight.source import Reads
from ttfunc.weight.unreadable import Unreadable


class ShardedRows(NamedTuple):
    """`(k, D)` rows, the same on each rank, that replace rows of a `(V, D)` DTensor."""

    values: Tensor
    indices: TokenIndices
    grown: int = 0
    by_example: bool = False

    def lookup(self, tokens: Any, base: Any, padding_idx: int | None = None) -> Any:
        """`F.embedding` of `(...)` tokens, a DTensor: `(..., D)`, whole in the last dimension."""
        from torch.distributed.tensor import DTensor, Partial, Replicate

        frozen: Any = F.embedding(tokens, base)
        split = [one if one.is_shard() else Replicate() for one in tokens.placements]
        gradient = [Partial() if one.is_shard() else Replicate() for one in split]
        values = _on(base.device_mesh, cast_like(self.values, base))
        values = values.to_local(grad_placements=gradient)
        local = tokens.to_local()
        hit, row = self.indices.find(local, base.device)
        padding_row = None if padding_idx is None else self.indices.row_of(padding_idx % len(base))
        replaced = F.embedding(row, values, padding_idx=padding_row)
        frozen = frozen.redistribute(placements=split).to_local()
        found = torch.where(hit.unsqueeze(-1), replaced, frozen)
        return DTensor.from_local(found, base.device_mesh, split, run_check=False)

    def product(self, hidden: Any, base: Any, bias: Any = None) -> Any:
        """`F.linear` of `(..., D)` hidden states, a DTensor: `(..., V)`, split as by F.linear."""
        from torch.distributed.tensor import DTensor

        if not is_dtensor(hidden):
            return F.linear(hidden, base, bias)  # torch's own error
        last = hidden.ndim - 1
        split = [
            _split(h, b, last) for h, b in zip(hidden.placements, base.placements, strict=True)
        ]
        states = hidden.redistribute(placements=[one.hidden for one in split])
        states = states.to_local(grad_placements=[one.of_hidden for one in split])
        rows, ids = self.part(base, [one.of_rows for one in split])
        partial = any(one.out.is_partial() for one in split)
        some_bias = None if bias is None or partial else _bias_here(bias, base)
        logits = SharedRows(rows, ids).product(states, base.to_local(), some_bias)
        shape = torch.Size((*hidden.shape[:-1], len(base)))
        found = DTensor.from_local(
            logits,
            base.device_mesh,
            [one.out for one in split],
            run_check=False,
            shape=shape,
            stride=torch.empty(shape, device="meta").stride(),
        )
        return found if bias is None or not partial else found + _on(base.device_mesh, bias)

    def materialise(self, base: Any) -> Any:
        """The matrix itself, a DTensor like the base; nothing is moved."""
        rows, ids = self.part(base)
        return like(base, with_rows(base.to_local(), ids.on(base.device).ids, rows))

    def piece(self, base: Tensor, start: int, stop: int) -> NoReturn:
        """Always raises: a slice of the matrix is on some ranks alone."""
        raise RuntimeError(
            f"the model reads the rows {start} to {stop} of a token matrix that is split over "
            "ranks, and some have none of them. Leave the matrix out of the tensor parallelism."
        )

    def placeholder(self, base: Tensor, reads: Reads) -> Tensor:
        """One NaN, expanded to the shape of the base, that refuses a read and a gradient."""
        values = cast_like(self.values, base)
        ids = self.indices.on(base.device).ids
        return nan_placeholder(Unreadable, values, base, ids, self.grown, reads)

    def map(self, func: Callable[[Tensor], Tensor]) -> ShardedRows:
        """The rows after `func`, which acts on each row separately."""
        return self._replace(values=func(self.values))

    def part(self, base: Any, gradient: Any = None) -> tuple[Tensor, TokenIndices]:
        """What of the rows belongs to this rank's part: `(k', D')`, and where in it.

        gradient: how the gradient of the `(k, D')` rows is split over the ranks; by default each
        has that of its own part.
        """
        from torch.distributed.tensor import Partial

        if gradient is None:
            gradient = [Partial() if _by_token(one) else one for one in base.placements]
        rows = _on(base.device_mesh, cast_like(self.values, base))
        whole = rows.placements[0]
        across = [whole if one.is_replicate() or _by_token(one) else one for one in base.placements]
        local = rows.redistribute(placements=across).to_local(grad_placements=gradient)
        start = offset_of_shard(base)[0]
        places, ids = _here(self.indices, start, start + len(base.to_local()))
        return local[places], ids


class _Split(NamedTuple):
    """In one dimension of a mesh: how a product's parts are split, and their gradients."""

    hidden: Any
    out: Any
    of_hidden: Any
    of_rows: Any


def _split(hidden: Any, base: Any, last: int) -> _Split:
    from torch.distributed.tensor import Partial, Replicate, Shard

    if _by_token(base):  # each rank has some tokens
        return _Split(Replicate(), Shard(last), Partial(), Partial())
    if not base.is_replicate():  # each rank has some features
        return _Split(Shard(last), Partial(), Shard(last), Shard(1))
    if hidden.is_shard() and hidden.dim != last:  # each rank has some positions
        return _Split(hidden, hidden, hidden, Partial())
    return _Split(Replicate(), Replicate(), Replicate(), Replicate())


def _bias_here(bias: Any, base: Any) -> Tensor:
    """The part of a bias that belongs to this rank's part of the matrix."""
    from torch.distributed.tensor import Replicate, Shard

    split = [Shard(0) if _by_token(one) else Replicate() for one in base.placements]
    local: Tensor = _on(base.device_mesh, bias).redistribute(placements=split).to_local()
    return local


def _on(mesh: Any, tensor: Any) -> Any:
    """As a DTensor; each rank has all of a plain one."""
    from torch.distributed.tensor import DTensor, Replicate

    if is_dtensor(tensor):
        return tensor
    return DTensor.from_local(tensor, mesh, [Replicate()] * mesh.ndim, run_check=False)


def _by_token(placement: Any) -> bool:
    """Whether each rank has some rows of the matrix."""
    # FSDP2 over tensor parallelism has shards of its own kind, for which is_shard() is false.
    return bool(not placement.is_replicate() and placement.dim == 0)


def like(matrix: Any, local: Tensor) -> Any:
    """A DTensor split as another is, of which this rank has `local`."""
    from torch.distributed.tensor import DTensor

    return DTensor.from_local(
        local,
        matrix.device_mesh,
        matrix.placements,
        run_check=False,
        shape=matrix.shape,
        stride=matrix.stride(),
    )


@functools.lru_cache(maxsize=64)
def _here(indices: TokenIndices, start: int, stop: int) -> tuple[list[int], TokenIndices]:
    """Which of the ids are in a range, and what they are from its start on."""
    places = [row for row, token in enumerate(indices.ids) if start <= token < stop]
    return places, TokenIndices(tuple(indices.ids[row] - start for row in places))
