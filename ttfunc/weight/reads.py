"""The two reads of a matrix with replaced rows: looking rows up, and multiplying by all of them.

Both give the same result as on `base.index_copy(0, ids, rows)`, without that copy and without a
gradient of its size. `base` is `(V, D)`, `rows` is `(k, D)` of the same dtype and device.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ttfunc.rows.token_ids import TokenIndices, gaps, with_rows
from ttfunc.torch_private import (
    FUNCTIONALIZE,
    JVP,
    at_work,
    in_dual_level,
    in_strict_export,
    is_exported,
    is_traced,
    keeps_signature,
    transforms_active,
)
from ttfunc.weight.placeholder import NaNPlaceholder, nan_placeholder, strict_placeholder
from ttfunc.weight.source import Reads


class SharedRows(NamedTuple):
    """`(k, D)` rows that replace the rows `indices` of a base; each read casts them to its dtype.

    So a patch that is made once reads the current rows throughout training.
    """

    values: Tensor
    indices: TokenIndices
    grown: int = 0
    by_example: bool = False

    def lookup(self, tokens: Tensor, base: Tensor, padding_idx: int | None = None) -> Tensor:
        """`F.embedding` of `(...)` integer tokens: `(..., D)`.

        `E = W[x]`, then `E[t] = R[i]` where `x[t] = S[i]`. Differentiable with respect to the rows
        alone: `dR[i]` is the sum of `dE[t]` over these t.

        >>> base, rows = torch.zeros(9, 2), torch.ones(1, 2)
        >>> SharedRows(rows, TokenIndices((3,))).lookup(torch.tensor([3, 4]), base)
        tensor([[1., 1.],
                [0., 0.]])
        """
        hit, row = self.indices.find(tokens, base.device)
        frozen = F.embedding(known_tokens(tokens, hit, self.grown), base)
        padding_row = None if padding_idx is None else self.indices.row_of(padding_idx % len(base))
        replaced = F.embedding(row, cast_like(self.values, base), padding_idx=padding_row)
        return torch.where(hit.unsqueeze(-1), replaced, frozen)

    def product(self, hidden: Tensor, base: Tensor, bias: Tensor | None = None) -> Tensor:
        """`F.linear` of `(..., D)` hidden states: `(..., V)`.

        `Y = H Wᵀ`, then `Y[:, S] = H Rᵀ`. Differentiable with respect to all but `base`:
        `dH = G₀ W + G_S R` and `dR = G_Sᵀ H`, where G is the gradient of Y, `G_S` its columns S,
        and `G₀` is G with these columns zeroed.

        >>> base, rows = torch.zeros(4, 2), torch.ones(1, 2)
        >>> SharedRows(rows, TokenIndices((3,))).product(torch.ones(1, 2), base)
        tensor([[0., 0., 0., 2.]])
        """
        bias = None if bias is None else autocast(bias)
        ids = self.indices.on(base.device).ids
        rows = autocast(cast_like(self.values, base))
        operands = (autocast(hidden), autocast(base), rows, bias, ids)
        if _has_no_rule():
            return patched_product(*operands, self.grown)
        function = _ProductFunction if torch.compiler.is_dynamo_compiling() else _ProductWithVmap
        parts = _parts(self.indices, operands[1], self.grown)
        result: Tensor = function.apply(*operands, self.grown, parts)  # type: ignore[no-untyped-call]
        return result

    def materialise(self, base: Tensor) -> Tensor:
        """The matrix itself, `(V, D)`."""
        ids = self.indices.on(base.device).ids
        return with_rows(base, ids, cast_like(self.values, base), self.grown)

    def piece(self, base: Tensor, start: int, stop: int) -> Tensor:
        """The rows of the matrix from `start` to `stop`, `(stop - start, D)`; a copy."""
        here = [row for row, token in enumerate(self.indices.ids) if start <= token < stop]
        ids = torch.tensor([self.indices.ids[row] - start for row in here], dtype=torch.int64)
        known = min(stop, len(base))
        rows = cast_like(self.values, base)[here]
        grown = stop - max(start, known)
        return with_rows(base[min(start, known) : known], ids.to(base.device), rows, grown)

    def placeholder(self, base: Tensor, reads: Reads) -> Tensor:
        """One NaN, expanded to the shape of `base`; its `(V, D)` gradient goes to the rows."""
        if in_strict_export():
            return strict_placeholder(base, self.grown)
        if no_placeholder():
            return self.materialise(base)
        values = cast_like(self.values, base)
        ids = self.indices.on(base.device).ids
        return nan_placeholder(NaNPlaceholder, values, base, ids, self.grown, reads)

    def map(self, func: Callable[[Tensor], Tensor]) -> SharedRows:
        """The rows after `func`, which acts on each row separately."""
        return self._replace(values=func(self.values))


def known_tokens(tokens: Tensor, hit: Tensor, grown: int) -> Tensor:
    """Tokens to look up in the base: 0 in place of those that have rows, which may be new ones."""
    # An id that is no token stays as it is, and F.embedding raises for it.
    return torch.where(hit, 0, tokens) if grown else tokens


def lengthened(logits: Tensor, grown: int) -> Tensor:
    """Logits, or a bias of theirs, with so many columns more."""
    return F.pad(logits, (0, grown)) if grown else logits


def _first(columns: Tensor, count: int) -> Tensor:
    """The first of the columns; no view where they are all, as a batched gradient has no rule."""
    return columns if columns.shape[-1] == count else columns[..., :count]


def bias_of_base(bias: Tensor | None, base: Tensor) -> Tensor | None:
    """That of the tokens that the base has."""
    return None if bias is None else _first(bias, len(base))


def bias_at(ids: Tensor, bias: Tensor | None, base: Tensor, grown: int) -> Tensor | None:
    """That of some tokens; 0 for new ones, where the bias is as long as the base."""
    if bias is None:
        return None
    return lengthened(bias, len(base) + grown - len(bias)).index_select(0, ids)


def patched_product(
    hidden: Tensor, base: Tensor, rows: Tensor, bias: Tensor | None, ids: Tensor, grown: int
) -> Tensor:
    """The product in plain operations, which have every rule of torch."""
    fresh = lengthened(F.linear(hidden, base, bias_of_base(bias, base)), grown)
    return fresh.index_copy(-1, ids, F.linear(hidden, rows, bias_at(ids, bias, base, grown)))


def _in_one_buffer(hidden: Tensor, base: Tensor, bias: Tensor | None, grown: int) -> Tensor:
    """`F.linear` with so many columns more, which are yet to be written, and no copy.

    What `F.linear` adds a bias to is a view, to which a model could not write in place.
    """
    views = bias is not None and hidden.ndim != 2
    if not (grown or views) or torch.compiler.is_dynamo_compiling():
        return lengthened(F.linear(hidden, base, bias), grown)
    logits = hidden.new_empty(*hidden.shape[:-1], len(base) + grown)
    product_into(_flat(logits), _flat(hidden), base, bias)
    return logits


def product_into(logits: Tensor, hidden: Tensor, base: Tensor, bias: Tensor | None) -> None:
    """Write the columns of the base to `(n, V)` logits; those of new tokens stay as they are."""
    known = logits[:, : len(base)]
    if bias is None:
        torch.mm(hidden, base.mT, out=known)
    else:
        torch.addmm(bias, hidden, base.mT, out=known)


class _ProductFunction(torch.autograd.Function):
    """The product with k columns written in place, and a backward to match.

    Plain autograd of `patched_product` keeps three buffers of the size of the logits. This keeps
    none, and its backward makes one at most, after those of the loss are freed. (Subtracting the
    old rows' part from `grad @ base` would make none, but lose digits where an old row is large.)
    """

    @staticmethod
    @keeps_signature
    def forward(
        hidden: Tensor,
        base: Tensor,
        rows: Tensor,
        bias: Tensor | None,
        ids: Tensor,
        grown: int,
        parts: tuple[slice, ...],
    ) -> Tensor:
        fresh = _in_one_buffer(hidden, base, bias_of_base(bias, base), grown)
        return fresh.index_copy_(-1, ids, F.linear(hidden, rows, bias_at(ids, bias, base, grown)))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        hidden, base, rows, bias, ids, _, ctx.parts = inputs
        ctx.bias_size = 0 if bias is None else len(bias)
        ctx.save_for_backward(hidden, base, rows, ids)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        hidden, base, rows, ids = ctx.saved_tensors
        needs_hidden, _, needs_rows, needs_bias, *_ = ctx.needs_input_grad
        some = grad.index_select(-1, ids)
        to_hidden = to_rows = to_bias = None
        if needs_hidden:
            to_hidden = _product_without(ids, ctx.parts, grad, base) + some @ rows
        if needs_rows:
            to_rows = _flat(some).mT @ _flat(hidden)
        if needs_bias:
            to_bias = _first(_flat(grad).sum(0), ctx.bias_size)
        return to_hidden, None, to_rows, to_bias, None, None, None


def _flat(tensor: Tensor) -> Tensor:
    # With -1 torch cannot tell how many rows an empty tensor has.
    return tensor.reshape(tensor.shape[:-1].numel(), tensor.shape[-1])


class _ProductWithVmap(_ProductFunction):
    """The same with the rules for transforms, which torch.compile cannot trace."""

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], *operands: Any) -> tuple[Tensor, int]:
        # In place, a batch of rows would not fit into the product of an unbatched hidden state.
        function = torch.vmap(patched_product, in_dims[:-1], randomness=info.randomness)
        return function(*operands[:-1]), 0


def _parts(indices: TokenIndices, base: Tensor, grown: int) -> tuple[slice, ...]:
    """The ranges of columns of the logits between the replaced ones; none if there are too many.

    Only on the CPU, where a fresh buffer of the size of the logits costs a page fault for each
    4 KiB, and only in eager mode: a compiled step already runs at floor speed with the copy.
    """
    if grown and grown == len(indices):
        return (slice(0, len(base)),)
    if base.device.type != "cpu" or torch.compiler.is_dynamo_compiling():
        return ()
    return gaps(indices, len(base), _most_parts(base))


def _most_parts(base: Tensor) -> int:
    # For each token, a part costs D additions and the copy costs V writes. A narrow dtype also
    # rounds each sum.
    return len(base) // max(base.shape[1], 1) if base.dtype.itemsize >= 4 else 1


def _product_without(ids: Tensor, parts: tuple[slice, ...], grad: Tensor, base: Tensor) -> Tensor:
    """`grad @ base` as if the columns `ids` of `grad` were 0; `parts` are the others, if given."""
    if not parts:
        return _first(grad.index_fill(-1, ids, 0), len(base)) @ base
    flat = _flat(grad)
    first, *others = parts
    total = flat[:, first] @ base[first]
    for part in others:
        total = torch.addmm(total, flat[:, part], base[part])
    return total.view(*grad.shape[:-1], base.shape[1])


def _has_no_rule() -> bool:
    """Whether an autograd.Function cannot be used here.

    functionalize has no rule for it, forward mode over forward mode loses the outer tangent, and
    torch.compile has no rule for it under a transform. A graph for another runtime would hold its
    writes in place.
    """
    if torch.compiler.is_dynamo_compiling():
        return transforms_active() or is_exported()
    return is_exported() or in_dual_level() or at_work(FUNCTIONALIZE, JVP)


def no_placeholder() -> bool:
    """Whether the placeholder cannot carry a gradient, and the copy itself takes its place.

    torch.compile drops the copy if nothing reads it, and so does make_fx of a transform;
    functionalize, and forward mode without a transform (`torch.autograd.forward_ad`), pay for it.
    """
    if torch.compiler.is_dynamo_compiling() or at_work(FUNCTIONALIZE):
        return True
    return is_traced() if transforms_active() else in_dual_level()


def cast_like(values: Tensor, base: Tensor) -> Tensor:
    """Rows in the dtype of the base, and on its device."""
    return values.to(base.device, base.dtype)


def autocast(operand: Tensor) -> Tensor:
    """Cast as autocast does for `F.linear`, before the Function, so that its backward agrees."""
    device = operand.device.type
    if not torch.amp.is_autocast_available(device):  # meta
        return operand
    if not torch.is_autocast_enabled(device) or operand.dtype == torch.float64:
        return operand
    return operand.to(torch.get_autocast_dtype(device))
