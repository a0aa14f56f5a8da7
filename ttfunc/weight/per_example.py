"""Rows of several adapters, one for each example of a batch, and how to read them."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from ttfunc.rows.token_ids import TokenIndices, found_among
from ttfunc.torch_private import is_exported, outside_of_transforms, transforms_active
from ttfunc.weight.placeholder import NaNPlaceholder, nan_placeholder
from ttfunc.weight.reads import (
    autocast,
    bias_at,
    bias_of_base,
    cast_like,
    known_tokens,
    lengthened,
    no_placeholder,
)
from ttfunc.weight.source import Reads

# The model types of transformers that have the examples in the second dimension.
_BATCH_LAST = {"xlnet"}

# What stands where an example has no row: behind all ids, so that these stay in order.
NO_TOKEN = torch.iinfo(torch.int64).max


class PerExampleRows(NamedTuple):
    """Rows of several adapters, one for each example of a batch.

    values: `(B, k, D)`, the rows of each example in the order of their ids. Where an adapter has
    fewer than k, zeros fill it up. ids: `(B, k)` int64, their tokens, ascending; `NO_TOKEN` where
    there is no row. places: `(B, k)` int64, the column of the logits for each row, no two of an
    example alike; the columns for which there is no row are some that the adapter leaves as they
    are. They make the columns of all examples as many, and are written back.
    """

    values: Tensor
    ids: Tensor
    places: Tensor
    grown: int = 0
    by_example: bool = True

    def lookup(self, tokens: Tensor, base: Tensor, padding_idx: int | None = None) -> Tensor:
        """`F.embedding` of `(B, ...)` integer tokens: `(B, ..., D)`."""
        count, k, _ = self.values.shape
        check_examples(count, tokens, least=2)
        hit, row = self._find(tokens)
        frozen = F.embedding(known_tokens(tokens, hit, self.grown), base)
        first = k * torch.arange(count, device=row.device)
        row = row + first.view(-1, *[1] * (tokens.ndim - 1))
        replaced = F.embedding(row, self.values.flatten(0, 1))
        if padding_idx is not None:  # the row of padding_idx gets no gradient
            is_padding = (tokens == padding_idx % len(base)).unsqueeze(-1)
            replaced = torch.where(is_padding, replaced.detach(), replaced)
        return torch.where(hit.unsqueeze(-1), replaced, frozen)

    def product(self, hidden: Tensor, base: Tensor, bias: Tensor | None = None) -> Tensor:
        """`F.linear` of `(B, ..., D)` hidden states: `(B, ..., V)`."""
        count, k, _ = self.values.shape
        check_examples(count, hidden, least=3)
        fresh = lengthened(F.linear(hidden, base, bias_of_base(bias, base)), self.grown)
        columns = autocast(hidden).flatten(1, -2) @ autocast(self.values).mT
        columns = columns.view(*hidden.shape[:-1], k)
        beside = (count, *[1] * (hidden.ndim - 2), k)
        some_bias = bias_at(self.places.flatten(), bias, base, self.grown)
        if some_bias is not None:
            columns = columns + autocast(some_bias).view(beside)
        places = self.places.view(beside).expand_as(columns)
        used = (self.ids != NO_TOKEN).view(beside)
        columns = torch.where(used, columns, fresh.gather(-1, places))
        if torch.is_grad_enabled() or transforms_active() or is_exported():
            return fresh.scatter(-1, places, columns)
        return fresh.scatter_(-1, places, columns)

    def _find(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Which of `(B, ...)` tokens are among the ids of their example, and the row of each."""
        if is_exported():  # ONNX has no binary search
            return found_among(
                self.ids.view(-1, *[1] * (tokens.ndim - 1), self.ids.shape[1]), tokens
            )
        flat = tokens.flatten(1).to(self.ids.dtype).contiguous()
        place = torch.searchsorted(self.ids, flat).clamp(max=self.ids.shape[1] - 1)
        hit = self.ids.gather(1, place) == flat
        return hit.view(tokens.shape), place.view(tokens.shape)

    def materialise(self, base: Tensor) -> Tensor:
        """Always raises: no single matrix stands for several adapters."""
        raise not_mixed()

    def piece(self, base: Tensor, start: int, stop: int) -> Tensor:
        """Always raises, as `materialise`."""
        raise not_mixed()

    def placeholder(self, base: Tensor, reads: Reads) -> Tensor:
        """One NaN, expanded to the shape of the matrix, that refuses a read and a gradient."""
        return refusing_placeholder(self.values, base, self.ids, self.grown, reads)

    def map(self, func: Callable[[Tensor], Tensor]) -> PerExampleRows:
        """The rows after `func`, which acts on each row separately."""
        return self._replace(values=func(self.values))


def rows_of_each(
    adapters: Sequence[tuple[Tensor, TokenIndices] | None],
    assignment: Sequence[int],
    base: Tensor,
    grown: int,
) -> PerExampleRows:
    """The rows of each example, from those of n adapters, cast to the `(V, D)` base.

    adapters: the `(k, D)` rows and the ids of each; None for one that has no rows of this matrix.
    assignment: the adapter of each example, n for the plain model.
    """
    nothing = base.new_zeros(1, base.shape[1]), TokenIndices(())
    held = [*(one or nothing for one in adapters), nothing]
    # All rows one after the other, so that the adapters without an example get a gradient of 0.
    values = torch.cat([cast_like(rows, base) for rows, _ in held])
    starts = [0, *itertools.accumulate(len(rows) for rows, _ in held)]
    chosen = list(dict.fromkeys(assignment))
    tables = [held[number][1].on(base.device) for number in chosen]
    k = max(1, *(len(held[number][1]) for number in chosen))
    ids = pad_sequence([one.id_at for one in tables], True, padding_value=-1)[:, :k]
    at = [one.row_at + starts[number] for one, number in zip(tables, chosen, strict=True)]
    rows = torch.where(ids < 0, len(values) - 1, pad_sequence(at, True)[:, :k])  # the last is 0
    place_of = {number: place for place, number in enumerate(chosen)}
    each = torch.tensor([place_of[number] for number in assignment], device=base.device)
    ordered, columns = _with_places(ids, len(base) + grown)
    return PerExampleRows(F.embedding(rows[each], values), ordered[each], columns[each], grown)


def _with_places(ids: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """`(n, k)` ascending ids as they are searched, and a place among `size` for each, as `places`.

    -1 comes last in a row, and is no token.
    """
    used = ids >= 0
    ordered = torch.where(used, ids, NO_TOKEN)
    if is_exported():
        return ordered, places(ids, size)[1]
    order = torch.arange(ids.shape[1], device=ids.device)
    number = (order - used.sum(1, keepdim=True)).contiguous()
    # Before the place that is the n-th (from 0) of no id, there are n, and the ids whose own count
    # of such places before them is n at most.
    before = torch.searchsorted(ordered - order, number, right=True)
    return ordered, torch.where(used, ids, number + before)


def places(ids: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """Which of `(..., k)` ids are used, and a place among `size` for each, no two alike.

    The place of a used id is the id itself. The others get the first places that are no id, so
    that what is there can be written back: an index that is there twice has no right gradient.
    """
    k = ids.shape[-1]
    same = ids.unsqueeze(-1) == ids.unsqueeze(-2)
    is_first = same.to(torch.int64).argmax(-1) == torch.arange(k, device=ids.device)
    used = (ids >= 0) & (ids < size) & is_first
    # Of 2k places, k at least are no id. (k <= size.)
    candidates = torch.arange(min(2 * k, size), device=ids.device)
    free = (candidates.unsqueeze(-1) != ids.unsqueeze(-2)).all(-1)
    free_until, unused_until = free.to(torch.int64).cumsum(-1), (~used).to(torch.int64).cumsum(-1)
    # The n-th that is not used gets the n-th free place, before which fewer than n are free.
    spare = (free_until.unsqueeze(-2) < unused_until.unsqueeze(-1)).to(torch.int64).sum(-1)
    return used, torch.where(used, ids, spare)


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
