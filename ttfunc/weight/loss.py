"""The cross-entropy of logits that are never made, with its gradients, by chunks of positions.

A loss needs one number for each labelled position, and its backward needs the gradients of the
hidden states and of the k rows. One pass makes all three. It goes over chunks of positions, makes
the product of each chunk with the whole matrix, and leaves out positions without a label.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ttfunc.rows.token_ids import TokenIndices, outside_of_autocast
from ttfunc.torch_private import keeps_signature
from ttfunc.weight.product import bias_at, product, product_into

Steps = tuple[Callable[[Tensor], Tensor], ...]

# Bytes of the one buffer for a chunk's logits: a quarter of the matrix, within these bounds. So the
# memory does not grow with the positions. Each chunk reads the whole matrix twice, and smaller
# chunks would spend their time on that.
LEAST, MOST = 32 << 20, 128 << 20
# Bytes of logits that a CPU's cache keeps from one pass of the softmax to the next.
_CACHED = 2 << 20


def cross_entropies(
    hidden: Tensor,
    base: Tensor,
    rows: Tensor,
    bias: Tensor | None,
    indices: TokenIndices,
    target: Tensor,
    *,
    steps: Steps,
    ignore_index: int,
    label_smoothing: float,
    once: bool,
) -> Tensor:
    """The `(n,)` losses at n positions, in float32 or float64; 0 where the label is ignored.

    It equals `F.cross_entropy(steps(F.linear(hidden, W, bias)), target, reduction="none")`, where W
    is the `(V, D)` base with the `(k, D)` rows at `indices`. Differentiable with respect to hidden
    and rows.

    hidden: `(n, D)`. target: `(n,)` int64. bias: as long as W. once: nobody will differentiate the
    gradient.
    """
    options = (steps, ignore_index, label_smoothing, once)
    losses: Tensor
    with outside_of_autocast(hidden.device):
        losses, _, _ = _CrossEntropies.apply(hidden, base, rows, bias, indices, target, *options)  # type: ignore[no-untyped-call]
    return losses


def in_steps(steps: Steps, logits: Tensor) -> Tensor:
    """The logits that a model makes of a product."""
    for step in steps:
        logits = step(logits)
    return logits


def made_of(
    steps: Steps,
    hidden: Tensor,
    base: Tensor,
    rows: Tensor,
    bias: Tensor | None,
    indices: TokenIndices,
) -> Tensor:
    """The logits. Autocast is off: it cast the operands when the model multiplied."""
    with outside_of_autocast(hidden.device):
        return in_steps(steps, product(hidden, base, rows, bias, indices))


def gradients(
    function: Callable[[Tensor, Tensor], Tensor],
    hidden: Tensor,
    rows: Tensor,
    grad: Tensor,
    needs: tuple[bool, ...],
) -> tuple[Tensor | None, Tensor | None]:
    """The gradients of a function of hidden states and rows, which can be differentiated again.

    The hidden states may depend on the same rows. That part of the gradient is left to autograd.
    """
    again = torch.is_grad_enabled()
    with torch.enable_grad():
        given = [one.view_as(one) if again else one.detach() for one in (hidden, rows)]
        wanted = [
            one if one.requires_grad else one.requires_grad_()
            for one, need in zip(given, (needs[0], needs[2]), strict=True)
            if need
        ]
        made = function(*given)
    found = iter(torch.autograd.grad(made, wanted, grad.to(made.dtype), create_graph=again))
    return next(found) if needs[0] else None, next(found) if needs[2] else None


class _CrossEntropies(torch.autograd.Function):
    """The losses, and for the backward the gradient of each loss.

    That is `(n, D)` by the hidden states, and `(n, k)` by the rows' columns of the product. The
    gradient of the rows is the product of the latter with the hidden states.
    """

    @staticmethod
    @keeps_signature
    def forward(
        hidden: Tensor,
        base: Tensor,
        rows: Tensor,
        bias: Tensor | None,
        indices: TokenIndices,
        target: Tensor,
        steps: Steps,
        ignore_index: int,
        label_smoothing: float,
        once: bool,
    ) -> tuple[Tensor, Tensor, Tensor]:
        height, ids = indices.height(len(base)), indices.ids_on(base.device)
        seen = in_steps(steps, hidden.new_empty(0)).dtype
        losses = hidden.new_zeros(len(hidden), dtype=_wide(seen))
        to_hidden = torch.zeros_like(hidden)
        of_rows = hidden.new_zeros(len(hidden), len(ids), dtype=_wide(hidden.dtype))
        labelled = _labelled(target, ignore_index, height)
        budget = min(max(LEAST, base.nbytes // 4), MOST)
        most = max(1, budget // (height * base.element_size()))
        buffer = hidden.new_empty(min(most, len(labelled)), height)
        chunks: Iterable[slice | Tensor] = labelled.split(most)
        if len(labelled) == len(target):  # a slice copies no hidden states
            chunks = [slice(start, start + most) for start in range(0, len(target), most)]
        for chunk in chunks:
            some = hidden[chunk]
            logits = buffer[: len(some)]
            product_into(logits, some, base, bias)
            logits.index_copy_(1, ids, F.linear(some, rows, bias_at(bias, ids)))
            losses[chunk], part = _losses(logits, target[chunk], ids, steps, label_smoothing)
            of_rows[chunk] = part.to(of_rows.dtype)
            known = logits.index_fill_(1, ids, 0)[:, : len(base)]
            to_hidden[chunk] = torch.addmm(known @ base, part.to(rows.dtype), rows)
        return losses, to_hidden, of_rows

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        hidden, base, rows, bias, ctx.indices, target, *ctx.options = inputs
        _, to_hidden, of_rows = output
        ctx.mark_non_differentiable(to_hidden, of_rows)
        ctx.save_for_backward(hidden, base, rows, bias, target, to_hidden, of_rows)

    @staticmethod
    def backward(ctx: Any, grad: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        hidden, base, rows, bias, target, to_hidden, of_rows = ctx.saved_tensors
        steps, ignore_index, label_smoothing, once = ctx.options
        needs_hidden, _, needs_rows, *_ = ctx.needs_input_grad
        nothing = (None,) * 7
        if torch.is_grad_enabled() and not once:  # something will differentiate this gradient

            def losses(hidden: Tensor, rows: Tensor) -> Tensor:
                logits = made_of(steps, hidden, base, rows, bias, ctx.indices)
                options = {"ignore_index": ignore_index, "label_smoothing": label_smoothing}
                return F.cross_entropy(logits, target, reduction="none", **options)

            first, second = gradients(losses, hidden, rows, grad, ctx.needs_input_grad)
            return first, None, second, *nothing
        # If nothing is labelled, a mean divides by zero.
        scale = torch.where(target != ignore_index, grad, 0).unsqueeze(1)
        first = (to_hidden * scale).to(hidden.dtype) if needs_hidden else None
        second = _summed(of_rows * scale, hidden) if needs_rows else None
        return first, None, second, *nothing

    @staticmethod
    def vmap(
        info: Any, in_dims: tuple[int | None, ...], *operands: Any
    ) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
        count = info.batch_size
        hidden, base, rows, bias, indices, target, *options = operands
        if all(dim is None for dim in in_dims[1:5]):  # examples, each with positions of its own
            hidden, target = (
                x.expand(count, *x.shape) if dim is None else x.movedim(dim, 0)
                for x, dim in ((hidden, in_dims[0]), (target, in_dims[5]))
            )
            found = _CrossEntropies.apply(  # type: ignore[no-untyped-call]
                hidden.flatten(0, 1), base, rows, bias, indices, target.flatten(), *options
            )
            return tuple(x.unflatten(0, hidden.shape[:2]) for x in found), (0, 0, 0)
        each = [
            _CrossEntropies.apply(  # type: ignore[no-untyped-call]
                *(
                    x.select(d, i) if isinstance(d, int) else x
                    for x, d in zip(operands, in_dims, strict=True)
                )
            )
            for i in range(count)
        ]
        return tuple(torch.stack(parts) for parts in zip(*each, strict=True)), (0, 0, 0)


def _labelled(target: Tensor, ignore_index: int, height: int) -> Tensor:
    """The positions that have a label. Raises torch's own error for a label out of range."""
    found = target != ignore_index
    wrong = target[found & ((target < 0) | (target >= height))]
    if len(wrong):
        F.cross_entropy(wrong.new_zeros(1, dtype=torch.float32).expand(1, height), wrong[:1])
    return found.nonzero().squeeze(1)


def _losses(
    logits: Tensor, target: Tensor, ids: Tensor, steps: Steps, label_smoothing: float
) -> tuple[Tensor, Tensor]:
    """`(n,)` losses of `(n, V)` logits; writes their gradients over the logits.

    Also returns the gradients of the columns `ids`, not rounded to the logits' dtype.
    """
    losses, parts = [], []
    most = len(logits)
    if logits.device.type == "cpu":
        most = max(1, _CACHED // (logits.shape[1] * _wide(logits.dtype).itemsize))
    for some, own in zip(logits.split(most), target.split(most), strict=True):
        loss, grad = _loss_and_gradient(some, own.unsqueeze(1), steps, label_smoothing)
        some.copy_(grad)
        losses.append(loss)
        parts.append(grad.index_select(1, ids))
    return torch.cat(losses), torch.cat(parts)


def _loss_and_gradient(
    logits: Tensor, target: Tensor, steps: Steps, label_smoothing: float
) -> tuple[Tensor, Tensor]:
    with torch.enable_grad():
        fresh = logits.detach().requires_grad_(bool(steps))
        seen = in_steps(steps, fresh)
    log_p = torch.log_softmax(seen.detach(), 1, dtype=_wide(seen.dtype))
    losses = -log_p.gather(1, target).squeeze(1)
    if label_smoothing:
        losses = (1 - label_smoothing) * losses - label_smoothing * log_p.mean(1)
    grad = log_p.exp_()
    if label_smoothing:
        grad.sub_(label_smoothing / grad.shape[1])
    there = grad.new_full((), label_smoothing - 1).expand_as(target)
    grad.scatter_add_(1, target, there)
    if steps:
        (grad,) = torch.autograd.grad(seen, fresh, grad.to(seen.dtype))
    return losses, grad


def _summed(of_rows: Tensor, hidden: Tensor) -> Tensor:
    """The `(k, D)` product of `(n, k)` and `(n, D)`; widens narrow states a few at a time."""
    total = of_rows.new_zeros(of_rows.shape[1], hidden.shape[1])
    for some, states in zip(of_rows.split(1024), hidden.split(1024), strict=True):
        total = torch.addmm(total, some.mT, states.to(some.dtype))
    return total.to(hidden.dtype)


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)
