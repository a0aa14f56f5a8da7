"""Calling a model with other weights than its own, safely."""

from __future__ import annotations

import difflib
import warnings
from collections.abc import Iterable, Mapping, Sequence
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from ttfunc.targets import Matrix, count_slots, matrix_of
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
            again afterwards, whether it returns or raises.
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
    patches = {id(w): w for w in weights.values() if isinstance(w, PatchedWeight)}
    swaps = _swaps(model, weights)
    if not torch.compiler.is_compiling():
        for weight in patches.values():
            weight.source.uses.clear()

    if method == "forward":
        call = model
    else:
        if not callable(getattr(model, method, None)):
            raise AttributeError(f"{type(model).__name__} has no method {method!r} to call.")
        call = _Method(model, method)
        swaps = {f"model.{name}": weight for name, weight in swaps.items()}
    args = args if isinstance(args, tuple) else (args,)
    out = torch.func.functional_call(call, swaps, args, dict(kwargs or {}), tie_weights=False)

    if not torch.compiler.is_compiling():
        _warn_of_unread(patches.values())
    return out


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
    own: list[tuple[PatchedWeight, Matrix]] = []
    for name, weight in weights.items():
        matrix = weight.source.matrix if isinstance(weight, PatchedWeight) else None
        slots: Sequence[tuple[str, Tensor]]
        if isinstance(weight, PatchedWeight) and matrix is not None and name in matrix.names:
            own.append((weight, matrix))
            slots = matrix.slots
        else:  # under a name of the caller's own, as in a wrapper of the model
            slots = _slots(model, name, matrix)
        for slot, _ in slots:
            if swaps.setdefault(slot, weight) is not weight:
                raise ValueError(
                    f"{name!r} and another of the names {list(weights)} are one tied weight of "
                    f"{type(model).__name__} ({slot!r}). Give it once."
                )
    if not torch.compiler.is_compiling():  # where ids cannot be read; the eager call has checked
        _check_fresh(model, own)
    return swaps


def _slots(model: nn.Module, name: str, matrix: Matrix | None) -> Sequence[tuple[str, Tensor]]:
    current = _held(model, name)
    if current is None:
        names = [n for n, _ in chain(model.named_parameters(), model.named_buffers())]
        close = difflib.get_close_matches(name, names, n=3, cutoff=0.5)
        hint = f" Did you mean {' or '.join(map(repr, close))}?" if close else ""
        raise KeyError(f"{type(model).__name__} has no parameter or buffer named {name!r}.{hint}")
    if matrix is not None and all(current is not parameter for _, parameter in matrix.slots):
        raise _stale(model, name)
    if isinstance(current, nn.Parameter):
        return matrix_of(model, current).slots
    return [(name, current)]


def _check_fresh(model: nn.Module, own: Sequence[tuple[PatchedWeight, Matrix]]) -> None:
    for weight, matrix in own:
        for name, parameter in matrix.slots:
            # Resizing and casting may keep the Parameter and replace what is in it.
            if _held(model, name) is not parameter or parameter.shape != weight.shape:
                raise _stale(model, name)
            if parameter.dtype != weight.dtype or parameter.device != weight.device:
                raise _stale(model, name)
    matrices = {id(matrix): matrix for _, matrix in own}.values()
    slots = [name for matrix in matrices for name, _ in matrix.slots]
    if slots and count_slots(model, matrices) != len(slots):
        raise ValueError(
            f"{type(model).__name__} ties {slots[0]!r} to more than it did when the parameters "
            "were made. Make them anew with init_deltas after tying the weights."
        )


def _stale(model: nn.Module, name: str) -> ValueError:
    held = _held(model, name)
    now = (
        "is not there"
        if held is None
        else f"is another one, {tuple(held.shape)} in {held.dtype} on {held.device}"
    )
    return ValueError(
        f"stale patch: the parameter {name!r} that it was made from {now} in this "
        f"{type(model).__name__} (another model, or one that was resized, cast or moved since). "
        "Call patch again, and init_deltas where the weights were replaced."
    )


def _held(model: nn.Module, name: str) -> Tensor | None:
    """The parameter or buffer that the model has under `name` now."""
    path, _, attribute = name.rpartition(".")
    module: nn.Module | None = model
    for part in path.split(".") if path else ():
        module = None if module is None else module._modules.get(part)
    if module is None:
        return None
    held = module._parameters.get(attribute)
    return module._buffers.get(attribute) if held is None else held


def _warn_of_unread(weights: Iterable[PatchedWeight]) -> None:
    for weight in weights:
        if not weight.source.uses and weight.source.matrix is not None:
            warnings.warn(
                f"the call did not read the patched matrix {weight.source.matrix.names}: its rows "
                "had no effect. Choose what the model does use with init_deltas(targets=...).",
                stacklevel=3,
            )
