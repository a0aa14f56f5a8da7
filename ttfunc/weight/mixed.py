"""One batch, an adapter for each example."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ttfunc.deltas import TokenDeltas
from ttfunc.indices import TokenIndices, outside_of_autocast, union
from ttfunc.patching import matrix_of_rows
from ttfunc.stacking import aligned, scattered
from ttfunc.torch_private import outside_of_transforms, transforms_active
from ttfunc.weight.beneath import Carrier, nan_beneath
from ttfunc.weight.deferred import patched
from ttfunc.weight.reads import autocast, no_carrier
from ttfunc.weight.source import Reads


class Mixed(NamedTuple):
    """Rows of which each example of a batch has its own.

    values: `(n + 1, k, D)` rows of n adapters, aligned on the k `indices` of them all, and zeros.
    own: `(n + 1, k)` bool, which of them an adapter has; the last line, the plain model, is false.
    assignment: `(B,)` int64, the adapter of each example, n for the plain model.
    """

    values: Tensor
    own: Tensor
    indices: TokenIndices
    assignment: Tensor
    by_example: bool = True

    def lookup(self, tokens: Tensor, base: Tensor, padding_idx: int | None = None) -> Tensor:
        """`F.embedding` of `(B, ...)` integer tokens: `(B, ..., D)`."""
        self._check(tokens, least=2)
        if padding_idx is not None:  # whose row gets no gradient
            padding_idx = padding_idx % len(base)
        frozen = F.embedding(tokens, base)
        hit, row = self.indices.find(tokens, base.device)
        adapter = self.assignment.view(-1, *[1] * (tokens.ndim - 1)).expand_as(row)
        values = self.values[adapter, row]
        if padding_idx is not None:
            values = torch.where((tokens == padding_idx).unsqueeze(-1), values.detach(), values)
        return torch.where((hit & self.own[adapter, row]).unsqueeze(-1), values, frozen)

    def product(self, hidden: Tensor, base: Tensor, bias: Tensor | None = None) -> Tensor:
        """`F.linear` of `(B, ..., D)` hidden states: `(B, ..., V)`."""
        self._check(hidden, least=3)
        fresh = F.linear(hidden, base, bias)
        ids = self.indices.on(base.device).ids
        rows = autocast(self.values)[self.assignment]
        columns = autocast(hidden).flatten(1, -2) @ rows.mT
        if bias is not None:
            columns = columns + autocast(bias)[ids]
        own = self.own[self.assignment].view(-1, *[1] * (hidden.ndim - 2), len(ids))
        columns = columns.view(*hidden.shape[:-1], len(ids))
        columns = torch.where(own, columns, fresh.index_select(-1, ids))
        if torch.is_grad_enabled() or transforms_active():
            return fresh.index_copy(-1, ids, columns)
        return fresh.index_copy_(-1, ids, columns)

    def copied(self, base: Tensor) -> Tensor:
        """No one matrix stands for several adapters."""
        raise _not_mixed()

    def beneath(self, base: Tensor, reads: Reads) -> Tensor:
        """NaN in the shape of `base`, in no memory, that refuses a read and a gradient."""
        if no_carrier():
            if torch.compiler.is_dynamo_compiling():
                return self.values.new_full((), torch.nan).expand(base.shape)
            with outside_of_transforms():  # so that the dispatcher finds the weight itself
                return base.new_full((), torch.nan).expand(base.shape)
        return nan_beneath(_Refusing, self.values[0], base, self.indices, reads)

    def map(self, func: Callable[[Tensor], Tensor]) -> Mixed:
        """The rows with a function applied that acts on each alone."""
        return self._replace(values=func(self.values))

    def _check(self, given: Tensor, least: int) -> None:
        if given.ndim < least or len(given) != len(self.assignment):
            raise ValueError(
                f"a mixed patch for {len(self.assignment)} examples was given a batch of shape "
                f"{tuple(given.shape)}: its first dimension is to be the examples'. Where "
                "generation of a decoder repeats them (num_beams, num_return_sequences), repeat "
                "the assignment likewise: torch.as_tensor(assignment).repeat_interleave(n). An "
                "encoder-decoder's encoder does not, and it cannot be mixed there."
            )


class _Refusing(Carrier):
    """NaN without a gradient: for an autograd.Function of the model's own, given the weight."""

    @staticmethod
    def matrix(rows: Tensor, base: Tensor, ids: Tensor) -> Tensor:
        raise _not_mixed()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        raise RuntimeError(
            "the gradient of a mixed patch went through an autograd.Function of the model's own, "
            "which knows of one matrix. Call each adapter's examples on their own."
        )


def _not_mixed() -> RuntimeError:
    return RuntimeError(
        "the model reads its token matrix in a way that cannot be mixed, other than looking up "
        "tokens and multiplying hidden states by it. Call each adapter's examples on their own."
    )


def patch_mixed(
    adapters: Sequence[TokenDeltas], assignment: Iterable[int] | Tensor
) -> dict[str, Tensor]:
    """The patched weights for one batch in which each example has its own adapter.

    Give the result to `functional_call`, as that of `patch`; it is differentiable by the deltas of
    all adapters. Neither the model nor an adapter is changed. The model must keep the examples in
    the first dimension of its tokens and hidden states, as transformers' do (but XLNet, refused).

    Args:
        adapters: n TokenDeltas of one model, over any tokens each.
        assignment: B integers, the adapter of each example; -1 is the plain model.

    Returns:
        A `(V, D)` deferred weight for each matrix of the adapters, as `patch` returns. Reading it
        with another batch than B examples, or in a way that is no lookup and no product, raises.

    Raises:
        ValueError: no adapters, an empty assignment, adapters of different models, or as `patch`.
        IndexError: an assignment to an adapter that is not there.
        TypeError: adapters or an assignment of another type.
    """
    adapters = aligned(adapters)
    numbers = _numbers(assignment, len(adapters))
    weights: dict[str, Tensor] = {}
    for name in dict.fromkeys(name for adapter in adapters for name in adapter.rows):
        held = [adapter.rows.get(name) for adapter in adapters]
        row = next((row for row in held if row and row.matrix), next(filter(None, held)))
        matrix = matrix_of_rows(row)
        if matrix.renormed:
            raise ValueError(
                f"{name!r} rescales itself as it is read (max_norm), and cannot be mixed. Call "
                "each adapter's examples on their own."
            )
        base = matrix.tensor.detach()
        with outside_of_autocast(base.device):
            rows = _mixed(name, adapters, base, torch.tensor(numbers, device=base.device))
        deltas = [adapter.deltas[name] for adapter in adapters if name in adapter.deltas]
        weight = patched(base, rows, matrix, dense=False, copied_from=deltas)
        weights.update(dict.fromkeys(matrix.distinct, weight))
    return weights


def _mixed(name: str, adapters: Sequence[TokenDeltas], base: Tensor, assignment: Tensor) -> Mixed:
    held = [(a.deltas[name], a.rows[name].indices) if name in a.rows else None for a in adapters]
    indices = union(tuple(ids for _, ids in filter(None, held)))
    nothing = base.new_zeros(len(indices), base.shape[1])
    none = torch.zeros(len(indices), dtype=torch.bool, device=base.device)
    values = [scattered(*one, nothing, indices) if one else nothing for one in held]
    own = [
        scattered(torch.ones_like(none[: len(one[1])]), one[1], none, indices) if one else none
        for one in held
    ]
    return Mixed(torch.stack([*values, nothing]), torch.stack([*own, none]), indices, assignment)


def _numbers(assignment: Iterable[int] | Tensor, count: int) -> list[int]:
    """The adapter of each example, `count` for the plain model."""
    if isinstance(assignment, (Tensor, np.ndarray)):
        unknown = isinstance(assignment, Tensor) and assignment.is_meta
        if unknown or torch.compiler.is_dynamo_compiling():  # which reads no values
            raise TypeError("assignment has no values to read here. Give a list of integers.")
        assignment = assignment.tolist()
    if isinstance(assignment, (str, bytes, Mapping)) or not isinstance(assignment, Iterable):
        raise TypeError(
            f"assignment must be a sequence of numbers of adapters, one for each example, got "
            f"{type(assignment).__name__}: {assignment!r}."
        )
    numbers = list(assignment)
    for number in numbers:
        if isinstance(number, bool) or not isinstance(number, (int, np.integer)):
            raise TypeError(
                f"assignment must hold integers, the number of an adapter or -1 for the plain "
                f"model, got {type(number).__name__}: {number!r}."
            )
        if not -1 <= number < count:
            raise IndexError(
                f"assignment names adapter {number}, and there are {count}: 0 to {count - 1}, or "
                "-1 for the plain model."
            )
    if not numbers:
        raise ValueError("assignment is empty: give the number of an adapter for each example.")
    return [int(number) % (count + 1) for number in numbers]
