"""The path: the modules between a model and its token matrices, which a functional call copies."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from types import CodeType, FrameType, FunctionType, MethodType, ModuleType, TracebackType
from typing import Any

from torch import Tensor, nn

from ttfunc.model.references import CALLABLES, CONTAINERS, PLAIN, global_references, references

HELD = ("_parameters", "_buffers", "_modules")
HOOKS = ("_forward_hooks", "_forward_pre_hooks")
# What torch itself keeps in each module: hooks and flags.
PLUMBING = frozenset(vars(nn.Module()))
# What is not looked into: it is of everybody, or of the library.
_APART = (type, ModuleType, FrameType, CodeType, FunctionType, TracebackType)


@dataclass(frozen=True, eq=False)
class Step:
    """A module on the path.

    attributes: those outside of its parameters, buffers and submodules that lead on along the path,
    in a list or a closure say. callables: the identities of all its own functions, such as a
    `forward` that a tool has set: others may lead on too. containers: identity and length of all
    its lists and the like: others may lead on too. slots: what it keeps outside of its dictionary.
    """

    module: weakref.ref[nn.Module]
    attributes: tuple[str, ...]
    callables: dict[str, int]
    containers: dict[str, tuple[int, int]]
    slots: tuple[str, ...]

    def changed(self, state: Mapping[str, Any]) -> list[str]:
        """The attributes in which the way may lead on: as it was found, and where that changed."""
        known = self.containers
        return [
            name
            for name, value in list(state.items())
            if type(value) not in PLAIN
            and name not in PLUMBING
            and (
                name in self.attributes
                or type(value) not in CONTAINERS
                or known.get(name) != (id(value), len(value))
            )
        ] + [name for name in HOOKS if state[name]]


@dataclass(frozen=True, eq=False)
class Path:
    """The modules from which some tensors of `model` are reached, the model first.

    The references are weak: what is trained does not keep a model alive. aside: what else reaches
    them, and cannot be copied (an object that is no module, a global of a function).
    """

    model: weakref.ref[nn.Module]
    steps: tuple[Step, ...]
    aside: tuple[str, ...]

    def leads_through(self, modules: Iterable[nn.Module]) -> bool:
        """Whether all of these are on the path, and no module of it has got a function since."""
        on = [(step.module(), step) for step in self.steps]
        if any(module is None or _callables(module) != step.callables for module, step in on):
            return False
        return all(any(module is other for other, _ in on) for module in modules)


def find_path(
    model: nn.Module, tensors: Iterable[Tensor], through: Iterable[nn.Module] = ()
) -> Path:
    """The path to these very tensors, and to the modules of `through`, which are on it."""
    referrers = _referrers(model)
    on: dict[int, nn.Module] = {id(one): one for one in (model, *through)}
    leading: dict[int, dict[str, None]] = {}
    aside: dict[str, None] = {}
    pending, seen = [*map(id, tensors), *on], set()
    while pending:
        if (one := pending.pop()) in seen:
            continue
        seen.add(one)
        for module, attribute, reached_aside in referrers.get(one, ()):
            if reached_aside:
                aside[f"{type(module).__name__}.{attribute}"] = None
                continue
            on[id(module)] = module
            if attribute not in HELD:
                leading.setdefault(id(module), {})[attribute] = None
            pending.append(id(module))
    steps = [_step(module, tuple(leading.get(key, ()))) for key, module in on.items()]
    return Path(weakref.ref(model), tuple(steps), tuple(aside))


def joined(model: nn.Module, paths: Sequence[Path]) -> Path:
    """One path for all of `paths` of a model."""
    if len(paths) == 1:
        return paths[0]
    steps: dict[int, Step] = {id(model): _step(model, ())}
    for step in (step for path in paths for step in path.steps):
        key = id(step.module())
        before = steps.get(key, step)
        attributes = dict.fromkeys((*before.attributes, *step.attributes))
        steps[key] = replace(step, attributes=tuple(attributes))
    aside = dict.fromkeys(name for path in paths for name in path.aside)
    return Path(weakref.ref(model), tuple(steps.values()), tuple(aside))


def _step(module: nn.Module, attributes: tuple[str, ...]) -> Step:
    held = list(vars(module).items())  # which another thread may change
    containers = {
        name: (id(value), len(value))
        for name, value in held
        if type(value) in CONTAINERS and name not in PLUMBING
    }
    slots = [vars(base).get("__slots__", ()) for base in type(module).__mro__]
    names = chain.from_iterable((one,) if isinstance(one, str) else one for one in slots)
    return Step(weakref.ref(module), attributes, _callables(module), containers, tuple(names))


def _callables(module: nn.Module) -> dict[str, int]:
    held = list(vars(module).items())  # which another thread may change
    return {name: id(value) for name, value in held if type(value) in CALLABLES}


def _referrers(model: nn.Module) -> dict[int, list[tuple[nn.Module, str, bool]]]:
    """For each module and tensor that `model` reaches, by identity, what refers to it.

    That is a module, the name of its attribute, and whether the way leads through what cannot be
    copied.
    """
    found: dict[int, list[tuple[nn.Module, str, bool]]] = {}
    pending, seen = [model], {id(model)}
    while pending:
        module = pending.pop()
        for attribute, one, aside in _leads(module):
            found.setdefault(id(one), []).append((module, attribute, aside))
            if isinstance(one, nn.Module) and not aside and id(one) not in seen:
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
        if name in PLUMBING:
            continue
        for one in references(value):
            if isinstance(one, (nn.Module, Tensor)):
                yield name, one, False
            else:
                yield from ((name, other, True) for other in _within(one))
        yield from ((name, other, True) for other in global_references(value))


def _within(value: object, most: int = 100_000) -> Iterator[object]:
    """The modules and tensors that an object of some other class holds, or what it holds does."""
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
