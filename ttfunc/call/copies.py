"""Copies of the modules on the path, for one call.

A functional call runs on these copies, as with a persistent data structure: each copy has its own
dictionaries, and shares everything that is not on the path. The call puts the patched weights into
the copies, and never changes the model.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Container, Mapping, Sequence
from operator import is_
from sys import getrefcount
from types import MethodType
from typing import Any

import torch
from torch import nn

from ttfunc.call.matrices import is_patch
from ttfunc.call.own_reads import OwnReads
from ttfunc.call.path import HOOKS, Step
from ttfunc.call.references import HELD, refill, restored, slot_names, substituted
from ttfunc.call.swaps import Swap, hiding
from ttfunc.engines.live_parameters import LiveParameters
from ttfunc.engines.ownership import counts_on_module
from ttfunc.model.sizes import Resized
from ttfunc.torch_distributed_private import fsdp_manages, share_engine_state

_NONE: Mapping[str, Any] = {}


class Copies:
    """Copies of the modules on the path, with the weights of a call in them.

    modes: for a module whose copy has another training mode than the original, that mode. sizes:
    for each vocabulary that is larger in the call, its old size and the new one.
    """

    def __init__(
        self,
        steps: Sequence[Step],
        swaps: Sequence[Swap],
        modes: Mapping[nn.Module, bool],
        sizes: Mapping[int, int],
    ) -> None:
        self._originals = [step.module for step in steps]
        self._copies = [_empty_copy(step.module) for step in steps]
        self._swaps = swaps
        self._others: dict[int, Any] = {}
        self._back: dict[int, Any] = {}  # for each object of the call, the model's own
        for swap in (swap for swap in swaps if not swap.in_engine):
            self._others |= swap.replacements()
            self._back[id(swap.in_call)] = swap.held[0]
        self._weights = frozenset(self._back)
        self._back.update(zip(map(id, self._copies), self._originals, strict=True))
        self._others.update(zip(map(id, self._originals), self._copies, strict=True))
        self._resized = Resized(sizes) if sizes else None
        if self._resized:
            for step in steps:
                self._resized.put_into(step.state, step.leading)
            self._others.update(self._resized.others)
            self._back.update(self._resized.own)
        self._placed = []
        hidden = hiding(swaps)
        for step, copy in zip(steps, self._copies, strict=True):
            state = _state(step, self._others, hidden.get(step.module, _NONE))
            if modes:
                state["training"] = modes.get(step.module, step.module.training)
            vars(copy).update(state)
            share_engine_state(step.module, copy)
            # Most are empty, and need no record.
            held = [dict(state[part]) if state[part] else _NONE for part in HELD]
            self._placed.append((state, held, step.leading))
        for place, _ in (one for swap in swaps for one in swap.in_engine):
            place.copy = self.of(place.module)

    @property
    def model(self) -> nn.Module:
        """The copy of the model, which is called in its place."""
        return self._copies[0]

    def of(self, module: nn.Module) -> nn.Module:
        """The copy of a module of the model, or itself if it is not on the path."""
        return self._others.get(id(module), module)  # type: ignore[no-any-return]

    def run(self, call: Callable[[], Any], watch: OwnReads | None) -> Any:
        """Run the call and return its result; what the model sets on itself is kept.

        It is kept also if the call raises. An interrupt may come at any instruction, even while
        this method carries attributes over: then it does that again.
        """
        if torch.compiler.is_dynamo_compiling():
            try:
                return call()
            finally:
                self._carry_over()
        before = self._counts()
        try:
            try:
                if watch is not None:
                    watch.enter()
                return call()
            finally:
                self._end(watch, before)
        except BaseException:
            self._end(watch, before)
            raise

    def _end(self, watch: OwnReads | None, before: list[int]) -> None:
        if watch is not None:
            watch.leave()
        self._carry_over()
        # If no count has changed, no object of the model refers to a copy or a weight.
        if self._counts() != before:
            seen: dict[int, Any] = {}
            for original in self._originals:
                restored(original, self._own, seen)

    def _counts(self) -> list[int]:
        """The reference counts of the copies, and of weights that were made for this call."""
        weights = [swap.in_call for swap in self._swaps if swap.in_call is not swap.weight]
        sources = [weight.source for weight in weights if is_patch(weight)]
        return [*map(getrefcount, (*self._copies, *weights, *sources))]

    def _own(self, value: Any) -> Any:
        """The model's own object for an object of this call; any other value unchanged."""
        own = self._back.get(id(value))
        if own is not None:
            return own
        if not is_patch(value) or value.source.matrix is None:
            return value
        calls = (swap.in_call for swap in self._swaps)
        if not any(is_patch(one) and one.source.reads is value.source.reads for one in calls):
            return value  # the patch of another call, or of the caller
        tensor = value.source.matrix.tensor
        return tensor.mT if value.transposed else tensor

    def _carry_over(self) -> None:
        """Write attributes that the call has set on the copies to the originals.

        A tensor that the call has set in the place of a weight is dropped.
        """
        for original, copy, (state, held, leading) in zip(
            self._originals, self._copies, self._placed, strict=True
        ):
            found = vars(copy)
            for part, placed in zip(HELD, held, strict=True):
                if isinstance(found[part], LiveParameters):  # it writes to the original itself
                    continue
                if (placed or found[part]) and _differ(placed, found[part]):
                    self._carry(placed, found[part], vars(original)[part], self._weights)
            if _differ(state, found):
                self._carry(state, found, vars(original))
            if not torch.compiler.is_dynamo_compiling():
                self._refill(found, vars(original), leading)
                if type(copy) is not type(original):  # lazy modules change their class
                    original.__class__ = type(copy)
        if self._resized:
            self._resized.carry_over(self._restored)

    def _carry(
        self,
        placed: Mapping[str, Any],
        found: Mapping[str, Any],
        into: dict[str, Any],
        weights: Container[int] = (),
    ) -> None:
        kept = {name for name, one in placed.items() if id(one) in weights} if weights else ()
        for name, value in found.items():
            if (name not in placed or placed[name] is not value) and name not in kept:
                into[name] = self._restored(value)
        for name in placed:
            if name not in found and name not in kept:
                into.pop(name, None)

    def _restored(self, value: Any) -> Any:
        if torch.compiler.is_dynamo_compiling():
            return self._own(substituted(value, self._back))
        return restored(value, self._own, {})

    def _refill(self, found: dict[str, Any], into: dict[str, Any], names: Collection[str]) -> None:
        """Copy the items that the call has put into the copy's containers to the original's."""
        for name in names:
            value, mine = found.get(name), into.get(name)
            if value is not mine and type(value) is type(mine) and isinstance(value, (list, dict)):
                refill(mine, substituted(value, self._back))


def _empty_copy(module: nn.Module) -> nn.Module:
    kind: Any = type(module)
    if isinstance(module, (torch.jit.ScriptModule, nn.DataParallel)) or hasattr(kind, "__del__"):
        raise _not_copied(kind)
    copy: nn.Module = object.__new__(kind)
    if not torch.compiler.is_dynamo_compiling():
        for name in slot_names(kind):
            if hasattr(module, name):
                object.__setattr__(copy, name, getattr(module, name))
    return copy


def _state(step: Step, others: Mapping[int, Any], hidden: Mapping[str, Any]) -> dict[str, Any]:
    """The dictionary of a module's copy, with some objects replaced by others.

    hidden: attributes that shadow parameters, which the engine still finds in the module.
    """
    module, state = step.module, step.state
    own = module._parameters
    for part in HELD:
        held = dict(state[part])  # copied in one step: another thread may add to it
        for name, one in held.items():
            if id(one) in others:
                held[name] = others[id(one)]
        state[part] = held
    for name in step.leading:
        if name in HOOKS:
            hooks = list(state[name].items())
            state[name] = type(state[name])((k, _of_copy(one, module, others)) for k, one in hooks)
        elif name in state:
            state[name] = substituted(state[name], others)
    if "forward" in state and not fsdp_manages(module):
        # The forward of a tool (transformers' plans) may set a part of the matrix as the parameter.
        # Python finds an attribute in the module's dictionary before a parameter of that name.
        state.update(hidden)
    elif hidden or fsdp_manages(module):
        replaced = {n: one for n, one in state["_parameters"].items() if one is not own.get(n)}
        state["_parameters"] = LiveParameters(own, {**replaced, **hidden})
    return state


def _of_copy(hook: Any, module: nn.Module, others: Mapping[int, Any]) -> Any:
    """A hook of a module, as its copy has it."""
    if isinstance(hook, MethodType):
        return substituted(hook, others)
    if not counts_on_module(hook):
        return hook
    return lambda copy, *args, **kwargs: hook(module, *args, **kwargs)


def _differ(placed: Mapping[str, Any], found: Mapping[str, Any]) -> bool:
    """Whether any value is another object now; in most calls none is."""
    same = len(found) == len(placed) and all(map(is_, found, placed))
    return not (same and all(map(is_, found.values(), placed.values())))


def _not_copied(kind: type[nn.Module]) -> TypeError:
    return TypeError(
        f"a call copies each module between the model and its token matrix, and the "
        f"{kind.__name__} there cannot be copied (it is scripted, a DataParallel, or "
        "has a __del__ that would run for the copy). Call the module in it, or use "
        "torch.func.functional_call(model, patch(params), ...), which changes the model "
        "during the call."
    )
