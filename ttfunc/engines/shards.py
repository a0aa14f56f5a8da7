"""A matrix of which each rank has a part: its rows, and the means of its columns.

What is moved between ranks for rows are k×D numbers, not the matrix. They are moved as bytes, each
from the one rank that has it, so that every bit arrives.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import compress
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ttfunc.engines.ownership import is_sharded, is_zero3, shape_of
from ttfunc.torch_distributed_private import offset_of_shard


class MeshShard:
    """The part of a `(V, D)` DTensor that is on this rank.

    device: where its ranks send. groups: of all ranks that have a part, or a copy of one.
    parts: the groups in which the parts differ.
    """

    def __init__(self, matrix: Any) -> None:
        self.matrix, mesh = matrix, matrix.device_mesh
        self.local: Tensor = matrix.to_local()
        self.start, self.column = offset_of_shard(matrix)
        self.device: str | None = mesh.device_type  # the matrix may be offloaded
        self.groups = mesh.get_all_groups()
        split = [not one.is_replicate() for one in matrix.placements]
        self.parts = list(compress(self.groups, split))

    def rows(self, ids: Tensor) -> Tensor:
        """`(k, D)`, with 0 where another rank has the number."""
        height, width = self.local.shape
        found = self.local.new_zeros(len(ids), self.matrix.shape[1])
        here = (ids >= self.start) & (ids < self.start + height)
        columns = slice(self.column, self.column + width)
        found[here, columns] = self.local[ids[here] - self.start]
        return found

    def sums(self, func: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
        """The `(D,)` sums of a function of the numbers here and of the columns that they are in."""
        width = self.local.shape[1]
        columns = torch.arange(self.column, self.column + width, device=self.local.device)
        some = func(self.local, columns).sum(0)
        total = some.new_zeros(self.matrix.shape[1])
        total[columns] = some
        return total

    def whole(self) -> Tensor:
        """The matrix, on each rank."""
        return self.matrix.full_tensor()  # type: ignore[no-any-return]


class ZeroShard:
    """The same of a parameter of ZeRO-3: a stretch of the matrix as one row of numbers."""

    def __init__(self, matrix: Any) -> None:
        part = matrix.ds_tensor
        if part is None or part.numel() == 0:
            raise RuntimeError(
                "ZeRO-3 keeps this matrix where it cannot be read from here (on NVMe?). Make the "
                "parameters before deepspeed.initialize, or gather it: "
                "deepspeed.zero.GatheredParameters."
            )
        group, self.shape = matrix.ds_process_group, matrix.ds_shape
        self.groups = self.parts = [group]
        self.device = None  # wherever the numbers are
        self.start = dist.get_rank(group) * part.ds_numel
        # The last part is filled up to the size of the others.
        size = max(0, min(part.ds_numel, math.prod(self.shape) - self.start))
        self.part = part
        self.local: Tensor = part.data.flatten()[:size]

    def rows(self, ids: Tensor) -> Tensor:
        places = ids.unsqueeze(1) * self.shape[1] + torch.arange(self.shape[1], device=ids.device)
        here = (places >= self.start) & (places < self.start + len(self.local))
        found = self.local.new_zeros(places.shape)
        found[here] = self.local[places[here] - self.start]
        return found

    def sums(self, func: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
        places = torch.arange(self.start, self.start + len(self.local), device=self.local.device)
        columns = places % self.shape[1]
        some = func(self.local, columns)
        return some.new_zeros(self.shape[1]).index_add(0, columns, some)

    def whole(self) -> Tensor:
        (group,) = self.groups
        parts = [torch.empty_like(self.part.data) for _ in range(dist.get_world_size(group))]
        dist.all_gather(parts, self.part.data, group=group)
        flat = torch.cat(parts).flatten()[: math.prod(self.shape)]
        return flat.view(*self.shape)


def _shard(matrix: Tensor) -> MeshShard | ZeroShard:
    return ZeroShard(matrix) if is_zero3(matrix) else MeshShard(matrix)


def _added(shard: MeshShard | ZeroShard, tensor: Tensor) -> Tensor:
    """The sum over the ranks that have different parts, on the tensor's own device."""
    # Not as a DTensor, which knows no transform.
    total = tensor.to(device=shard.device, copy=True)
    for group in shard.parts:
        dist.all_reduce(total, group=group)
    return total.to(tensor.device)


def rows_at(matrix: Tensor, ids: Tensor) -> Tensor:
    """The `(k, D)` rows of a matrix, bit for bit and the same on each rank, without a graph."""
    if not is_sharded(matrix):
        return matrix.detach().index_select(0, ids)
    with torch.no_grad():
        shard = _shard(matrix)
        rows = shard.rows(ids).contiguous()
        return _added(shard, rows.view(torch.uint8)).view(rows.dtype).view(rows.shape)


def rows_or_zeros(matrix: Tensor, ids: Tensor) -> Tensor:
    """The same, with zeros for ids past the end, which are new tokens."""
    height = shape_of(matrix)[0]
    rows, new = rows_at(matrix, ids.clamp(max=height - 1)), (ids >= height).unsqueeze(-1)
    if rows.element_size() > 1:
        return rows.masked_fill(new, 0)
    # masked_fill does not support 8-bit floats, so their bytes are filled.
    return rows.view(torch.uint8).masked_fill(new, 0).view(rows.dtype)


def mean_of(matrix: Tensor, dtype: torch.dtype) -> Tensor:
    """The `(D,)` mean of the rows."""
    if not is_sharded(matrix):
        return matrix.detach().mean(0, dtype=dtype)
    with torch.no_grad():
        shard = _shard(matrix)
        return _added(shard, shard.sums(lambda part, _: part.to(dtype))) / shape_of(matrix)[0]


def spread_of(matrix: Tensor, dtype: torch.dtype) -> Tensor:
    """The `(D,)` standard deviation of each column."""
    if not is_sharded(matrix):
        # torch has no std for 8-bit floats.
        wide = matrix.to(dtype) if matrix.element_size() == 1 else matrix
        return wide.detach().std(0, correction=0).to(dtype)
    with torch.no_grad():
        shard, mean = _shard(matrix), mean_of(matrix, dtype)
        squares = shard.sums(lambda part, columns: (part.to(dtype) - mean[columns]).square())
        return (_added(shard, squares) / shape_of(matrix)[0]).sqrt()


def of_first_rank(tensor: Tensor, matrix: Tensor) -> Tensor:
    """What the first of the ranks has, for a tensor that is drawn at random on each."""
    if not is_sharded(matrix):
        return tensor
    with torch.no_grad():
        shard = _shard(matrix)
        sent = tensor.contiguous().view(torch.uint8).to(device=shard.device, copy=True)
        for group in shard.groups:  # along each dimension of a mesh, from where it begins
            dist.broadcast(sent, group=group, group_src=0)
        return sent.to(tensor.device).view(tensor.dtype).view(tensor.shape)


def whole_of(matrix: Tensor) -> Tensor:
    """The matrix itself; a sharded one is gathered, which moves all of it."""
    return _shard(matrix).whole().detach() if is_sharded(matrix) else matrix.detach()
