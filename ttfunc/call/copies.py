"""Copies of the modules on the path, for one call.

A functional call runs on these copies, as with a persistent data structure: each copy has
dictionaries of its own, and everything that is not on the path is shared. The patched weight is put
into the copies. The model is never changed, not even during the call.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Container, Iterable, Mapping, Sequence
from operator import is_
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn

from ttfunc.engines.live_parameters import LiveParameters
from ttfunc.engines.ownership import counts_on_module
from ttfunc.model.path import HELD, HOOKS, Visit
from ttfunc.model.references import CONTAINERS, refill, substitute_attributes, substituted
from ttfunc.model.sizes import Resized
from ttfunc.torch_private import fsdp_manages, share_engine_state

_NONE: Mapping[str, Any] = {}


class Copies:
    """Copies of the visited modules, in which some tensors are replaced by others.

    others: the replacement of each tensor, by the identity of that tensor. modes: the training mode
    of each module whose copy is to have another mode than the original. sizes: of a vocabulary that
    has another size in the call, from the old one to the new one. shown: for some modules,
    attributes that hide parameters, which stay where an engine looks for them.
    """

    def __init__(
        self,
        visits: Sequence[Visit],
        others: Mapping[int, Tensor],
        modes: Mapping[nn.Module, bool],
        sizes: Mapping[int, int],
        shown: Mapping[nn.Module, Mapping[str, Tensor]] = _NONE,  # type: ignore[assignment]
    ) -> None:
        self._originals = [visit.module for visit in visits]
        self._copies = [_empty_copy(visit.module, visit.slot_names) for visit in visits]
        self._others: dict[int, Any] = dict(others)
        self._others.update(zip(map(id, self._originals), self._copies, strict=True))
        self._placed = []
        self._resized = Resized(sizes) if sizes else None
        if self._resized:
            for visit in visits:
                self._resized.put_into(visit.state, visit.watched)
            self._others.update(self._resized.others)
        for visit, copy in zip(visits, self._copies, strict=True):
            state = _state(visit, self._others)
            if modes:
                state["training"] = modes.get(visit.module, visit.module.training)
            hidden = shown.get(visit.module, _NONE)
            if "forward" in state and not fsdp_manages(visit.module):
                # A tool's forward may put a part in the parameter's place (transformers' plans do).
                # An attribute of the module's dictionary is found before a parameter of that name.
                state.update(hidden)
            elif hidden or fsdp_manages(visit.module):
                own = visit.module._parameters
                replaced = {
                    name: one
                    for name, one in state["_parameters"].items()
                    if one is not own.get(name)
                }
                state["_parameters"] = LiveParameters(own, {**replaced, **hidden})
            vars(copy).update(state)
            share_engine_state(visit.module, copy)
            # Most are empty, and need no record of what was in them.
            held = [dict(state[part]) if state[part] else _NONE for part in HELD]
            self._placed.append((state, held, visit.containers))

    @property
    def model(self) -> nn.Module:
        """The copy of the model, which is called in its place."""
        return self._copies[0]

    def of(self, module: nn.Module) -> nn.Module:
        """The copy of a module of the model, or itself if it is not on the path."""
        return self._others.get(id(module), module)  # type: ignore[no-any-return]

    def carry_over(self, tensors: Iterable[Tensor], own: Callable[[Any], Any]) -> None:
        """Write what the call has set on the copies back to the originals, without stand-ins.

        `tensors` are those that were replaced by others: what the call set in their place is not
        kept. For a value that was made from a stand-in, `own` gives the model's own value.
        """
        back: dict[int, Any] = {id(self._others[id(tensor)]): tensor for tensor in tensors}
        stand_ins = frozenset(back)
        back.update(zip(map(id, self._copies), self._originals, strict=True))
        if self._resized:
            back.update(self._resized.own)
        traced = torch.compiler.is_dynamo_compiling()
        for original, copy, (state, held, containers) in zip(
            self._originals, self._copies, self._placed, strict=True
        ):
            found = vars(copy)
            for part, placed in zip(HELD, held, strict=True):
                if isinstance(found[part], LiveParameters):  # it has written there itself
                    continue
                if (placed or found[part]) and _differ(placed, found[part]):
                    ours = {name for name, one in placed.items() if id(one) in stand_ins}
                    _carry(placed, found[part], vars(original)[part], back, own, ours)
            if _differ(state, found):
                _carry(state, found, vars(original), back, own, ())
            if not traced:
                _refill_all(found, vars(original), back, containers)
                if type(copy) is not type(original):  # lazy modules change their class
                    original.__class__ = type(copy)
        if self._resized:
            self._resized.carry_over(lambda value: own(substituted(value, back)))


def _empty_copy(module: nn.Module, slot_names: Iterable[str]) -> nn.Module:
    kind = type(module)
    if isinstance(module, (torch.jit.ScriptModule, nn.DataParallel)) or hasattr(kind, "__del__"):
        raise TypeError(
            f"a call copies each module between the model and its token matrix, and the "
            f"{kind.__name__} there cannot be copied (it is scripted, a DataParallel, "
            "or has a __del__ that would run for the copy). Call the module in it, or use "
            "torch.func.functional_call(model, patch(params), ...), which changes the model "
            "during the call."
        )
    copy = object.__new__(kind)
    for name in slot_names:
        if hasattr(module, name):
            object.__setattr__(copy, name, getattr(module, name))
    return copy


def _state(visit: Visit, others: Mapping[int, Any]) -> dict[str, Any]:
    """The state of a visited module, with some objects replaced by others."""
    state = visit.state
    for part in HELD:
        held = dict(state[part])  # copied in one step: another thread may add to it
        for name, one in held.items():
            if id(one) in others:
                held[name] = others[id(one)]
        state[part] = held
    for name in visit.watched:
        if name in HOOKS:
            state[name] = type(state[name])(
                (key, _of_copy(hook, visit.module, others))
                for key, hook in list(state[name].items())
            )
        elif name in state:
            state[name] = substituted(state[name], others)
    return state


def _of_copy(hook: Any, module: nn.Module, others: Mapping[int, Any]) -> Any:
    """The hook of a module, for its copy."""
    if isinstance(hook, MethodType):
        return substituted(hook, others)
    if not counts_on_module(hook):
        return hook
    return lambda copy, *args, **kwargs: hook(module, *args, **kwargs)


def _differ(placed: Mapping[str, Any], found: Mapping[str, Any]) -> bool:
    """Whether any value is another object now: in most calls none is."""
    same = list(found) == list(placed) and all(map(is_, found.values(), placed.values()))
    return not same


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
                substitute_attributes(into[name], back)
    for name in placed:
        if name not in found and name not in ours:
            into.pop(name, None)


def _refill_all(
    found: dict[str, Any], into: dict[str, Any], back: Mapping[int, Any], names: Collection[str]
) -> None:
    """Put into the original's containers what the call has put into the copy's."""
    for value, mine in zip(map(found.get, names), map(into.get, names), strict=True):
        if (value is mine and not value) or type(value) not in CONTAINERS:
            continue
        held: Any = value.values() if isinstance(value, dict) else value
        if value is mine and back.keys().isdisjoint(map(id, held)):
            continue
        fixed = substituted(value, back)
        if type(mine) is type(value) and (fixed is not value or mine is not value):
            refill(mine, fixed)
