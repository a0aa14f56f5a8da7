"""The path: the modules between a model and its token matrices, which a functional call copies."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass
from itertools import chain
from types import CodeType, FrameType, FunctionType, MethodType, ModuleType, TracebackType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ttfunc.model.references import global_references, references
from ttfunc.model.sight import PLUMBING, Sight, callables
from ttfunc.torch_private import ENGINE_STATE

HELD = ("_parameters", "_buffers", "_modules")
HOOKS = ("_forward_hooks", "_forward_pre_hooks")
# Objects that are not searched: they belong to all code, or to the library.
_APART = (type, ModuleType, FrameType, CodeType, FunctionType, TracebackType)


class Visit(NamedTuple):
    """A module of the path at a call.

    state: a copy of its dictionary. watched: the attributes that may lead further along the path.
    containers: the attributes that are lists and the like. slot_names: the attributes that it keeps
    outside of the dictionary.
    """

    module: nn.Module
    state: dict[str, Any]
    watched: Collection[str]
    containers: Collection[str]
    slot_names: tuple[str, ...]

    def joined(self, other: Visit) -> Visit:
        """One visit for a module that is on two paths."""
        return self._replace(watched={*self.watched, *other.watched})


@dataclass(eq=False)
class Step:
    """A module on the path.

    attributes: those other than its parameters, buffers and submodules that lead further along the
    path, for example through a list or a closure. sight: what it was like at the last visit.
    slot_names: the attributes that it keeps outside of its dictionary.
    """

    module: weakref.ref[nn.Module]
    attributes: tuple[str, ...]
    sight: Sight
    slot_names: tuple[str, ...]

    def visit(self) -> Visit | None:
        """The module as it is now; None if it is gone, or if its functions have changed since."""
        module = self.module()
        if module is None:
            return None
        state = vars(module).copy()  # in one step: another thread may add to it
        if torch.compiler.is_dynamo_compiling():  # Dynamo would guard on everything that is read
            same = callables(state) == self.sight.callables
            return Visit(module, state, self.attributes, (), self.slot_names) if same else None
        if not self.sight.holds(state):
            sight = self.sight.renewed(state)
            if sight.callables != self.sight.callables:
                return None
            self.sight = sight
        watched, containers = self.sight.watched, self.sight.containers
        if hooks := [name for name in HOOKS if state[name]]:
            watched, containers = watched.union(hooks), (*containers, *hooks)
        return Visit(module, state, watched, containers, self.slot_names)


@dataclass(frozen=True, eq=False)
class ModulePath:
    """The modules through which some tensors of `model` are reached; the model comes first.

    The references are weak: trained rows do not keep a model alive. uncopyable: other objects that
    reach the tensors and cannot be copied (an object that is not a module, a global of a function).
    """

    model: weakref.ref[nn.Module]
    steps: tuple[Step, ...]
    uncopyable: tuple[str, ...]

    def visits(self) -> dict[int, Visit] | None:
        """Its modules as they are now, by identity; None if one may lead elsewhere now."""
        found: dict[int, Visit] = {}
        for step in self.steps:
            visit = step.visit()
            if visit is None:
                return None
            found[id(visit.module)] = visit
        return found


def find_path(
    model: nn.Module, tensors: Iterable[Tensor], through: Iterable[nn.Module] = ()
) -> ModulePath:
    """The path to exactly these tensors; the modules in `through` are on it too."""
    referrers = _referrers(model)
    on: dict[int, nn.Module] = {id(one): one for one in (model, *through)}
    leading: dict[int, dict[str, None]] = {}
    uncopyable: dict[str, None] = {}
    pending, seen = [*map(id, tensors), *on], set()
    while pending:
        if (one := pending.pop()) in seen:
            continue
        seen.add(one)
        for module, attribute, is_uncopyable in referrers.get(one, ()):
            if is_uncopyable:
                uncopyable[f"{type(module).__name__}.{attribute}"] = None
                continue
            on[id(module)] = module
            if attribute not in HELD:
                leading.setdefault(id(module), {})[attribute] = None
            pending.append(id(module))
    steps = [_step(module, tuple(leading.get(key, ()))) for key, module in on.items()]
    return ModulePath(weakref.ref(model), tuple(steps), tuple(uncopyable))


def _step(module: nn.Module, attributes: tuple[str, ...]) -> Step:
    declared = [vars(base).get("__slots__", ()) for base in type(module).__mro__]
    names = chain.from_iterable((one,) if isinstance(one, str) else one for one in declared)
    sight = Sight.of(vars(module).copy(), attributes)
    return Step(weakref.ref(module), attributes, sight, tuple(names))


def _referrers(model: nn.Module) -> dict[int, list[tuple[nn.Module, str, bool]]]:
    """For each module and tensor that `model` reaches, by identity, what refers to it.

    Each referrer is a module, the name of its attribute, and whether the reference goes through an
    object that cannot be copied.
    """
    found: dict[int, list[tuple[nn.Module, str, bool]]] = {}
    pending, seen = [model], {id(model)}
    while pending:
        module = pending.pop()
        for attribute, one, uncopyable in _leads(module):
            found.setdefault(id(one), []).append((module, attribute, uncopyable))
            if isinstance(one, nn.Module) and not uncopyable and id(one) not in seen:
                seen.add(id(one))
                pending.append(one)
    return found


def _leads(module: nn.Module) -> Iterator[tuple[str, object, bool]]:
    for part in HELD:
        for one in list(getattr(module, part).values()):
            if one is not None:
                yield part, one, False
    for name in HOOKS:
        for hook in list(getattr(module, name).values()):
            if isinstance(hook, MethodType) and isinstance(hook.__self__, nn.Module):
                yield name, hook.__self__, False
    for name, value in list(vars(module).items()):
        if name in PLUMBING or name.startswith(ENGINE_STATE):
            continue
        for one in references(value):
            if isinstance(one, (nn.Module, Tensor)):
                yield name, one, False
            else:
                yield from ((name, other, True) for other in _within(one))
        yield from ((name, other, True) for other in global_references(value))


def _within(value: object, most: int = 100_000) -> Iterator[object]:
    """The modules and tensors that an object of another class holds, directly or indirectly."""
    pending, seen = [value], {id(value)}
    while pending and len(seen) < most:
        one = pending.pop()
        if isinstance(one, _APART) or type(one).__module__.startswith("ttfunc"):
            continue
        for held in gc.get_referents(one):
            if isinstance(held, (nn.Module, Tensor)):
                yield held
            elif id(held) not in seen and gc.is_tracked(held):
                seen.add(id(held))
                pending.append(held)
