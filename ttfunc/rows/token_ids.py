"""Which rows of a matrix are replaced: token ids that are fixed or a tensor, and their search."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from ttfunc.torch_private import autocast_dtype, is_exported, is_traced, outside_of_modes

# The id of an unused row. No token has it, not even one that is out of range.
_NO_TOKEN = torch.iinfo(torch.int64).min


class IdTable(NamedTuple):
    """Ids on one device, int64, `(k,)` or `(B, k)`, in an order that can be searched.

    ids: in the order of the rows. An unused row has an id that no token has. ordered: the ids,
    ascending. row_of: `(..., k + 1)`, the row of each ordered id; the last entry is any row, for
    tokens that are greater than all ids.
    """

    ids: Tensor
    ordered: Tensor
    row_of: Tensor

    def find(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Whether each token is among the ids, and its row (any row if it is not).

        With `(k,)` ids the tokens have any shape; with `(B, k)` ids they are `(B, ...)`.
        """
        # Static shapes and no table of V entries: a binary search among the k ids.
        if self.ids.ndim == 1:
            row = self.row_of[torch.searchsorted(self.ordered, tokens.long().contiguous())]
            return self.ids[row] == tokens, row
        flat = tokens.flatten(1).long().contiguous()
        row = self.row_of.gather(1, torch.searchsorted(self.ordered, flat))
        hit = self.ids.gather(1, row) == flat
        return hit.view(tokens.shape), row.view(tokens.shape)


class TokenIndices:
    """Distinct token ids in the order given: row i of every `(k, D)` array belongs to id i.

    Two of them are equal if their ids are. The tables for a device are made at its first use and
    kept, so that a training step moves nothing between devices.
    """

    def __init__(self, ids: tuple[int, ...]) -> None:
        self.ids = ids
        self.end = max(ids, default=-1) + 1
        self._hash = hash(ids)
        self._rows = {token: row for row, token in enumerate(ids)}
        self._tables: dict[torch.device, IdTable] = {}

    def __len__(self) -> int:
        return len(self.ids)

    def __eq__(self, other: object) -> bool:
        return self is other or (isinstance(other, TokenIndices) and self.ids == other.ids)

    def __hash__(self) -> int:
        return self._hash

    def __reduce__(self) -> tuple[Any, ...]:
        return TokenIndices, (self.ids,)

    def row_of(self, token: int) -> int | None:
        """The row that belongs to `token`, or None."""
        return self._rows.get(token)

    def height(self, known: int) -> int:
        """How many rows a matrix of `known` rows has with these: new ones follow on its last."""
        return max(known, self.end)

    def start_of_end(self, height: int) -> int | None:
        """The first id, if the ids are all from it on to the end of a matrix of `height` rows."""
        start = self.end - len(self.ids)  # the ids are distinct
        return start if self.end == height and min(self.ids, default=start) == start else None

    def within(self, start: int, stop: int) -> tuple[list[int], TokenIndices]:
        """The rows whose ids are in a range, and these ids counted from its start."""
        return _within(self.ids, start, stop)

    def tables(self, device: torch.device) -> IdTable:
        """The ids on `device`, with the tables that a search among them needs."""
        if is_traced():  # these are fake, or belong to the graph
            return self._made(device)
        if device not in self._tables:
            with outside_of_modes():
                self._tables[device] = self._made(device)
        return self._tables[device]

    def ids_on(self, device: torch.device) -> Tensor:
        """The `(k,)` ids on `device`, int64."""
        return self.tables(device).ids

    def _made(self, device: torch.device) -> IdTable:
        ids = torch.tensor(self.ids, dtype=torch.int64, device="cpu")
        return IdTable(*(one.to(device) for one in id_table(ids)))

    def find(self, tokens: Tensor, device: torch.device) -> tuple[Tensor, Tensor]:
        """Whether each of `(...)` tokens is among the ids, and its row (any row if it is not)."""
        if is_exported():
            return found_among(torch.tensor(self.ids, device=device), tokens)
        return self.tables(device).find(tokens)


def id_table(ids: Tensor) -> IdTable:
    """The table of `(..., k)` ids, which are distinct but for rows that are not used."""
    ordered, order = torch.sort(ids, dim=-1)
    return IdTable(ids, ordered, F.pad(order, (0, 1)))


class IdTensor(NamedTuple):
    """Token ids that are a tensor: `(k,)`, or `(B, k)` where each example of a batch has its own.

    It has the methods of `TokenIndices` that a lookup and a product need. ids: an unused row has an
    id that no token has. columns: the column of the logits that each row belongs to, all different.
    An unused row gets a column that no id names, and the call writes back what is there: an index
    that occurs twice would have a wrong gradient. size: how many rows the matrix has. table: None
    in an exported program, which compares the ids instead of searching them.
    """

    ids: Tensor
    columns: Tensor
    size: int
    table: IdTable | None

    def used(self) -> Tensor:
        """Which rows are used, as a mask."""
        return self.ids >= 0

    def height(self, known: int) -> int:
        """How many rows the matrix has, with new tokens."""
        return self.size

    def find(self, tokens: Tensor, device: torch.device) -> tuple[Tensor, Tensor]:
        """Whether each of `(...)` tokens, or `(B, ...)`, is among the ids, and its row."""
        if self.table is not None and not is_exported():
            return self.table.find(tokens)
        ids = self.ids
        return found_among(ids if ids.ndim == 1 else beside(ids, tokens.ndim + 1), tokens)

    def of(self, examples: Tensor) -> IdTensor:
        """From `(n, k)` ids the `(B, k)` ids of a batch; examples: `(B,)` numbers below n."""
        ids, columns = self.ids.index_select(0, examples), self.columns.index_select(0, examples)
        table = self.table
        if table is not None:
            table = IdTable(*(one.index_select(0, examples) for one in table))
        return IdTensor(ids, columns, self.size, table)


def first_of_each(ids: Tensor, size: int) -> Tensor:
    """`(..., k)` int64 ids, with -1 for ids outside of `range(size)` and for repeated ids.

    >>> first_of_each(torch.tensor([5, -1, 5, 9]), 9)
    tensor([ 5, -1, -1, -1])
    """
    _, first = found_among(ids.unsqueeze(-2), ids)
    is_first = first == torch.arange(ids.shape[-1], device=ids.device)
    return torch.where((ids >= 0) & (ids < size) & is_first, ids, -1)


def id_tensor(ids: Tensor, size: int) -> IdTensor:
    """An IdTensor of `(..., k)` int64 ids for a matrix of at least k rows; -1 is an unused row.

    >>> id_tensor(torch.tensor([5, -1, -1]), 9).columns
    tensor([5, 0, 1])
    """
    used, few = ids >= 0, min(2 * ids.shape[-1], size)
    # At least k of the first 2k columns are free (or all that the ids leave, of fewer columns). The
    # n-th unused row gets the n-th free column. One more entry takes what does not matter.
    nothing = ids.new_zeros(*ids.shape[:-1], few + 1)
    taken = nothing.scatter(-1, torch.where(used & (ids < few), ids, few), 1)[..., :few]
    number = torch.where(taken > 0, few, (1 - taken).cumsum(-1) - 1)
    each = torch.arange(few, device=ids.device).expand_as(number)
    spare = nothing.scatter(-1, number, each).gather(-1, (~used).cumsum(-1).sub(1).clamp(min=0))
    known = torch.where(used, ids, _NO_TOKEN)
    table = None if is_exported() else id_table(known)
    return IdTensor(known, torch.where(used, ids, spare), size, table)


def beside(each: Tensor, ndim: int) -> Tensor:
    """`(B, ...)` as `(B, 1, ..., 1, ...)` with `ndim` dimensions: beside a batch of texts."""
    return each.view(each.shape[0], *[1] * (ndim - each.ndim), *each.shape[1:])


def found_among(ids: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """`IdTable.find` that compares each of `(...)` tokens with `(..., k)` ids.

    Exported programs use it, because ONNX has no binary search.
    """
    same = tokens.unsqueeze(-1) == ids
    return same.any(-1), same.to(torch.int64).argmax(-1)


def union(each: tuple[TokenIndices, ...]) -> TokenIndices:
    """All ids, each once, in the order of their first occurrence."""
    return each[0] if len(each) == 1 else _union(tuple(one.ids for one in each))


_Result = TypeVar("_Result")


def _by_content(func: Callable[..., _Result]) -> Callable[..., _Result]:
    """Cache results by the ids, so that each training step finds tables that are on its device."""
    cached = functools.lru_cache(maxsize=64)(func)
    # Dynamo warns of a cache, and does not use it.
    return lambda *args: (func if torch.compiler.is_dynamo_compiling() else cached)(*args)


@_by_content
def _union(each: tuple[tuple[int, ...], ...]) -> TokenIndices:
    return TokenIndices(tuple(dict.fromkeys(token for ids in each for token in ids)))


@_by_content
def _within(ids: tuple[int, ...], start: int, stop: int) -> tuple[list[int], TokenIndices]:
    here = [row for row, token in enumerate(ids) if start <= token < stop]
    return here, TokenIndices(tuple(ids[row] - start for row in here))


def with_rows(matrix: Tensor, ids: Tensor, rows: Tensor, grown: int = 0) -> Tensor:
    """A copy of `(..., V, D)` with the `(..., k, D)` rows at `ids`; or of `(V,)` with `(k,)`.

    The copy has `grown` rows more, for ids past the end of the matrix.
    """
    with outside_of_autocast(matrix.device):
        if grown:
            matrix = F.pad(matrix, (0, 0, 0, grown))
        return matrix.index_copy(max(matrix.ndim - 2, 0), ids, rows)


@contextlib.contextmanager
def outside_of_autocast(device: torch.device) -> Iterator[None]:
    """Turn autocast off for a copy: it refuses the half-precision dtype that is not its own."""
    if autocast_dtype(device) is None:
        yield
    else:
        with torch.autocast(device.type, enabled=False):
            yield
