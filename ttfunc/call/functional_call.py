"""Calling a model with other weights than its own, without a change that others can see."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import AsyncIterator, Awaitable, Iterator, Mapping, Sequence
from functools import partial
from types import FunctionType, MethodType
from typing import Any

import torch
from torch import Tensor, nn

from ttfunc.call.copies import Copies
from ttfunc.call.own_reads import RefuseOwn, reached
from ttfunc.call.said import check_said
from ttfunc.call.slots import Slot, find_slots, is_patch, shown_in, sizes_of
from ttfunc.call.unread import check_read
from ttfunc.model.given import is_token_module, refuse_token_module
from ttfunc.model.matrix import Matrix, way_to
from ttfunc.model.path import ModulePath, Visit, find_path
from ttfunc.torch_private import is_exported, transforms_active

# Results that read the weights after the call.
_LATER = (Iterator, Awaitable, AsyncIterator, FunctionType, MethodType)


def functional_call(
    model: nn.Module,
    weights: Mapping[str, Tensor],
    args: Any = (),
    kwargs: Mapping[str, Any] | None = None,
    *,
    method: str = "forward",
    **misplaced: Any,
) -> Any:
    """Call the model with other weights; the model is not changed, not even during the call.

    >>> model = torch.nn.Embedding(100, 8)
    >>> params = ttfunc.init_deltas(model, [3], init=torch.ones(1, 8))
    >>> functional_call(model, ttfunc.patch(params), torch.tensor([[3, 4]]))[0, 0]
    tensor([1., 1., 1., 1., 1., 1., 1., 1.])

    The call runs on shallow copies of the modules that lead to these weights, and shares all else.
    So other threads, hooks and calls inside this one see the model as it is. Code that runs after
    the call (a recomputed checkpoint, a generator) still reads these weights.

    Args:
        model: any module. What a call sets on it, for example a cache, is there afterwards.
        weights: from `patch`, or any other tensors, by name. Give a tied weight under one of its
            names; the call uses it under all of them.
        args: positional arguments, as a tuple. Anything else is a single argument.
        kwargs: keyword arguments.
        method: which method to call, such as `"generate"`.
        misplaced: must be empty; the model's keyword arguments go in `kwargs`.

    Returns:
        What the model returns.

    Raises:
        KeyError: a name that the model does not have.
        ValueError: a patch made from another model, or from this one before its weights were
            replaced or tied; one weight given twice.
        TypeError: weights that are not a mapping; a model that cannot be copied.
        RuntimeError: the call read no patched matrix, so the rows had no effect; or it read the
            model's own matrix, through an object that cannot be copied.
        AttributeError: the model has no such method.

    Warns:
        UserWarning: the call read one of several patched matrices and not another; or it read new
            tokens and made no logits for them (once for a model).
    """
    _check_arguments(model, weights, kwargs, method, misplaced)
    given = args if isinstance(args, tuple) else (args,)
    try:
        return call_copy(model, weights, given, kwargs or {}, method)
    except Exception as error:
        if isinstance(args, Mapping) and kwargs is None:
            error.add_note(
                f"functional_call passed a {type(args).__name__} with {list(args)} as the one "
                "positional argument. For keyword arguments of the model write kwargs={...}."
            )
        raise


def call_copy(
    model: nn.Module,
    weights: Mapping[str, Tensor],
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    method: Any = "forward",
    modes: Mapping[nn.Module, bool] | None = None,
    at: nn.Module | None = None,
) -> Any:
    """`functional_call` with the modules of `modes` in these training modes.

    With `at`, a module of the model, its method is called, which need not read the weights; it may
    also be a function of that module.
    """
    modes = modes or {}
    slots = find_slots(model, weights)
    sizes = sizes_of(slots)
    if not (slots or modes):  # no weight but its own
        return _method(at or model, method)(*args, **kwargs)
    traced = torch.compiler.is_dynamo_compiling()
    if not traced:
        _warn_of_frozen_rows(model, slots)
    visits, uncopyable = _visits(model, slots, modes)
    own = [slot for slot in slots if slot.place is None]
    others = {id(slot.held): slot.stand_in for slot in own}
    copies = Copies(visits, others, modes, sizes, shown_in(slots))
    for place in (slot.place for slot in slots if slot.place is not None):
        place.copy = copies.of(place.module)
    called = _method(copies.model if at is None else copies.of(at), method)
    if traced and uncopyable:
        raise RuntimeError(reached(slots[0].name, uncopyable, "may be read in a compiled call"))
    try:
        with RefuseOwn(uncopyable, slots) if uncopyable else contextlib.nullcontext():
            out = called(*args, **kwargs)
    except (IndexError, RuntimeError, ValueError, AssertionError) as error:
        if sizes and not traced:
            error.add_note(_bounded(model, sizes))
        raise
    finally:  # what a model sets before it raises is there afterwards, as after any call
        copies.carry_over([slot.held for slot in own], _own)
    if at is None and not (traced or isinstance(out, _LATER)):
        check_read(model, slots, kwargs)
        if sizes:
            check_said(model, slots, sizes, out, method)
    return out


def _method(model: nn.Module, method: Any) -> Any:
    if callable(method):
        return partial(method, model)
    return model if method == "forward" else getattr(model, method)


def _bounded(model: nn.Module, sizes: Mapping[int, int]) -> str:
    return (
        f"The call has new tokens, rows of the matrix from {sizes}. If this {type(model).__name__} "
        "bounds its vocabulary elsewhere (another table of that size, a mask, an assertion), new "
        "tokens need a model that is resized: model.resize_token_embeddings(...), and init_deltas "
        "on it."
    )


def _own(value: Any) -> Any:
    """For a patched weight that a model has kept, the model's own; any other value as it is."""
    if not (isinstance(value, Tensor) and is_patch(value)) or value.source.matrix is None:
        return value
    own = value.source.matrix.tensor
    return own.mT if value.transposed else own


def _visits(
    model: nn.Module, slots: Sequence[Slot], modes: Mapping[nn.Module, bool]
) -> tuple[list[Visit], tuple[str, ...]]:
    """The modules to copy, and other objects that lead to the matrices.

    The paths that were found when the parameters were made are used while they are still right.
    """
    if modes or any(slot.matrix.path.model() is not model for slot in slots):
        path = find_path(model, [slot.held for slot in slots], modes)
        return list(_now(path).values()), path.uncopyable
    on: dict[int, Visit] = {}
    uncopyable: tuple[str, ...] = ()
    ways = {slot.name for slot in slots}
    for path, matrices in _by_path(slots):
        names = [name for matrix in matrices for name in matrix.names]
        through = [one for slot in slots if slot.matrix in matrices for one in slot.way]
        through += [one for name in names if name not in ways for one in way_to(model, name)]
        visits = path.visits()
        if visits is None or not all(id(module) in visits for module in through):
            path = find_path(model, [slot.held for slot in slots if slot.matrix in matrices])
            for matrix in matrices:
                matrix.path = path
            visits = _now(path)
        for key, visit in visits.items():
            on[key] = visit if key not in on else visit.joined(on[key])
        uncopyable += path.uncopyable
    return list(on.values()), uncopyable


def _by_path(slots: Sequence[Slot]) -> list[tuple[ModulePath, list[Matrix]]]:
    """The paths to the matrices; some have one path to all of them."""
    found: dict[int, tuple[ModulePath, list[Matrix]]] = {}
    for matrix in {id(slot.matrix): slot.matrix for slot in slots}.values():
        found.setdefault(id(matrix.path), (matrix.path, []))[1].append(matrix)
    return list(found.values())


def _now(path: ModulePath) -> dict[int, Visit]:
    visits = path.visits()
    if visits is None and is_exported():
        raise RuntimeError(
            "torch.export shows other modules of this model at each look, since it has one under "
            "several names. Export it with strict=True."
        )
    if visits is None:
        raise RuntimeError("the model was changed by another thread as the call began. Try again.")
    return visits


def _warn_of_frozen_rows(model: nn.Module, slots: Sequence[Slot]) -> None:
    """Warn where other parameters are trained and the rows are not."""
    if not (model.training and torch.is_grad_enabled()) or transforms_active():
        return
    patches = [(slot.weight, slot) for slot in slots if is_patch(slot.weight)]
    if not patches or any(
        weight.source.rows.values.requires_grad or slot.held.requires_grad
        for weight, slot in patches
    ):
        return
    if any(parameter.requires_grad for parameter in model.parameters()):
        warnings.warn(
            f"the rows for {patches[0][1].name!r} do not require grad, and parameters of the "
            f"{type(model).__name__} do (a LoRA?): backward would train those and leave the rows "
            "as they are. Make the rows with requires_grad=True (init_deltas, load and load_peft "
            "take it), or call model.eval() where nothing is trained.",
            stacklevel=4,
        )


def _check_arguments(
    model: object, weights: object, kwargs: object, method: object, misplaced: Mapping[str, Any]
) -> None:
    if misplaced:
        raise TypeError(
            f"functional_call() got {list(misplaced)}: keyword arguments of the model go in "
            f"kwargs={{{next(iter(misplaced))!r}: ...}}."
        )
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
    # Its own parameters are weights as any other.
    if is_token_module(model) and any(map(is_patch, weights.values())):
        refuse_token_module(
            model, "module(...), or functional_call(module.base, patch(params), ...)"
        )
    if not isinstance(model, nn.Module):
        raise TypeError(
            "functional_call(model, weights, args, kwargs) needs a torch.nn.Module, got "
            f"{type(model).__name__}."
        )
    if kwargs is not None and not isinstance(kwargs, Mapping):
        raise TypeError(
            f"kwargs must be a mapping from names to arguments, got {type(kwargs).__name__}. "
            "Several positional arguments go in a tuple: functional_call(model, weights, (x, y))."
        )
    if not (isinstance(method, str) and callable(getattr(model, method, None))):
        raise AttributeError(f"{type(model).__name__} has no method {method!r} to call.")
