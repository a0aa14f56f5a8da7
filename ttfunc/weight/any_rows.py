"""Rows whose token ids are a tensor too, which only the call knows: one graph serves any of them.

The shapes are static. A row that is not used has the id -1. The products then write, in the column
of a token that no row is for, what is there already.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ttfunc.rows.token_ids import found_among
from ttfunc.torch_private import in_strict_export, is_wrapped
from ttfunc.weight.per_example import (
    check_examples,
    not_mixed,
    places,
    refusing_placeholder,
)
from ttfunc.weight.placeholder import NaNPlaceholder, strict_placeholder
from ttfunc.weight.reads import autocast, cast_like, no_placeholder
from ttfunc.weight.source import Reads


class AnyRows(NamedTuple):
    """Replacement rows for any tokens.

    values: `(k, D)` rows, or `(B, k, D)`: each example of a batch has its own. ids: `(k,)` or
    `(B, k)` int64, their tokens, -1 for a row that is not used. An id past the end of the base is
    none; of rows with one id the first counts.
    """

    values: Tensor
    ids: Tensor

    @property
    def grown(self) -> int:
        """Always 0: how long the logits are does not depend on the ids."""
        return 0

    @property
    def by_example(self) -> bool:
        """Whether each example of a batch has its own."""
        return self.values.ndim == 3

    def lookup(self, tokens: Tensor, base: Tensor, padding_idx: int | None = None) -> Tensor:
        """`F.embedding` of `(...)` tokens, or of `(B, ...)`: `(..., D)`."""
        given = self.ids.to(base.device)
        used, _ = places(given, len(base))
        ids = torch.where(used, given, -1)
        rows = cast_like(self.values, base)
        if self.by_example:
            check_examples(rows.shape[0], tokens, least=2)
            ids = _beside(ids, tokens.ndim + 1)
        hit, row = found_among(ids, tokens)
        if self.by_example:
            first = torch.arange(rows.shape[0], device=row.device) * rows.shape[1]
            row = row + first.view(-1, *[1] * (tokens.ndim - 1))
            rows = rows.flatten(0, 1)
        replaced = F.embedding(row, rows)
        if padding_idx is not None:  # its row gets no gradient
            is_padding = (tokens == padding_idx % len(base)).unsqueeze(-1)
            replaced = torch.where(is_padding, replaced.detach(), replaced)
        return torch.where(hit.unsqueeze(-1), replaced, F.embedding(tokens, base))

    def product(self, hidden: Tensor, base: Tensor, bias: Tensor | None = None) -> Tensor:
        """`F.linear` of `(..., D)` hidden states, or of `(B, ..., D)`: `(..., V)`."""
        hidden, bias = autocast(hidden), None if bias is None else autocast(bias)
        fresh = F.linear(hidden, autocast(base), bias)
        used, place = places(self.ids.to(base.device), len(base))
        # Else what an unused row holds, times a gradient of 0, could be NaN.
        rows = torch.where(used.unsqueeze(-1), autocast(cast_like(self.values, base)), 0)
        some_bias = None if bias is None else bias[place]
        if self.by_example:
            check_examples(rows.shape[0], hidden, least=3)
            columns = hidden.flatten(1, -2) @ rows.mT
            columns = columns.view(*hidden.shape[:-1], rows.shape[1])
            used, place = (_beside(one, hidden.ndim) for one in (used, place))
            if some_bias is not None:
                columns = columns + _beside(some_bias, hidden.ndim)
        else:
            columns = F.linear(hidden, rows, some_bias)
        place = place.expand_as(columns)
        columns = torch.where(used, columns, fresh.gather(-1, place))
        return fresh.scatter(-1, place, columns)

    def materialise(self, base: Tensor) -> Tensor:
        """The matrix itself, `(V, D)`. Raises RuntimeError where each example has its own."""
        if self.by_example:
            raise not_mixed()
        used, place = places(self.ids.to(base.device), len(base))
        rows = torch.where(used.unsqueeze(-1), cast_like(self.values, base), base[place])
        return base.index_copy(0, place, rows)

    def piece(self, base: Tensor, start: int, stop: int) -> Tensor:
        """The rows of the matrix from `start` to `stop`, `(stop - start, D)`; a copy."""
        if self.by_example:
            raise not_mixed()
        return self.lookup(torch.arange(start, stop, device=base.device), base)

    def placeholder(self, base: Tensor, reads: Reads) -> Tensor:
        """One NaN in the shape of `base`; its gradient goes to the rows, or is refused."""
        if self.by_example:
            return refusing_placeholder(self.values, base, self.ids, 0, reads)
        if in_strict_export():
            return strict_placeholder(base)
        if no_placeholder():
            return self.materialise(base)
        values = cast_like(self.values, base)
        operands = (values, base, self.ids, 0, is_wrapped(values), reads)
        return _Placeholder.apply(*operands)  # type: ignore[no-untyped-call, no-any-return]

    def map(self, func: Callable[[Tensor], Tensor]) -> AnyRows:
        """The rows after `func`, which acts on each row separately."""
        return self._replace(values=func(self.values))


class _Placeholder(NaNPlaceholder):
    @staticmethod
    def matrix(rows: Tensor, base: Tensor, ids: Tensor, grown: int) -> Tensor:
        return AnyRows(rows, ids).materialise(base)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        grad = grad.to_dense() if grad.is_sparse else grad
        used, place = places(ctx.ids, ctx.shape[0])
        rows = torch.where(used.unsqueeze(-1), grad.index_select(-2, place), 0)
        return rows, None, None, None, None, None


def _beside(each: Tensor, ndim: int) -> Tensor:
    """`(B, k)` as `(B, 1, ..., k)`, with so many dimensions."""
    return each.view(each.shape[0], *[1] * (ndim - 2), each.shape[-1])
