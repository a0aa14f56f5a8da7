"""Copies of the modules on the path, for one call.

A functional call runs on them as an update of a persistent data structure does: each copy has
dictionaries of its own, and all that is not on the path is shared. The patched weight stands in the
copies, and the model is never changed, not even during the call.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Iterable, Mapping
from operator import is_
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn

from ttfunc.model.path import HELD, HOOKS, Path, Step
from ttfunc.model.references import CONTAINERS, mend, parts_of, refill, substituted


class Copies:
    """Copies of the modules on a path, in which others stand in the place of some tensors.

    others: what stands for a tensor, by the identity of that tensor. modes: the training mode of
    modules on the path, where it is not to be that of the original.
    """

    def __init__(
        self, path: Path, others: Mapping[int, Tensor], modes: Mapping[nn.Module, bool]
    ) -> None:
        self._traced = torch.compiler.is_dynamo_compiling()
        self._originals = [_alive(step) for step in path.steps]
        pairs = zip(self._originals, path.steps, strict=True)
        self._copies = [_empty_copy(module, step.slots) for module, step in pairs]
        self._others: dict[int, Any] = dict(others)
        self._others.update(zip(map(id, self._originals), self._copies, strict=True))
        self._placed = []
        for module, step, copy in zip(self._originals, path.steps, self._copies, strict=True):
            # torch.compile would guard every attribute that is looked at.
            names = step.attributes if self._traced else step.changed(vars(module))
            state = _state(module, names, self._others)
            state["training"] = modes.get(module, module.training)
            vars(copy).update(state)
            held = {part: dict(state[part]) for part in HELD}
            self._placed.append((state, held, {*step.containers, *names}))

    @property
    def model(self) -> nn.Module:
        """What is called in the place of the model."""
        return self._copies[0]

    def carry_over(self, tensors: Iterable[Tensor], own: Callable[[Any], Any]) -> None:
        """Give the originals what the call has noted on the copies, in their own terms.

        `tensors` are those that others stood for: what was set in their place is not kept. `own`
        gives what the model has in the place of a value that was made of a stand-in.
        """
        back: dict[int, Any] = {id(self._others[id(tensor)]): tensor for tensor in tensors}
        stand_ins = frozenset(back)
        back.update(zip(map(id, self._copies), self._originals, strict=True))
        for original, copy, (state, held, watched) in zip(
            self._originals, self._copies, self._placed, strict=True
        ):
            for part in HELD:
                if _differ(held[part], vars(copy)[part]):
                    ours = {name for name, one in held[part].items() if id(one) in stand_ins}
                    _carry(held[part], vars(copy)[part], vars(original)[part], back, own, ours)
            if _differ(state, vars(copy)):
                _carry(state, vars(copy), vars(original), back, own, ())
            if not self._traced:
                _refill_all(vars(copy), vars(original), back, watched)
                if type(copy) is not type(original):  # as lazy modules do
                    original.__class__ = type(copy)


def _alive(step: Step) -> nn.Module:
    module = step.module()
    if module is None:
        raise RuntimeError("a module of the path has been deleted. Make the parameters anew.")
    return module


def _empty_copy(module: nn.Module, slots: Iterable[str]) -> nn.Module:
    kind = type(module)
    if isinstance(module, (torch.jit.ScriptModule, nn.DataParallel)) or hasattr(kind, "__del__"):
        raise TypeError(
            f"a call runs on a copy of each module between the model and its token matrix, and "
            f"there is a {kind.__name__}, which cannot be copied (it is scripted, a DataParallel, "
            "or has a __del__ that would run for the copy). Call the module in it, or "
            "torch.func.functional_call(model, patch(params), ...), which changes the model for "
            "the length of the call."
        )
    copy = object.__new__(kind)
    for name in slots:
        if hasattr(module, name):
            object.__setattr__(copy, name, getattr(module, name))
    return copy


def _state(module: nn.Module, names: Iterable[str], others: Mapping[int, Any]) -> dict[str, Any]:
    """A module's attributes with others in the place of some; those of `names` are looked at."""
    state = dict(vars(module))  # at once: another thread may add to it
    for part in HELD:
        held = dict(state[part])
        state[part] = {name: others.get(id(one), one) for name, one in held.items()}
    for name in names:
        if name in HOOKS:
            state[name] = type(state[name])(
                (key, substituted(hook, others) if isinstance(hook, MethodType) else hook)
                for key, hook in list(state[name].items())
            )
        elif name in state:
            state[name] = substituted(state[name], others)
    return state


def _differ(placed: Mapping[str, Any], found: Mapping[str, Any]) -> bool:
    """Whether any value is another object now: in most calls none is."""
    same = found.keys() == placed.keys()
    return not (same and all(map(is_, found.values(), placed.values())))


def _carry(
    placed: Mapping[str, Any],
    found: Mapping[str, Any],
    into: dict[str, Any],
    back: Mapping[int, Any],
    own: Callable[[Any], Any],
    ours: Container[str],
) -> None:
    for name, value in found.items():
        if (name not in placed or placed[name] is not value) and name not in ours:
            into[name] = own(substituted(value, back))
            if not torch.compiler.is_dynamo_compiling():
                mend(into[name], back)
    for name in placed:
        if name not in found and name not in ours:
            into.pop(name, None)


def _refill_all(
    found: Mapping[str, Any], into: dict[str, Any], back: Mapping[int, Any], names: Iterable[str]
) -> None:
    """Give the containers of the original what the call has put into those of the copy."""
    for name in names:
        value = found.get(name)
        if type(value) not in CONTAINERS or name not in into:
            continue
        if into[name] is value and back.keys().isdisjoint(map(id, parts_of(value))):
            continue
        mine, fixed = into[name], substituted(value, back)
        if type(mine) is type(value) and (fixed is not value or mine is not value):
            refill(mine, fixed)
