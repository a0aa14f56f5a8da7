"""The path: the modules between a model and its token matrices, and copies of them for one call.

A functional call runs on copies of the modules on the path, as an update of a persistent data
structure does: each copy has dictionaries of its own, and all that is not on the path is shared.
The patched weight stands in the copies, and the model is never changed, not even during the call.
"""

from __future__ import annotations

import weakref
from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn

from ttfunc.model.references import CALLABLES, global_references, references, substituted

_HELD = ("_parameters", "_buffers", "_modules")
_HOOKS = ("_forward_hooks", "_forward_pre_hooks")
# What torch itself keeps in each module: hooks and flags.
_PLUMBING = frozenset(vars(nn.Module()))


@dataclass(frozen=True, eq=False)
class Step:
    """A module on the path.

    attributes: those outside of its parameters, buffers and submodules that lead on along the path,
    in a list or a closure say. callables: the identities of all its own functions, such as a
    `forward` that a tool has set: others may lead on too.
    """

    module: weakref.ref[nn.Module]
    attributes: tuple[str, ...]
    callables: dict[str, int]


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
            if attribute not in _HELD:
                leading.setdefault(id(module), {})[attribute] = None
            pending.append(id(module))
    steps = [
        Step(weakref.ref(module), tuple(leading.get(key, ())), _callables(module))
        for key, module in on.items()
    ]
    return Path(weakref.ref(model), tuple(steps), tuple(aside))


def joined(model: nn.Module, paths: Sequence[Path]) -> Path:
    """One path for all of `paths` of a model."""
    if len(paths) == 1:
        return paths[0]
    root = Step(weakref.ref(model), (), _callables(model))
    steps: dict[int, Step] = {id(model): root}
    for step in (step for path in paths for step in path.steps):
        key = id(step.module())
        before = steps.get(key, step)
        attributes = dict.fromkeys((*before.attributes, *step.attributes))
        steps[key] = Step(step.module, tuple(attributes), step.callables)
    aside = dict.fromkeys(name for path in paths for name in path.aside)
    return Path(weakref.ref(model), tuple(steps.values()), tuple(aside))


class Copies:
    """Copies of the modules on a path, in which others stand in the place of some tensors.

    others: what stands for a tensor, by the identity of that tensor. modes: the training mode of
    modules on the path, where it is not to be that of the original.
    """

    def __init__(
        self, path: Path, others: Mapping[int, Tensor], modes: Mapping[nn.Module, bool]
    ) -> None:
        self._originals = [_alive(step) for step in path.steps]
        self._copies = [_empty_copy(module) for module in self._originals]
        self._others: dict[int, Any] = dict(others)
        self._others.update(zip(map(id, self._originals), self._copies, strict=True))
        self._placed = []
        for module, step, copy in zip(self._originals, path.steps, self._copies, strict=True):
            state = _state(module, step.attributes, self._others)
            state["training"] = modes.get(module, module.training)
            vars(copy).update(state)
            self._placed.append((state, {part: dict(state[part]) for part in _HELD}))

    @property
    def model(self) -> nn.Module:
        """What is called in the place of the model."""
        return self._copies[0]

    def carry_over(self, tensors: Iterable[Tensor]) -> None:
        """Give the originals what the call has noted on the copies, in their own terms.

        `tensors` are those that others stood for: what was set in their place is not kept.
        """
        back: dict[int, Any] = {id(self._others[id(tensor)]): tensor for tensor in tensors}
        stand_ins = frozenset(back)
        back.update(zip(map(id, self._copies), self._originals, strict=True))
        for original, copy, (state, held) in zip(
            self._originals, self._copies, self._placed, strict=True
        ):
            for part in _HELD:
                ours = {name for name, one in held[part].items() if id(one) in stand_ins}
                _carry(held[part], vars(copy)[part], vars(original)[part], back, ours)
            _carry(state, vars(copy), vars(original), back, ())


def _alive(step: Step) -> nn.Module:
    module = step.module()
    if module is None:
        raise RuntimeError("a module of the path has been deleted. Make the parameters anew.")
    return module


def _empty_copy(module: nn.Module) -> nn.Module:
    kind = type(module)
    if isinstance(module, (torch.jit.ScriptModule, nn.DataParallel)) or hasattr(kind, "__del__"):
        raise TypeError(
            f"a call runs on a copy of each module between the model and its token matrix, and "
            f"there is a {kind.__name__}, which cannot be copied (it is scripted, a DataParallel, "
            "or has a __del__ that would run for the copy). Call the module in it, or "
            "torch.func.functional_call(model, patch(params), ...), which changes the model for "
            "the length of the call."
        )
    return object.__new__(kind)


def _state(
    module: nn.Module, attributes: Iterable[str], others: Mapping[int, Any]
) -> dict[str, Any]:
    state = dict(vars(module))
    for part in _HELD:
        state[part] = {name: others.get(id(one), one) for name, one in state[part].items()}
    for name in attributes:
        if name in _HOOKS:
            state[name] = type(state[name])(
                (key, substituted(hook, others) if isinstance(hook, MethodType) else hook)
                for key, hook in state[name].items()
            )
        elif name in state:
            state[name] = substituted(state[name], others)
    return state


def _carry(
    placed: Mapping[str, Any],
    found: Mapping[str, Any],
    into: dict[str, Any],
    back: Mapping[int, Any],
    ours: Container[str],
) -> None:
    for name, value in found.items():
        if (name not in placed or placed[name] is not value) and name not in ours:
            into[name] = substituted(value, back)
    for name in placed:
        if name not in found and name not in ours:
            into.pop(name, None)


def _callables(module: nn.Module) -> dict[str, int]:
    return {name: id(value) for name, value in vars(module).items() if type(value) in CALLABLES}


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
    for part in _HELD:
        for one in getattr(module, part).values():
            if one is not None:
                yield part, one, False
    for name in _HOOKS:
        for hook in getattr(module, name).values():
            if isinstance(hook, MethodType) and isinstance(hook.__self__, nn.Module):
                yield name, hook.__self__, False
    for name, value in vars(module).items():
        if name in _PLUMBING:
            continue
        for one in references(value):
            if isinstance(one, (nn.Module, Tensor)):
                yield name, one, False
            elif hasattr(one, "__dict__"):
                yield from ((name, other, True) for other in _within(one))
        yield from ((name, other, True) for other in global_references(value))


def _within(value: object, most: int = 1000) -> Iterator[object]:
    """The modules and tensors that an object of some other class holds, or what it holds does."""
    pending, seen = [value], {id(value)}
    while pending and len(seen) < most:
        for one in list(references(vars(pending.pop()))):
            if isinstance(one, (nn.Module, Tensor)):
                yield one
            elif id(one) not in seen and hasattr(one, "__dict__"):
                seen.add(id(one))
                pending.append(one)
