"""The parameters of a TokenModule and the entries of its state dict: what must hold of each."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from reprlib import repr as shown
from typing import Any

from torch import Tensor, nn

from ttfunc.rows.deltas import RowSpec
from ttfunc.rows.renaming import key


def as_parameter(delta: Tensor, name: str) -> nn.Parameter:
    """The same tensor as a Parameter, so that an optimizer that already holds it trains it."""
    if not delta.is_leaf or delta.is_inference():
        raise ValueError(
            f"the delta of {name!r} is computed from others, or was made in inference mode, so it "
            "cannot be a parameter that is trained. Give leaves: "
            "optree.tree_map(lambda t: t.detach().clone(), params)."
        )
    if not isinstance(delta, nn.Parameter):
        delta.__class__ = nn.Parameter  # as torch does when it fills a lazy parameter
    return delta.requires_grad_()  # type: ignore[return-value]


def trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that require grad, by name; one that is tied, by its first name."""
    # named_parameters() takes several times as long, and this runs at every step.
    if not any(True for _ in _trainable_ones(model)):
        return {}
    return {name: one for name, one in model.named_parameters() if one.requires_grad}


def _trainable_ones(model: nn.Module) -> Iterator[nn.Parameter]:
    for module in model.modules():
        for one in module._parameters.values():
            if one is not None and one.requires_grad:
                yield one


def check_trained(model: nn.Module, known: Mapping[str, nn.Parameter]) -> None:
    """Raise RuntimeError unless exactly the `known` parameters of the model require grad."""
    if {id(one) for one in known.values()} == {id(one) for one in _trainable_ones(model)}:
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
    model.train(mode)  # some keep a mode of their own
    after = {module: module.training for module in model.modules()}
    for module, was in before.items():
        module.training = was
    return after


def faults(
    specs: Mapping[str, RowSpec],
    trained: Iterable[str],
    state_dict: Mapping[str, Any],
    prefix: str,
) -> list[str]:
    """The reasons why the entries of a state dict cannot be those of these tokens."""
    found = [
        fault
        for name, spec in specs.items()
        for fault in _faults_of_rows(name, spec, state_dict, prefix)
    ]
    lacking = [one for one in trained if not isinstance(state_dict.get(prefix + one), Tensor)]
    if lacking:
        found.append(
            f"it lacks {len(lacking)} parameters that are trained beside the rows, such as "
            f"{lacking[0]!r}. Load the state_dict() of a TokenModule with the same train_base."
        )
    return found


def _faults_of_rows(
    name: str, spec: RowSpec, state_dict: Mapping[str, Any], prefix: str
) -> Iterator[str]:
    rows, ids = (prefix + key(part, name) for part in ("deltas", "token_indices"))
    if missing := [one for one in (rows, ids) if not isinstance(state_dict.get(one), Tensor)]:
        yield (
            f"it lacks {missing}, and begins with {list(state_dict)[:4]}. Load the state_dict() of "
            "a TokenModule over the same matrices."
        )
        return
    expected = (len(spec.indices), spec.shape[1])
    if tuple(state_dict[rows].shape) != expected:
        yield f"{rows!r} has shape {tuple(state_dict[rows].shape)}, and {expected} is needed."
    elif state_dict[ids].tolist() != list(spec.indices.ids):
        yield (
            f"{rows!r} are the rows of tokens {shown(state_dict[ids].tolist())}, but this module "
            f"trains {shown(list(spec.indices.ids))}. Make the module from init_deltas with the "
            "same ids, in the same order."
        )
