"""The two reads of a matrix with replaced rows: looking rows up, and multiplying by all of them.

Both give what they would on `base.index_copy(0, ids, rows)`, without that copy and without a
gradient of its size. `base` is `(V, D)`, `rows` is `(k, D)` of the same dtype and device.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ttfunc.indices import TokenIndices


class Replaced(NamedTuple):
    """`(k, D)` rows in place of the `indices` of a base."""

    values: Tensor
    indices: TokenIndices
    by_example: bool = False

    def lookup(self, tokens: Tensor, base: Tensor, padding_idx: int | None = None) -> Tensor:
        """`F.embedding` of `(...)` integer tokens: `(..., D)`, differentiable by the rows alone."""
        frozen = F.embedding(tokens, base)
        hit, row = self.indices.find(tokens, base.device)
        padding_row = None if padding_idx is None else self.indices.row_of(padding_idx % len(base))
        replaced = F.embedding(row, self.values, padding_idx=padding_row)
        return torch.where(hit.unsqueeze(-1), replaced, frozen)

    def product(self, hidden: Tensor, base: Tensor, bias: Tensor | None = None) -> Tensor:
        """`F.linear` of `(..., D)` hidden states: `(..., V)`, differentiable by all but `base`."""
        bias = None if bias is None else autocast(bias)
        ids = self.indices.on(base.device).ids
        operands = (autocast(hidden), autocast(base), autocast(self.values), bias, ids)
        traced = torch.compiler.is_compiling()
        if functionalizing() or (traced and torch._C._are_functorch_transforms_active()):
            return _product(*operands)  # where torch has no rule for a Function
        function = _TracedProduct if traced else _Product
        result: Tensor = function.apply(*operands)  # type: ignore[no-untyped-call]
        return result

    def copied(self, base: Tensor) -> Tensor:
        """The matrix itself, `(V, D)`."""
        return base.index_copy(0, self.indices.on(base.device).ids, self.values)

    def beneath(self, base: Tensor) -> Tensor:
        """NaN in the shape of `base`, in no memory; its `(V, D)` gradient goes to the rows."""
        if torch.compiler.is_compiling() or functionalizing():
            return self.values.new_full((), torch.nan).expand(base.shape)
        ids = self.indices.on(base.device).ids
        carried: Tensor = _Carrier.apply(self.values, ids, len(base))  # type: ignore[no-untyped-call]
        return carried

    def map(self, func: Callable[[Tensor], Tensor]) -> Replaced:
        """The rows with a function applied that acts on each alone."""
        return self._replace(values=func(self.values))


def _product(
    hidden: Tensor, base: Tensor, rows: Tensor, bias: Tensor | None, ids: Tensor
) -> Tensor:
    some_bias = None if bias is None else bias.index_select(0, ids)
    return F.linear(hidden, base, bias).index_copy(-1, ids, F.linear(hidden, rows, some_bias))


class _TracedProduct(torch.autograd.Function):
    """The product with k columns written in place, and a backward to match.

    Plain autograd of `_product` keeps three buffers of the size of the logits. This keeps none, and
    its backward makes one, when those of the loss are gone. (Subtracting the old rows' part from
    `grad @ base` would make none, and cancel where an old row is large.)
    """

    @staticmethod
    def forward(
        hidden: Tensor, base: Tensor, rows: Tensor, bias: Tensor | None, ids: Tensor
    ) -> Tensor:
        some_bias = None if bias is None else bias.index_select(0, ids)
        fresh = F.linear(hidden, base, bias)
        return fresh.index_copy_(-1, ids, F.linear(hidden, rows, some_bias))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        hidden, base, rows, _, ids = inputs
        ctx.save_for_backward(hidden, base, rows, ids)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        hidden, base, rows, ids = ctx.saved_tensors
        needs_hidden, _, needs_rows, needs_bias, _ = ctx.needs_input_grad
        some = grad.index_select(-1, ids)
        to_hidden = to_rows = to_bias = None
        if needs_hidden:
            to_hidden = grad.index_fill(-1, ids, 0) @ base + some @ rows
        if needs_rows:
            to_rows = some.reshape(-1, rows.shape[0]).mT @ hidden.reshape(-1, rows.shape[1])
        if needs_bias:
            to_bias = grad.reshape(-1, base.shape[0]).sum(0)
        return to_hidden, None, to_rows, to_bias, None


class _Product(_TracedProduct):
    """The same with the rules for transforms, which torch.compile cannot trace."""

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        _TracedProduct.setup_context(ctx, inputs, output)
        hidden, base, rows, _, ids = inputs
        ctx.save_for_forward(hidden, base, rows, ids)

    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor | None) -> Tensor:
        hidden, base, rows, ids = ctx.saved_tensors
        to_hidden, _, to_rows, to_bias, _ = tangents
        to_hidden = torch.zeros_like(hidden) if to_hidden is None else to_hidden
        tangent = _product(to_hidden, base, rows, to_bias, ids)
        if to_rows is None:
            return tangent
        return tangent.index_add(-1, ids, F.linear(hidden, to_rows))

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], *operands: Any) -> tuple[Tensor, int]:
        # In place, a batch of rows would not fit into the product of an unbatched hidden state.
        return torch.vmap(_product, in_dims, randomness=info.randomness)(*operands), 0


class _Carrier(torch.autograd.Function):
    """NaN with a gradient: for an autograd.Function of the model's own that is given the weight."""

    generate_vmap_rule = True

    @staticmethod
    def forward(rows: Tensor, ids: Tensor, vocabulary: int) -> Tensor:
        return rows.new_full((), torch.nan).expand(vocabulary, rows.shape[-1])

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.save_for_backward(inputs[1])
        ctx.shape = output.shape

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (ids,) = ctx.saved_tensors
        return grad.index_select(0, ids), None, None

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor, *_: None) -> Tensor:
        return tangent.new_full((), torch.nan).expand(ctx.shape)


def functionalizing() -> bool:
    """Whether `torch.func.functionalize` is at work, which has no rule for a Function."""
    if torch.compiler.is_compiling() or not torch._C._are_functorch_transforms_active():
        return False
    stack = torch._C._functorch.get_interpreter_stack() or []
    return any(layer.key() == torch._C._functorch.TransformType.Functionalize for layer in stack)


def autocast(operand: Tensor) -> Tensor:
    """What autocast does to `F.linear`, done before the Function so that its backward agrees."""
    device = operand.device.type
    if not torch.amp.is_autocast_available(device):  # meta
        return operand
    if not torch.is_autocast_enabled(device) or operand.dtype == torch.float64:
        return operand
    return operand.to(torch.get_autocast_dtype(device))
