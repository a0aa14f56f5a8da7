"""Rows of several adapters, one for each example of a batch, and how to read them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ttfunc.indices import TokenIndices
from ttfunc.torch_private import is_exported, outside_of_transforms, transforms_active
from ttfunc.weight.placeholder import NaNPlaceholder, nan_placeholder
from ttfunc.weight.reads import (
    autocast,
    bias_at,
    bias_of_base,
    known_tokens,
    lengthened,
    no_placeholder,
)
from ttfunc.weight.source import Reads

# The model types of transformers that have the examples in the second dimension.
_BATCH_LAST = {"xlnet"}


class PerExampleRows(NamedTuple):
    """Rows of several adapters, one for each example of a batch.

    values: `(n + 1, k, D)` rows of n adapters, aligned on the k `indices` of all; the last are 0.
    own: `(n + 1, k)` bool, which of these rows an adapter has; false for the plain model, the last.
    assignment: `(B,)` int64, the adapter of each example, n for the plain model.
    """

    values: Tensor
    own: Tensor
    indices: TokenIndices
    assignment: Tensor
    grown: int = 0
    by_example: bool = True

    def lookup(self, tokens: Tensor, base: Tensor, padding_idx: int | None = None) -> Tensor:
        """`F.embedding` of `(B, ...)` integer tokens: `(B, ..., D)`."""
        check_examples(len(self.assignment), tokens, least=2)
        if padding_idx is not None:  # the row of padding_idx gets no gradient
            padding_idx = padding_idx % len(base)
        hit, row = self.indices.find(tokens, base.device)
        frozen = F.embedding(known_tokens(tokens, hit, self.grown), base)
        adapter = self.assignment.view(-1, *[1] * (tokens.ndim - 1)).expand_as(row)
        values = self.values[adapter, row]
        if padding_idx is not None:
            values = torch.where((tokens == padding_idx).unsqueeze(-1), values.detach(), values)
        return torch.where((hit & self.own[adapter, row]).unsqueeze(-1), values, frozen)

    def product(self, hidden: Tensor, base: Tensor, bias: Tensor | None = None) -> Tensor:
        """`F.linear` of `(B, ..., D)` hidden states: `(B, ..., V)`."""
        check_examples(len(self.assignment), hidden, least=3)
        fresh = lengthened(F.linear(hidden, base, bias_of_base(bias, base)), self.grown)
        ids = self.indices.on(base.device).ids
        rows = autocast(self.values)[self.assignment]
        columns = autocast(hidden).flatten(1, -2) @ rows.mT
        some_bias = bias_at(ids, bias, base, self.grown)
        if some_bias is not None:
            columns = columns + autocast(some_bias)
        own = self.own[self.assignment].view(-1, *[1] * (hidden.ndim - 2), len(ids))
        columns = columns.view(*hidden.shape[:-1], len(ids))
        columns = torch.where(own, columns, fresh.index_select(-1, ids))
        if torch.is_grad_enabled() or transforms_active() or is_exported():
            return fresh.index_copy(-1, ids, columns)
        return fresh.index_copy_(-1, ids, columns)

    def materialise(self, base: Tensor) -> Tensor:
        """Always raises: no single matrix stands for several adapters."""
        raise not_mixed()

    def piece(self, base: Tensor, start: int, stop: int) -> Tensor:
        """Always raises, as `materialise`."""
        raise not_mixed()

    def placeholder(self, base: Tensor, reads: Reads) -> Tensor:
        """One NaN, expanded to the shape of the matrix, that refuses a read and a gradient."""
        ids = self.indices.on(base.device).ids
        return refusing_placeholder(self.values, base, ids, self.grown, reads)

    def map(self, func: Callable[[Tensor], Tensor]) -> PerExampleRows:
        """The rows after `func`, which acts on each row separately."""
        return self._replace(values=func(self.values))


def check_examples(count: int, given: Tensor, least: int) -> None:
    """Raise ValueError for a batch that does not have so many examples in its first dimension."""
    if given.ndim < least or given.shape[0] != count:  # len would be a constant in a graph
        raise ValueError(
            f"a mixed patch for {count} examples was given a batch of shape "
            f"{tuple(given.shape)}: its first dimension must be the examples. If generation "
            "with a decoder repeats the examples (num_beams, num_return_sequences), repeat "
            "the assignment too: torch.as_tensor(assignment).repeat_interleave(n). The encoder "
            "of an encoder-decoder does not repeat them, so that model cannot be mixed there."
        )


def refusing_placeholder(
    values: Tensor, base: Tensor, ids: Tensor, grown: int, reads: Reads
) -> Tensor:
    """For `(n, k, D)` rows: one NaN in the shape of the matrix; a read of it raises."""
    shape = (len(base) + grown, base.shape[1])
    if no_placeholder():
        if torch.compiler.is_dynamo_compiling():
            return values.new_full((), torch.nan).expand(shape)
        with outside_of_transforms():  # so that the dispatcher finds the weight itself
            return base.new_full((), torch.nan).expand(shape)
    return nan_placeholder(_Refusing, values[0], base, ids, grown, reads)


class _Refusing(NaNPlaceholder):
    """NaN without a gradient, for a model that gives the weight to its own autograd.Function."""

    @staticmethod
    def matrix(rows: Tensor, base: Tensor, ids: Tensor, grown: int) -> Tensor:
        raise not_mixed()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        raise RuntimeError(
            "the gradient of a mixed patch went through an autograd.Function of the model's own, "
            "which expects one matrix. Call the model separately for each adapter's examples."
        )


def check_batch_first(model: nn.Module) -> None:
    """Raise ValueError for a model that transposes its batch before it looks tokens up."""
    kind = getattr(getattr(model, "config", None), "model_type", None)
    if kind in _BATCH_LAST:
        raise ValueError(
            f"a mixed patch needs the examples in the first dimension, and a model of type "
            f"{kind!r} transposes its batch before it looks tokens up. Call the model separately "
            "for each adapter's examples."
        )


def not_mixed() -> RuntimeError:
    """What is raised where several adapters would need one matrix."""
    return RuntimeError(
        "the model reads its token matrix in a way that cannot be mixed. Only looking up tokens "
        "and multiplying hidden states by the matrix can be. Call the model separately for each "
        "adapter's examples."
    )
