"""The product with a matrix whose rows at fixed ids are replaced: `Y = H Wᵀ`, `Y[:, S] = H Rᵀ`.

It equals the product with `base.index_copy(0, ids, rows)`, without that copy and without a gradient
of its size. `base` is `(V, D)`, `rows` is `(k, D)` of the same dtype and device. Ids past the end
of the base are new tokens: Y has columns for them behind the V columns of the base.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ttfunc.rows.token_ids import IdTensor, TokenIndices
from ttfunc.torch_private import (
    FUNCTIONALIZE,
    JVP,
    at_work,
    autocast_dtype,
    in_dual_level,
    is_exported,
    keeps_signature,
    transforms_active,
)


def product(
    hidden: Tensor, base: Tensor, values: Tensor, bias: Tensor | None, indices: TokenIndices
) -> Tensor:
    """`F.linear` of `(..., D)` hidden states: `(..., V)`, or `(..., V + n)` with n new tokens.

    Differentiable with respect to all but `base`: `dH = G₀ W + G_S R` and `dR = G_Sᵀ H`, where G is
    the gradient of Y, `G_S` its columns S, and `G₀` is G with these columns zeroed.

    >>> base, rows = torch.zeros(4, 2), torch.ones(1, 2)
    >>> product(torch.ones(1, 2), base, rows, None, TokenIndices((3,)))
    tensor([[0., 0., 0., 2.]])
    """
    rows = autocast(cast_like(values, base))
    hidden, base, bias = autocast(hidden), autocast(base), long_bias(bias, base, indices)
    if _has_no_rule():
        return patched_product(hidden, base, rows, bias, indices)
    indices.tables(base.device)  # Dynamo takes no tensor out of a Function that was made in it
    result: Tensor = _ProductFunction.apply(hidden, base, rows, bias, indices)  # type: ignore[no-untyped-call]
    return result


def lengthened(tensor: Tensor, size: int) -> Tensor:
    """Logits, or their bias, padded with zeros to `size` columns, for new tokens."""
    more = size - tensor.shape[-1]
    return F.pad(tensor, (0, more)) if more else tensor


def long_bias(bias: Tensor | None, base: Tensor, ids: TokenIndices | IdTensor) -> Tensor | None:
    """The bias for the product: cast as the other operands, and 0 for new tokens that it lacks."""
    return None if bias is None else lengthened(autocast(bias), ids.height(len(base)))


def bias_at(bias: Tensor | None, ids: Tensor) -> Tensor | None:
    """The bias of the tokens `ids`."""
    return None if bias is None else bias.index_select(0, ids)


def first_columns(tensor: Tensor, count: int) -> Tensor:
    """The first columns; the tensor itself if it has no more: vmap has no rule for such a view."""
    return tensor if tensor.shape[-1] == count else tensor[..., :count]


def base_product(hidden: Tensor, base: Tensor, bias: Tensor | None, height: int) -> Tensor:
    """`F.linear` with the base, and zeros for new tokens up to `height`."""
    known = None if bias is None else first_columns(bias, len(base))
    return lengthened(F.linear(hidden, base, known), height)


def patched_product(
    hidden: Tensor, base: Tensor, rows: Tensor, bias: Tensor | None, indices: TokenIndices
) -> Tensor:
    """The product in plain operations, for which every transform has a rule."""
    ids = indices.ids_on(base.device)
    fresh = base_product(hidden, base, bias, indices.height(len(base)))
    return fresh.index_copy(-1, ids, F.linear(hidden, rows, bias_at(bias, ids)))


def _in_one_buffer(hidden: Tensor, base: Tensor, bias: Tensor | None, height: int) -> Tensor:
    """`base_product` without a copy, and without values in the columns of new tokens.

    It avoids the view that `F.linear` returns with a bias: a model could not write to it in place.
    """
    views = bias is not None and hidden.ndim != 2
    if not (height > len(base) or views) or torch.compiler.is_dynamo_compiling():
        return base_product(hidden, base, bias, height)
    logits = hidden.new_empty(*hidden.shape[:-1], height)
    product_into(_flat(logits), _flat(hidden), base, bias)
    return logits


def product_into(logits: Tensor, hidden: Tensor, base: Tensor, bias: Tensor | None) -> None:
    """Write the base's columns of `(n, V)` logits; the columns of new tokens are not touched."""
    known = logits[:, : len(base)]
    if bias is None:
        torch.mm(hidden, base.mT, out=known)
    else:
        torch.addmm(bias[: len(base)], hidden, base.mT, out=known)


class _ProductFunction(torch.autograd.Function):
    """The product with k columns written in place, and a backward to match.

    Autograd of `patched_product` would keep three buffers of the size of the logits. This keeps
    none, and its backward makes at most one, after the loss has freed its own. Subtracting the old
    rows' part from `grad @ base` would make none, but lose digits if an old row is large.
    """

    @staticmethod
    @keeps_signature
    def forward(
        hidden: Tensor, base: Tensor, rows: Tensor, bias: Tensor | None, indices: TokenIndices
    ) -> Tensor:
        ids = indices.ids_on(base.device)
        fresh = _in_one_buffer(hidden, base, bias, indices.height(len(base)))
        return fresh.index_copy_(-1, ids, F.linear(hidden, rows, bias_at(bias, ids)))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        hidden, base, rows, _, ctx.indices = inputs
        ctx.save_for_backward(hidden, base, rows)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        hidden, base, rows = ctx.saved_tensors
        needs_hidden, _, needs_rows, needs_bias, _ = ctx.needs_input_grad
        some = grad.index_select(-1, ctx.indices.ids_on(base.device))
        to_hidden = to_rows = to_bias = None
        if needs_hidden:
            to_hidden = _product_without(ctx.indices, grad, base) + some @ rows
        if needs_rows:
            to_rows = _flat(some).mT @ _flat(hidden)
        if needs_bias:
            to_bias = _flat(grad).sum(0)
        return to_hidden, None, to_rows, to_bias, None

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], *operands: Any) -> tuple[Tensor, int]:
        # A batch of rows cannot be written in place to the product of unbatched hidden states.
        return torch.vmap(patched_product, in_dims, randomness=info.randomness)(*operands), 0


def _product_without(indices: TokenIndices, grad: Tensor, base: Tensor) -> Tensor:
    """`G₀ W`: `grad @ base` with zeros in the gradient's columns of the ids."""
    start = indices.start_of_end(grad.shape[-1])
    if start is not None:  # the ids are the last ones: a view of the columns before will do
        return grad[..., :start] @ base[:start]
    zeroed = grad.index_fill(-1, indices.ids_on(base.device), 0)
    return first_columns(zeroed, len(base)) @ base


def _flat(tensor: Tensor) -> Tensor:
    # With -1 torch cannot tell how many rows an empty tensor has.
    return tensor.reshape(tensor.shape[:-1].numel(), tensor.shape[-1])


def _has_no_rule() -> bool:
    """Whether an autograd.Function cannot be used here.

    functionalize has no rule for one, forward mode over forward mode loses the outer tangent, and
    torch.compile has no rule for one under a transform. A graph for another runtime would contain
    its writes in place.
    """
    if torch.compiler.is_dynamo_compiling():
        return transforms_active() or is_exported()
    return is_exported() or in_dual_level() or at_work(FUNCTIONALIZE, JVP)


def cast_like(values: Tensor, base: Tensor) -> Tensor:
    """Rows in the dtype and on the device of the base."""
    return values.to(base.device, base.dtype)


def autocast(operand: Tensor) -> Tensor:
    """The cast of autocast for `F.linear`; done before the Function, its backward has it too."""
    dtype = autocast_dtype(operand.device)
    return operand if dtype is None or operand.dtype == torch.float64 else operand.to(dtype)
