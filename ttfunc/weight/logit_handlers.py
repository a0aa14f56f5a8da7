"""What deferred logits do without being made: change shape, dtype or scale, and give a loss.

A handler gets the arguments of the torch function. It returns the result, or NotImplemented; then
the function gets the logits.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ttfunc.torch_private import (
    GRAD,
    at_work,
    autocast_dtype,
    is_wrapped,
    no_torch_function,
    storage_key,
)
from ttfunc.weight.logits import DeferredLogits, can_defer, implements, pending_logits
from ttfunc.weight.loss import cross_entropies


def _reshaped(func: Callable[..., Any]) -> Callable[..., Any]:
    """A handler for a function that only changes the shape; V must stay the last dimension."""

    def handler(logits: Any, *args: Any, **kwargs: Any) -> Any:
        if not isinstance(logits, DeferredLogits):
            return NotImplemented

        def view(one: Tensor) -> Any:
            return func(one, *args, **kwargs)

        shape = logits.meta_after(view)
        if shape.dtype != logits.dtype or shape.ndim == 0 or shape.shape[-1] != logits.shape[-1]:
            return NotImplemented
        hidden = logits.pending.hidden
        hidden = hidden.reshape(*shape.shape[:-1], hidden.shape[-1])
        pending = logits.pending._replace(hidden=hidden)
        is_view = storage_key(shape) == storage_key(logits.meta)
        return logits.view_by(pending, view) if is_view else pending_logits(pending)

    return handler


for _func in (
    *(Tensor.view, Tensor.reshape, torch.reshape, Tensor.flatten, torch.flatten),
    *(Tensor.squeeze, torch.squeeze, Tensor.unsqueeze, torch.unsqueeze),
):
    implements(_func)(_reshaped(_func))


@implements(Tensor.__getitem__)
def _getitem(logits: Any, index: Any) -> Any:
    index = index if isinstance(index, tuple) else (index,)
    # As in torch, a tensor with one number selects a view, and any other tensor a copy.
    index = tuple(int(one) if _is_number(one) else one for one in index)
    if not isinstance(logits, DeferredLogits) or not _keeps_last(index, logits.ndim):
        return NotImplemented
    pending = logits.pending._replace(hidden=logits.pending.hidden[index])
    if any(isinstance(one, Tensor) for one in index):
        return pending_logits(pending)
    return logits.view_by(pending, lambda one: one[index])


def _is_number(index: Any) -> bool:
    if not isinstance(index, Tensor) or index.ndim or is_wrapped(index) or index.is_meta:
        return False
    return not (index.is_floating_point() or index.dtype in (torch.bool, torch.uint8))


def _keeps_last(index: tuple[Any, ...], ndim: int) -> bool:
    """Whether an index selects positions and keeps all V columns, and so fits hidden states too."""
    for one in index:
        known = one is None or one is ... or isinstance(one, (int, slice, Tensor))
        if not known or isinstance(one, (bool, DeferredLogits)):
            return False
    # Indices after an ellipsis belong to the last dimensions.
    ellipsis = next((place for place, one in enumerate(index) if one is ...), len(index))
    if sum(map(_dimensions, index)) == ndim or index[ellipsis + 1 :]:
        return isinstance(index[-1], slice) and index[-1] == slice(None)
    return True


def _dimensions(index: Any) -> int:
    """How many dimensions an index selects from."""
    if index is None or index is ...:
        return 0
    mask = isinstance(index, Tensor) and index.dtype in (torch.bool, torch.uint8)
    return index.ndim if mask else 1


@implements(Tensor.contiguous)
def _contiguous(logits: Any, *args: Any, **kwargs: Any) -> Any:
    if args or kwargs:
        return NotImplemented
    return logits if logits.meta.is_contiguous() else pending_logits(logits.pending)


@implements(Tensor.detach)
def _detach(logits: DeferredLogits) -> Any:
    with torch.no_grad():
        return logits.view_by(logits.pending, Tensor.detach)


def _from_the_nan(func: Callable[..., Any]) -> Callable[..., Any]:
    """A handler for a backward, which the NaN can do, since it has the history of the logits."""

    def handler(*args: Any, **kwargs: Any) -> Any:
        with no_torch_function():
            return func(*args, **kwargs)

    return handler


for _backward in (torch.autograd.grad, torch.autograd.backward, Tensor.backward):
    implements(_backward)(_from_the_nan(_backward))


def _stepwise(func: Callable[..., Any]) -> Callable[..., Any]:
    """A handler for a function of single numbers, which the loss applies to each chunk."""

    def handler(*args: Any, **kwargs: Any) -> Any:
        tensors = [one for one in (*args, *kwargs.values()) if isinstance(one, Tensor)]
        logits = next((one for one in args if isinstance(one, DeferredLogits)), None)
        if len(tensors) != 1 or logits is None or kwargs.get("rounding_mode") is not None:
            return NotImplemented
        place = next(place for place, one in enumerate(args) if one is logits)
        before, after = args[:place], args[place + 1 :]

        def step(chunk: Tensor) -> Any:
            return func(*before, chunk, *after, **kwargs)

        probe = logits.pending.hidden.new_empty(0, dtype=logits.dtype)
        seen = step(probe)
        if seen is probe:
            return logits
        if not seen.is_floating_point() or seen.device != probe.device or seen.shape != probe.shape:
            return NotImplemented
        pending = logits.pending._replace(steps=(*logits.pending.steps, step))
        return pending_logits(pending)

    return handler


for _step in (
    *(Tensor.to, Tensor.float, Tensor.double, Tensor.half, Tensor.bfloat16),
    *(Tensor.mul, torch.mul, Tensor.__mul__, Tensor.__rmul__),
    *(Tensor.div, torch.div, Tensor.__truediv__, Tensor.tanh, torch.tanh),
):
    implements(_step)(_stepwise(_step))


@implements(F.cross_entropy)
def _cross_entropy(
    input: Any,
    target: Any,
    weight: Any = None,
    size_average: Any = None,
    ignore_index: int = -100,
    reduce: Any = None,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
) -> Any:
    plain = size_average is None and reduce is None and reduction in ("none", "mean", "sum")
    if not plain or not _has_labels(input, target) or not 0 <= label_smoothing <= 1:
        return NotImplemented
    if weight is not None and (label_smoothing or weight.shape != input.shape[-1:]):
        return NotImplemented
    pending = input.pending.checked()
    if not can_defer(pending.hidden, pending.rows, pending.bias):
        return NotImplemented  # they are in another transform than the one that made them
    hidden, base, rows, bias, indices, steps, _ = pending
    losses = cross_entropies(
        hidden.reshape(-1, hidden.shape[-1]), base, rows, bias, indices, target.reshape(-1),
        steps=steps, ignore_index=ignore_index,
        label_smoothing=label_smoothing, once=at_work(GRAD),
    )  # fmt: skip
    labelled = target.reshape(-1) != ignore_index
    each: Any = labelled
    if weight is not None:
        chosen = weight.to(losses.dtype)[torch.where(labelled, target.reshape(-1), 0)]
        each = torch.where(labelled, chosen, 0)
        losses = losses * each
    if reduction == "none":
        losses = losses.reshape(target.shape)
    else:
        losses = losses.sum() / (each.sum() if reduction == "mean" else 1)
    # autocast has the loss in float32
    return losses if autocast_dtype(hidden.device) else losses.to(input.dtype)


def _has_labels(input: Any, target: Any) -> bool:
    """Whether these are logits with one label, a number, for each position."""
    if not isinstance(input, DeferredLogits) or not isinstance(target, Tensor):
        return False
    alike = target.shape == input.shape[:-1] and target.device == input.device
    return input.ndim <= 2 and target.dtype == torch.int64 and alike
