"""A matrix with replaced rows, and its reads: `W = base`, then `W[ids] = values`.

The values are `(k, D)`, shared by all examples of a batch, or `(B, k, D)`, rows of each example.
The ids are fixed, or a tensor in which some rows may be unused; ids past the end of the base are
new tokens. Each read gives what the same read of the matrix gives, without a copy of the matrix and
without a gradient of its size.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from ttfunc.rows.token_ids import (
    IdTensor,
    TokenIndices,
    beside,
    first_of_each,
    id_tensor,
    with_rows,
)
from ttfunc.torch_distributed_private import is_dtensor
from ttfunc.torch_private import is_exported, transforms_active
from ttfunc.weight import dtensor_rows
from ttfunc.weight.product import autocast, base_product, cast_like, long_bias, product


class Rows(NamedTuple):
    """Replacement rows, which each read casts to the dtype, and moves to the device, of the base.

    So a patch that is made once reads the current rows throughout training.

    values: `(k, D)`, or `(B, k, D)`. ids: of the k rows. If they are a tensor, unused rows have
    values of 0 (see `rows_at`).
    """

    values: Tensor
    ids: TokenIndices | IdTensor

    def by_example(self) -> bool:
        """Whether each example of a batch has its own rows; the first dimension is the batch."""
        return self.values.ndim == 3

    def fixed(self) -> bool:
        """Whether the ids are known before a call, and all examples share the rows."""
        return isinstance(self.ids, TokenIndices) and not self.by_example()

    def height(self, base: Tensor) -> int:
        """The number of rows of the matrix, with new tokens."""
        return self.ids.height(len(base))

    def new_tokens(self, base: Tensor) -> int:
        """The number of rows that the matrix has and the base does not."""
        return self.height(base) - len(base)

    def lookup(self, tokens: Tensor, base: Tensor, padding_idx: int | None = None) -> Tensor:
        """`F.embedding` of `(...)` integer tokens, or of `(B, ...)`: `(..., D)`.

        `E = W[x]`, then `E[t] = R[i]` where `x[t] = S[i]`. Differentiable with respect to the rows
        alone: `dR[i]` is the sum of `dE[t]` over these t, and 0 for the row of `padding_idx`.

        >>> base, rows = torch.zeros(9, 2), torch.ones(1, 2)
        >>> Rows(rows, TokenIndices((3,))).lookup(torch.tensor([3, 4]), base)
        tensor([[1., 1.],
                [0., 0.]])
        """
        if is_dtensor(base):
            return dtensor_rows.lookup(self.values, self._fixed_ids(), tokens, base, padding_idx)
        if self.by_example():
            _check_examples(self.values.shape[0], tokens, least=2)
        hit, row = self.ids.find(tokens, base.device)
        rows, padding_row = cast_like(self.values, base), None
        if padding_idx is not None and self.fixed():
            padding_row = self._fixed_ids().row_of(padding_idx % len(base))
        elif padding_idx is not None:
            is_padding = self.places(base)[1] == padding_idx % len(base)
            rows = torch.where(is_padding.unsqueeze(-1), rows.detach(), rows)
        if self.by_example():
            count, k, _ = rows.shape
            first = k * torch.arange(count, device=row.device)
            row, rows = row + beside(first, row.ndim), rows.flatten(0, 1)
        # F.embedding raises for an id that is out of range.
        known = torch.where(hit, 0, tokens) if self.new_tokens(base) else tokens
        replaced = F.embedding(row, rows, padding_idx=padding_row)
        return torch.where(hit.unsqueeze(-1), replaced, F.embedding(known, base))

    def product(self, hidden: Tensor, base: Tensor, bias: Tensor | None = None) -> Tensor:
        """`F.linear` of `(..., D)` hidden states, or of `(B, ..., D)`: `(..., V)`.

        `Y = H Wᵀ`, then `Y[:, S] = H Rᵀ`. Differentiable with respect to all but `base`.
        """
        if is_dtensor(base):
            return dtensor_rows.product(self.values, self._fixed_ids(), hidden, base, bias)
        if self.fixed():
            return product(hidden, base, self.values, bias, self._fixed_ids())
        height, rows = self.height(base), autocast(cast_like(self.values, base))
        hidden, base, bias = autocast(hidden), autocast(base), long_bias(bias, base, self.ids)
        used, columns = self.places(base)
        if self.by_example():
            _check_examples(self.values.shape[0], hidden, least=3)
            replaced = hidden.flatten(1, -2) @ rows.mT
            replaced = replaced.view(*hidden.shape[:-1], rows.shape[1])
            used, columns = beside(used, hidden.ndim), beside(columns, hidden.ndim)
        else:
            replaced = hidden @ rows.mT
        if bias is not None:
            replaced = replaced + bias[columns]
        fresh, columns = base_product(hidden, base, bias, height), columns.expand_as(replaced)
        replaced = torch.where(used, replaced, fresh.gather(-1, columns))
        if torch.is_grad_enabled() or transforms_active() or is_exported():
            return fresh.scatter(-1, columns, replaced)
        return fresh.scatter_(-1, columns, replaced)

    def materialise(self, base: Tensor) -> Tensor:
        """The matrix itself. Raises RuntimeError if each example has its own."""
        if is_dtensor(base):
            return dtensor_rows.materialise(self.values, self._fixed_ids(), base)
        rows, columns = self.written(base)
        return with_rows(base, columns, rows, self.new_tokens(base))

    def piece(self, base: Tensor, start: int, stop: int) -> Tensor:
        """The rows of the matrix from `start` to `stop`, `(stop - start, D)`; a copy.

        Raises RuntimeError if each example, or each rank, has its own.
        """
        if is_dtensor(base):
            raise _on_some_ranks(start, stop)
        if self.by_example():
            raise not_mixed()
        if not self.fixed():
            return self.lookup(torch.arange(start, stop, device=base.device), base)
        here, ids = self._fixed_ids().within(start, stop)
        return Rows(self.values[here], ids).materialise(base[start:stop])

    def map(self, func: Callable[[Tensor], Tensor]) -> Rows:
        """The rows after `func`, which acts on each row separately."""
        return self._replace(values=func(self.values))

    def _fixed_ids(self) -> TokenIndices:
        return cast(TokenIndices, self.ids)

    def places(self, base: Tensor) -> tuple[Tensor, Tensor]:
        """Which rows are used, and the column of the logits for each row, all different."""
        if not isinstance(self.ids, TokenIndices):
            return self.ids.used(), self.ids.columns
        ids = self.ids.ids_on(base.device).expand(self.values.shape[:-1])
        return torch.ones_like(ids, dtype=torch.bool), ids

    def written(self, base: Tensor) -> tuple[Tensor, Tensor]:
        """The rows to write to the base to make the matrix, and their ids there.

        For an unused row it is the base's own row.
        """
        if self.by_example():
            raise not_mixed()
        rows = cast_like(self.values, base)
        if self.fixed():
            return rows, self._fixed_ids().ids_on(base.device)
        used, columns = self.places(base)
        there = base[torch.where(used, 0, columns)]
        return torch.where(used.unsqueeze(-1), rows, there), columns


def rows_at(values: Tensor, ids: Tensor, height: int) -> Rows:
    """`(..., k, D)` rows at any `(..., k)` int64 ids, for a matrix of `height` rows, at least k.

    A row is unused if its id is -1 or out of range, or if a row before it has the same id. The
    values of an unused row are set to 0, since NaN times a gradient of 0 would be NaN.
    """
    tensor = id_tensor(first_of_each(ids, height), height)
    return Rows(torch.where(tensor.used().unsqueeze(-1), values, 0), tensor)


def _check_examples(count: int, given: Tensor, least: int) -> None:
    """Raise ValueError for a batch whose first dimension does not have `count` examples."""
    if given.ndim < least or given.shape[0] != count:  # len would be a constant in a graph
        raise ValueError(
            f"a mixed patch for {count} examples was given a batch of shape "
            f"{tuple(given.shape)}: its first dimension must be the examples. If generation "
            "with a decoder repeats the examples (num_beams, num_return_sequences), repeat "
            "the assignment too: torch.as_tensor(assignment).repeat_interleave(n). The encoder "
            "of an encoder-decoder does not repeat them, so that model cannot be mixed there."
        )


def not_mixed() -> RuntimeError:
    """The error for a read of one matrix where each example has its own."""
    return RuntimeError(
        "the model reads its token matrix in a way that cannot be mixed. Only looking up tokens "
        "and multiplying hidden states by the matrix can be. Call the model separately for each "
        "adapter's examples."
    )


def _on_some_ranks(start: int, stop: int) -> RuntimeError:
    return RuntimeError(
        f"the model reads the rows {start} to {stop} of a token matrix that is split over "
        "ranks, and some have none of them. Leave the matrix out of the tensor parallelism."
    )
