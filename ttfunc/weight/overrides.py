"""What torch functions do to a matrix: query it, transpose it, multiply by it, or write to it."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor

from ttfunc.torch_private import TensorBase, tree_leaves, writes_of

# Questions about the size: the matrix may have more rows than the base.
SIZES = {getattr(Tensor, name).__get__ for name in ("shape", "ndim", "nbytes")} | {
    *(Tensor.size, Tensor.dim, Tensor.ndimension, Tensor.numel, Tensor.nelement, Tensor.__len__),
    *(Tensor.is_contiguous, torch.numel),
}

# Questions about metadata, which the base answers: they read no values.
ANSWERED_BY_BASE = (
    SIZES
    | {
        getattr(Tensor, name).__get__
        for name in (
            *("dtype", "device", "layout", "itemsize", "is_cpu", "is_cuda", "is_meta"),
            *("is_sparse", "is_quantized", "is_nested", "is_mkldnn"),
        )
    }
    | {
        *(Tensor.element_size, Tensor.get_device, Tensor.is_floating_point, Tensor.is_complex),
        *(Tensor.is_signed, Tensor.is_conj, Tensor.is_neg, torch.is_conj, torch.is_neg),
        *(torch.is_floating_point, torch.is_complex, torch.is_signed),
    }
)

# Questions that the placeholder answers: about autograd, and about the layout in memory, which
# torch.compile compares with the layout that it finds.
ANSWERED_BY_PLACEHOLDER = {
    getattr(Tensor, name).__get__
    for name in ("requires_grad", "grad_fn", "is_leaf", "grad", "retains_grad", "output_nr")
} | {Tensor.stride, Tensor.storage_offset, Tensor.untyped_storage}

QUESTIONS = ANSWERED_BY_BASE | ANSWERED_BY_PLACEHOLDER

# Without torch.resize_as_ and a few private functions, which torch.compile fails to look up.
_IN_PLACE = r"(?!_|resize_as)\w+_|_foreach_\w+_"

# Functions that write to their first argument, or return a pointer to it.
WRITERS = (
    {
        func
        for namespace in (TensorBase, Tensor, torch, torch.nn.functional, torch.nn.init)
        for name, func in vars(namespace).items()
        if re.fullmatch(_IN_PLACE, name) and callable(func)
    }
    | {getattr(Tensor, name).__set__ for name in ("data", "grad", "requires_grad")}
    | {
        getattr(Tensor, f"__{name}__")
        for name in (
            *("setitem", "iadd", "isub", "imul", "itruediv", "ifloordiv", "imod", "ipow"),
            *("iand", "ior", "ixor", "ilshift", "irshift"),
        )
    }
    | {Tensor.data_ptr, Tensor.register_hook, Tensor.retain_grad}
    | {Tensor.register_post_accumulate_grad_hook}
)

AS_STRIDED = torch.ops.aten.as_strided.default

Handler = TypeVar("Handler", bound=Callable[..., Any])


def registry() -> tuple[dict[Any, Callable[..., Any]], Callable[..., Callable[[Handler], Handler]]]:
    """A table of handlers for torch functions, and the decorator that adds to it."""
    handlers: dict[Any, Callable[..., Any]] = {}

    def implements(*functions: Any) -> Callable[[Handler], Handler]:
        """Registers a handler for these torch functions."""

        def register(handler: Handler) -> Handler:
            handlers.update(dict.fromkeys(functions, handler))
            return handler

        return register

    return handlers, implements


def written_by(
    func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> list[Any]:
    """The arguments that `func` writes to, or returns a pointer to."""
    given = (*args, *kwargs.values())
    written = writes_of(func, args, kwargs)
    if written is not None:
        return tree_leaves(written)
    in_place = func in WRITERS or kwargs.get("inplace") is True
    return tree_leaves([given[:1] if in_place else (), kwargs.get("out")])


def refuse_writes(
    func: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    is_lost: Callable[[Any], bool],
) -> None:
    """Raise if `func` writes to a tensor that is made anew at each read, or takes its address.

    Also raise for `as_strided`: its strides would be those of the placeholder.
    """
    if any(map(is_lost, written_by(func, args, kwargs))):
        raise RuntimeError(
            f"{func.__name__} on a patched weight: the weight is made anew for each call, so what "
            "is written to it (or read through a pointer to it) would be lost. Write to the model "
            "or to the deltas before the call, or use patch(params, dense=True)."
        )
    if func is AS_STRIDED and is_lost(args[0]):
        raise RuntimeError(
            "as_strided on a patched weight: a patched weight does not lie in memory. Use "
            "patch(params, dense=True)."
        )


def transposes(*dims: int) -> bool:
    """Whether swapping these two dimensions of a matrix transposes it."""
    # In a matrix, -2 and 0 are the same dimension, and so are -1 and 1.
    return set(dims) <= {-2, -1, 0, 1} and dims[0] % 2 != dims[1] % 2


def einsum_as_product(equation: str, which: int, transposed: bool) -> tuple[str, str] | None:
    """An einsum of hidden states and a matrix, as a linear product between two permutations.

    `which` of the two operands is the `(V, D)` matrix, or the `(D, V)` one if `transposed`. Returns
    the equation that brings the hidden states to `(..., D)` and the one that brings `(..., V)` to
    the result; None where the einsum does more than that.
    """
    inputs, arrow, out = equation.replace(" ", "").partition("->")
    terms = inputs.split(",")
    if not arrow or len(terms) != 2 or len(terms[which]) != 2:
        return None
    token, feature = terms[which][0], terms[which][1]
    if transposed:
        token, feature = feature, token
    hidden, batch = terms[1 - which], out.replace(token, "")
    # Otherwise it sums over the tokens, or over a dimension of the batch.
    if token == feature or out.count(token) != 1 or sorted(batch + feature) != sorted(hidden):
        return None
    return f"{hidden}->{batch}{feature}", f"{batch}{token}->{out}"
