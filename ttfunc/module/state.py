"""The parameters of a TokenModule and the entries of its state dict: what must hold of each."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Mapping
from reprlib import repr as brief
from typing import Any

from torch import Tensor, nn

from ttfunc.rows.deltas import RowSpec, TokenDeltas
from ttfunc.rows.renaming import key
from ttfunc.torch_private import mark_as_parameter


def as_parameter(delta: Tensor, name: str) -> nn.Parameter:
    """The same tensor as a Parameter, so that an optimizer that already holds it trains it."""
    if not delta.is_leaf or delta.is_inference():
        raise ValueError(
            f"the delta of {name!r} is computed from others, or was made in inference mode, so it "
            "cannot be a parameter that is trained. Give leaves: "
            "optree.tree_map(lambda t: t.detach().clone(), params)."
        )
    if not isinstance(delta, nn.Parameter):
        # nn.Parameter(delta) would be another tensor, with a gradient that the caller's own
        # optimizer never sees. So the class changes, as when torch fills a lazy parameter. (The
        # flag that torch gives to other classes satisfies nn.Module too, but tools make new
        # parameters by type(p)(...).)
        if type(delta) is Tensor:
            delta.__class__ = nn.Parameter
        else:
            mark_as_parameter(delta)
    return delta.requires_grad_()  # type: ignore[return-value]


def trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that require grad, by name; one that is tied, by its first name."""
    return {name: one for name, one in model.named_parameters() if one.requires_grad}


def check_trainable(
    model: nn.Module, free: Mapping[str, nn.Parameter], params: TokenDeltas, train_base: bool
) -> None:
    """Raise ValueError if the `free` parameters of the model must not require grad."""
    matrices = [spec.matrix for spec in params.specs.values() if spec.matrix is not None]
    with_rows = {id(tensor) for matrix in matrices for _, tensor in matrix.slots}
    if both := [name for name, one in free.items() if id(one) in with_rows]:
        raise ValueError(
            f"{len(free)} parameters of {type(model).__name__} require grad, and params have "
            f"rows of {both}: the rest of the matrix would get no gradient. Freeze the model "
            "first: model.requires_grad_(False). Or train the matrix whole, without rows."
        )
    if train_base and not free:
        warnings.warn(
            f"train_base=True, and nothing in {type(model).__name__} requires grad: only the rows "
            "are trained. Let what is to be trained (a LoRA, a head) require grad before the "
            "TokenModule is made, or leave train_base out.",
            stacklevel=3,
        )
    if free and not train_base:
        raise ValueError(
            f"{len(free)} parameters of {type(model).__name__} require grad ("
            f"{next(iter(free))!r}, …). Train them too, as parameters of the module: "
            "TokenModule(model, params, train_base=True). Or freeze them first: "
            "model.requires_grad_(False)."
        )


def check_trained(model: nn.Module, known: Mapping[str, nn.Parameter]) -> None:
    """Raise RuntimeError unless exactly the `known` parameters of the model require grad."""
    # named_parameters() takes several times as long, and this runs at every step.
    free = {
        id(one)
        for module in model.modules()
        for one in module._parameters.values()
        if one is not None and one.requires_grad
    }
    if free == {id(one) for one in known.values()}:
        return
    now = trainable(model)
    if new := [name for name, one in now.items() if known.get(name) is not one]:
        raise RuntimeError(
            f"{len(new)} parameters of the {type(model).__name__} in a TokenModule require grad "
            f"since it was made ({new[0]!r}, …): backward would fill their gradients, and no "
            "optimizer that is given this module sees them. Freeze them, or make the TokenModule "
            "(with train_base=True) and the optimizer anew."
        )
    gone = [name for name, one in known.items() if now.get(name) is not one]
    raise RuntimeError(
        f"{len(gone)} parameters that a TokenModule trains with its {type(model).__name__} no "
        f"longer require grad, or are no longer in it ({gone[0]!r}, …). Let them require grad, or "
        "make the TokenModule and the optimizer anew."
    )


def modes_after(model: nn.Module, mode: bool) -> dict[nn.Module, bool]:
    """The modes that `model.train(mode)` would set, by module; none is changed."""
    if all(type(module).train is nn.Module.train for module in model.modules()):
        return dict.fromkeys(model.modules(), mode)
    before = {module: module.training for module in model.modules()}
    model.train(mode)  # some modules keep a mode of their own
    after = {module: module.training for module in model.modules()}
    for module, was in before.items():
        module.training = was
    return after


def faults(
    specs: Mapping[str, RowSpec],
    trained: Iterable[str],
    state_dict: Mapping[str, Any],
    prefix: str,
) -> Iterator[str]:
    """The reasons why a state dict cannot be the state dict of these tokens."""
    held = {name for name, value in state_dict.items() if isinstance(value, Tensor)}
    for name, spec in specs.items():
        rows, ids = (prefix + key(kind, name) for kind in ("deltas", "token_indices"))
        expected = (len(spec.indices), spec.shape[1])
        if missing := [one for one in (rows, ids) if one not in held]:
            yield (
                f"it lacks {missing}, and begins with {list(state_dict)[:4]}. Load the "
                "state_dict() of a TokenModule over the same matrices."
            )
        elif tuple(state_dict[rows].shape) != expected:
            yield f"{rows!r} has shape {tuple(state_dict[rows].shape)}, and {expected} is needed."
        elif state_dict[ids].tolist() != list(spec.indices.ids):
            yield (
                f"{rows!r} are the rows of tokens {brief(state_dict[ids].tolist())}, but this "
                f"module trains {brief(list(spec.indices.ids))}. Make the module from init_deltas "
                "with the same ids, in the same order."
            )
    if absent := [one for one in trained if prefix + one not in held]:
        yield (
            f"it lacks {len(absent)} parameters that are trained beside the rows, such as "
            f"{absent[0]!r}. Load the state_dict() of a TokenModule with the same train_base."
        )
