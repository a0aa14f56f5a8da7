"""Calling a model with other weights than its own, without a change that others can see."""

from __future__ import annotations

import warnings
from collections.abc import AsyncIterator, Awaitable, Iterator, Mapping, Sequence
from functools import partial
from types import FunctionType, MethodType
from typing import Any

import torch
from torch import Tensor, nn

from ttfunc.call.copies import Copies
from ttfunc.call.known_paths import Model, model_at_call, path_to, tree_of
from ttfunc.call.matrices import is_patch
from ttfunc.call.own_reads import watch_of
from ttfunc.call.path import Path, Step, changed_meanwhile
from ttfunc.call.stale import tied_since
from ttfunc.call.swaps import Swap, sizes_of, swaps_of
from ttfunc.call.unread import check_logits, check_read
from ttfunc.model.given import is_token_module, refuse_token_module
from ttfunc.torch_private import is_compiled_in_vain, outside_of_graphs, transforms_active

# Results that may read the weights later, after the call.
_READS_LATER = (Iterator, Awaitable, AsyncIterator, FunctionType, MethodType)


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

    at: a module of the model whose method is called instead of the model's. It need not read the
    weights, and `method` may also be a function of the module.
    """
    if is_compiled_in_vain():
        return _in_eager(model, weights, args, kwargs, method, modes, at)
    modes, at_call = modes or {}, model_at_call(model)
    swaps = swaps_of(model, weights, at_call)
    if not (swaps or modes):  # every weight is the model's own
        return _method(at or model, method)(*args, **kwargs)
    sizes = sizes_of(swap.weight for swap in swaps)
    traced = torch.compiler.is_dynamo_compiling()
    if not traced:
        _warn_of_frozen_rows(model, swaps)
    path, steps = _path(model, swaps, modes, at_call)
    copies = Copies(steps, swaps, modes, sizes)
    called = _method(copies.model if at is None else copies.of(at), method)
    modes_now = model.training, torch.is_grad_enabled()
    kind = None if traced else (str(method), id(at), *modes_now, len(args), *kwargs)
    watch = watch_of(model, swaps, path, kind)
    try:
        out = copies.run(partial(called, *args, **kwargs), watch)
    except (IndexError, RuntimeError, ValueError, AssertionError) as error:
        if sizes and not traced:
            error.add_note(_bounded(model, sizes))
        raise
    if watch is not None:
        path.watched.add(kind)
    if at is None and not (traced or isinstance(out, _READS_LATER)):
        check_read(model, swaps, kwargs)
        if sizes:
            check_logits(model, swaps, sizes, out, method)
    return out


_in_eager = outside_of_graphs(call_copy)


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


def _path(
    model: nn.Module, swaps: Sequence[Swap], modes: Mapping[nn.Module, bool], at: Model | None
) -> tuple[Path, list[Step]]:
    """The path to the swaps. Raises ValueError for a matrix that was tied to more places since."""
    tensors = [tensor for swap in swaps for tensor in swap.held]
    path, steps, is_new = path_to(model, tensors, modes, at)
    if not is_new or torch.compiler.is_dynamo_compiling():
        return path, steps
    own = [swap for swap in swaps if swap.is_own]
    places = sum(len(swap.held) for swap in own)
    tree = tree_of(model) if at is None else at.tree
    if tree.count(tensor for swap in own for tensor in swap.held) != places:
        raise tied_since(model, own[0].names[0])
    on = {id(step.module) for step in steps}
    if not all(id(module) in on for swap in swaps for way in swap.ways for module in way):
        raise changed_meanwhile()
    if at is not None:
        at.known.remember((*tensors, *modes), path)
    return path, steps


def _warn_of_frozen_rows(model: nn.Module, swaps: Sequence[Swap]) -> None:
    """Warn if other parameters of the model are trained and the rows are not."""
    if not (model.training and torch.is_grad_enabled()) or transforms_active():
        return
    patches = [(swap.weight, swap) for swap in swaps if is_patch(swap.weight)]
    if not patches or any(
        weight.source.rows.values.requires_grad or any(one.requires_grad for one in swap.held)
        for weight, swap in patches
    ):
        return
    if any(parameter.requires_grad for parameter in model.parameters()):
        warnings.warn(
            f"the rows for {patches[0][1].names[0]!r} do not require grad, and parameters of the "
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
            f"{type(weights).__name__}. The order is functional_call(model, patch(params), args)."
        )
    for name, weight in weights.items():
        if not isinstance(name, str) or not isinstance(weight, Tensor):
            raise TypeError(
                f"weights must map names of parameters to tensors, got {name!r}: "
                f"{type(weight).__name__}."
            )
    # Weights for the module's own parameters are like those of any other module.
    if is_token_module(model) and any(map(is_patch, weights.values())):
        refuse_token_module(
            model, "module(...), or functional_call(module.base, patch(params), ...)"
        )
    if not isinstance(model, nn.Module):
        raise TypeError(
            f"functional_call needs a torch.nn.Module, got {type(model).__name__}. The order is "
            "functional_call(model, patch(params), args)."
        )
    if kwargs is not None and not isinstance(kwargs, Mapping):
        raise TypeError(
            f"kwargs must be a mapping from names to arguments, got {type(kwargs).__name__}. "
            "Several positional arguments go in a tuple: functional_call(model, weights, (x, y))."
        )
    if not (isinstance(method, str) and callable(getattr(model, method, None))):
        raise AttributeError(f"{type(model).__name__} has no method {method!r} to call.")
