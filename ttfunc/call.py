"""Calling a model with other weights than its own, safely."""

from __future__ import annotations

import difflib
import warnings
from collections.abc import Iterable, Iterator, Mapping
from itertools import chain
from typing import Any, TypeGuard

import torch
from torch import Tensor, nn

from ttfunc.source import Source
from ttfunc.targets import Matrix, count_slots, matrix_of, memory_of
from ttfunc.turns import swapping, turn
from ttfunc.weight import PatchedWeight


def functional_call(
    model: nn.Module,
    weights: Mapping[str, Tensor],
    args: Any = (),
    kwargs: Mapping[str, Any] | None = None,
    *,
    method: str = "forward",
) -> Any:
    """`torch.func.functional_call`, safe for tied weights and shared modules, for any method.

    Args:
        model: its parameters and buffers are swapped for the length of the call, and are its own
            again afterwards, whether it returns or raises. Calls from several threads take turns;
            calling the model itself from another thread meanwhile, or from a hook within the call,
            runs it with these weights. A call within a call swaps the same weights, or is refused.
        weights: from `patch`, or any other tensors, by name. A tied weight goes by any one of its
            names and is swapped under all of them.
        args: positional arguments, a tuple; anything else is a single argument.
        kwargs: keyword arguments.
        method: what to call, such as `"generate"`.

    Returns:
        What the model returns. Warns if it read none of a patched matrix.

    Raises:
        KeyError: a name that the model does not have.
        ValueError: a patch made from another model, or from this one before its weights were
            replaced or tied; one weight given twice.
        TypeError: weights that are no mapping.
        AttributeError: the model has no such method.
    """
    if not isinstance(weights, Mapping):
        raise TypeError(
            f"weights must be a mapping from parameter names to tensors, got "
            f"{type(weights).__name__}. patch(params) gives one."
        )
    for name, weight in weights.items():
        if not isinstance(name, str) or not isinstance(weight, Tensor):
            raise TypeError(
                f"weights must map names of parameters to tensors, got {name!r}: "
                f"{type(weight).__name__}."
            )
    if not isinstance(model, nn.Module) or not isinstance(kwargs or {}, Mapping):
        raise TypeError(
            f"functional_call(model, weights, args, kwargs) needs a torch.nn.Module and a mapping, "
            f"got {type(model).__name__} and {type(kwargs).__name__}."
        )
    if not (isinstance(method, str) and callable(getattr(model, method, None))):
        raise AttributeError(f"{type(model).__name__} has no method {method!r} to call.")
    args = args if isinstance(args, tuple) else (args,)
    if torch.compiler.is_dynamo_compiling():  # the compiled code swaps nothing
        return _call(model, _swaps(model, weights), args, kwargs, method)
    with turn(), swapping(model, _places(model, swaps := _swaps(model, weights))):
        before = {id(w): (w, w.source.uses.copy()) for w in swaps.values() if _is_patch(w)}
        for weight, _ in before.values():
            weight.source.uses.clear()
        out = _call(model, swaps, args, kwargs, method)
        for weight, uses in before.values():
            _warn_if_unread(weight)
            weight.source.uses.update(uses)
    return out


def _call(
    model: nn.Module,
    swaps: dict[str, Tensor],
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any] | None,
    method: str,
) -> Any:
    called = model
    if method != "forward":
        called = _Method(model, method)
        swaps = {f"model.{name}": weight for name, weight in swaps.items()}
    return torch.func.functional_call(called, swaps, args, dict(kwargs or {}), tie_weights=False)


class _Method(nn.Module):
    """Another method of a model in the place of forward, which is all that torch calls."""

    def __init__(self, model: nn.Module, method: str) -> None:
        super().__init__()
        self.model = model
        self.method = method

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return getattr(self.model, self.method)(*args, **kwargs)


def _swaps(model: nn.Module, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The same weights, under one name for each place of the model that holds one."""
    swaps: dict[str, Tensor] = {}
    own: dict[int, Matrix] = {}
    for name, weight in weights.items():
        matrix = weight.source.matrix if isinstance(weight, PatchedWeight) else None
        if matrix is not None and name in matrix.names:
            own[id(matrix)] = matrix
            slots = matrix.slots
        else:  # under a name of the caller's own, as in a wrapper of the model
            slots = _slots(model, name)
        if isinstance(weight, PatchedWeight) and weight.source.rows.by_example:
            _check_batch_first(model)
        for slot, tensor in slots:
            if isinstance(weight, PatchedWeight) and matrix is not None:
                _check_fresh(model, slot, tensor, weight.source)
            elif weight.shape != tensor.shape:
                raise ValueError(
                    f"the weight for {slot!r} has shape {tuple(weight.shape)}, and that of "
                    f"{type(model).__name__} has {tuple(tensor.shape)}."
                )
            if swaps.setdefault(slot, weight) is not weight:
                raise ValueError(
                    f"{name!r} and another of the names {list(weights)} are one tied weight of "
                    f"{type(model).__name__} ({slot!r}). Give it once."
                )
    places = [slot for matrix in own.values() for slot, _ in matrix.slots]
    if not places or torch.compiler.is_dynamo_compiling():  # which traces no sets of ids
        return swaps
    if count_slots(model, [_held(model, slot) for slot in places]) != len(places):
        raise ValueError(
            f"{type(model).__name__} ties {places[0]!r} to more than it did when the parameters "
            "were made. Make them anew with init_deltas after tying the weights."
        )
    return swaps


def _slots(model: nn.Module, name: str) -> tuple[tuple[str, Tensor], ...]:
    """Every place of the model that holds what it has under `name`."""
    current = _held(model, name)
    if current is None:
        names = [n for n, _ in chain(model.named_parameters(), model.named_buffers())]
        close = difflib.get_close_matches(name, names, n=3, cutoff=0.5)
        hint = f" Did you mean {' or '.join(map(repr, close))}?" if close else ""
        raise KeyError(f"{type(model).__name__} has no parameter or buffer named {name!r}.{hint}")
    return matrix_of(model, current).slots


def _check_batch_first(model: nn.Module) -> None:
    if getattr(getattr(model, "config", None), "model_type", None) == "xlnet":
        raise ValueError(
            "a mixed patch needs the examples in the first dimension, and XLNet turns its batch "
            "before it looks tokens up. Call each adapter's examples on their own."
        )


def _check_fresh(model: nn.Module, name: str, tensor: Tensor, source: Source) -> None:
    """Raise ValueError unless the model holds `tensor` there, and it is what was patched."""
    held = _held(model, name)
    if isinstance(held, PatchedWeight) and held.source.matrix is not None:
        # A call inside a call: the weight of the outer one stands in the parameter's place.
        held = next((one for slot, one in held.source.matrix.slots if one is tensor), held)
    matrix = source.matrix
    # Resizing and casting may keep the Parameter and replace what is in it.
    if (
        held is tensor
        and (matrix is None or any(tensor is one for _, one in matrix.slots))
        and (source.memory is None or memory_of(tensor) == source.memory)
    ):
        return
    now = (
        "is not there"
        if held is None
        else f"is another one, {tuple(held.shape)} in {held.dtype} on {held.device}"
    )
    raise ValueError(
        f"stale patch: the parameter {name!r} that it was made from {now} in this "
        f"{type(model).__name__} (another model, one that was resized, cast or moved since, or a "
        "wrapper with names of its own). Call patch again, and init_deltas on this very model "
        "where the weights or their names are others."
    )


def _held(model: nn.Module, name: str) -> Tensor | None:
    """The parameter or buffer that the model has under `name` now."""
    module, attribute = _owner(model, name), name.rpartition(".")[2]
    if module is None:
        return None
    held = module._parameters.get(attribute)
    return module._buffers.get(attribute) if held is None else held


def _owner(model: nn.Module, name: str) -> nn.Module | None:
    path = name.rpartition(".")[0]
    module: nn.Module | None = model
    for part in path.split(".") if path else ():
        module = None if module is None else module._modules.get(part)
    return module


def _places(model: nn.Module, swaps: Iterable[str]) -> Iterator[tuple[nn.Module, str]]:
    for name in swaps:
        if (module := _owner(model, name)) is not None:
            yield module, name.rpartition(".")[2]


def _is_patch(weight: Tensor) -> TypeGuard[PatchedWeight]:
    return isinstance(weight, PatchedWeight)


def _warn_if_unread(weight: PatchedWeight) -> None:
    if not weight.source.uses and weight.source.matrix is not None:
        warnings.warn(
            f"the call did not read the patched matrix {weight.source.matrix.names}: its rows "
            "had no effect. Choose what the model does use with init_deltas(targets=...).",
            stacklevel=3,
        )
