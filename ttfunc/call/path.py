"""The path: the modules between a model and the tensors that a call replaces, which it copies."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain, filterfalse
from types import CodeType, FrameType, FunctionType, MethodType, ModuleType, TracebackType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ttfunc.call.references import FOLLOWED, HELD, PLUMBING, global_references, references
from ttfunc.model.memory import overlaps
from ttfunc.model.sizes import PLAIN
from ttfunc.torch_distributed_private import ENGINE_STATE
from ttfunc.torch_private import is_exported

HOOKS = ("_forward_hooks", "_forward_pre_hooks")
# Objects that are not searched: they lead to all code, and so to every matrix.
_NOT_SEARCHED = (type, ModuleType, FrameType, CodeType, FunctionType, TracebackType)
# A longer container is searched again only when its length has changed.
_LONG = 1000


class Step(NamedTuple):
    """A module of the path at a call, a copy of its dictionary, and the attributes that lead on.

    An attribute leads on if it refers to another module or a tensor of the path.
    """

    module: nn.Module
    state: dict[str, Any]
    leading: tuple[str, ...]


class Path:
    """The modules through which a model reaches some tensors; the model comes first.

    It refers to the modules weakly, and keeps no model alive. leading: for each module the
    attributes that lead on, besides parameters, buffers and submodules. uncopyable: attributes that
    reach the tensors through objects that cannot be copied. is_compiled: whether the model has
    compiled parts. watched: the kinds of calls that were watched and did not read past the copies.
    """

    def __init__(
        self,
        modules: Iterable[nn.Module],
        leading: Iterable[tuple[str, ...]],
        wanted: Iterable[int],
        uncopyable: tuple[str, ...] = (),
        searched: Iterable[nn.Module] = (),
    ) -> None:
        self.modules = tuple(map(weakref.ref, modules))
        self.leading = tuple(leading)
        self.uncopyable = uncopyable
        self.is_compiled = any(map(_is_compiled, searched))
        self.watched: set[object] = set()
        self._wanted = frozenset(wanted)
        self._seen: list[object] = []
        self._is_gone = False
        this = weakref.ref(self)

        def forget(_: object) -> None:
            if (path := this()) is not None:
                path._is_gone = True

        # Once a module is gone, another object may have its identity.
        self._alive = [weakref.ref(module, forget) for module in searched]

    def steps(self) -> list[Step]:
        """The modules as they are now. Raises RuntimeError if one is gone."""
        return steps_of(self.modules, self.leading)

    def note(self, steps: Iterable[Step], buffers: Iterable[int]) -> None:
        """Note what the modules refer to, for `is_as_noted` in later calls."""
        self._seen = self._marks_of(steps, buffers)

    def is_as_noted(self, steps: Iterable[Step], buffers: Iterable[int]) -> bool:
        """Whether the path has not changed; buffers: the identities of all of the model's."""
        return not self._is_gone and self._marks_of(steps, buffers) == self._seen

    def _marks_of(self, steps: Iterable[Step], buffers: Iterable[int]) -> list[object]:
        """For each attribute a mark of what it refers to: identities of modules, classes else."""
        wanted = self._wanted
        marks: list[object] = [sum(map(wanted.__contains__, buffers))]
        objects: dict[int, object] = {}  # of other classes
        for _, state, leading in steps:
            for name in filterfalse(PLUMBING.__contains__, state):
                value = state[name]
                kind = type(value)
                if kind in PLAIN:
                    continue
                marks.append(name)
                if kind not in FOLLOWED:
                    found: Iterable[object] = (value,)
                elif kind in (list, dict) and len(value) > _LONG and name not in leading:
                    marks.append(len(value))
                    continue
                else:
                    found = references(value)
                for one in found:
                    kind = type(one)
                    marks.append(kind)
                    if id(one) in wanted or issubclass(kind, nn.Module):
                        marks.append(id(one))
                    elif kind.__dictoffset__:
                        objects[id(one)] = one
        # Such an object may have a module or tensor of the path as an attribute.
        held = chain.from_iterable(vars(one).values() for one in objects.values())
        marks += wanted.intersection(map(id, held))
        return marks


def steps_of(
    modules: Iterable[weakref.ref[nn.Module]], leading: Iterable[tuple[str, ...]]
) -> list[Step]:
    found = []
    for reference, names in zip(modules, leading, strict=True):
        module = reference()
        if module is None:
            raise changed_meanwhile()
        state = vars(module).copy()  # at once: another thread may add to it
        if not torch.compiler.is_dynamo_compiling():  # dynamo would guard on every hook
            hooks = (name for name in HOOKS if state[name] and name not in names)
            names = (*names, *hooks)
        found.append(Step(module, state, names))
    return found


def find_path(
    model: nn.Module,
    tensors: Iterable[Tensor],
    through: Iterable[nn.Module] = (),
) -> Path:
    """Search the whole model for the path to these tensors, and through these modules."""
    tensors = list(tensors)
    referrers, modules = _referrers(model)
    on: dict[int, nn.Module] = {id(one): one for one in (model, *through)}
    leading: dict[int, dict[str, None]] = {}
    wanted = set(map(id, tensors))
    pending, seen = [*wanted, *on], set()
    while pending:
        if (one := pending.pop()) in seen:
            continue
        seen.add(one)
        for module, attribute in referrers.get(one, ()):
            on[id(module)] = module
            if attribute not in HELD:
                leading.setdefault(id(module), {})[attribute] = None
            pending.append(id(module))
    wanted |= on.keys()
    return Path(
        on.values(),
        (tuple(leading.get(key, ())) for key in on),
        wanted,
        tuple(dict.fromkeys(_uncopyable(modules, wanted, tensors))),
        modules,
    )


def _is_compiled(module: nn.Module) -> bool:
    """Whether torch.compile has made the module, or one of its functions."""
    if "_compiled_call_impl" in vars(module) or "_orig_mod" in module._modules:
        return True
    functions = [type(module).forward, *vars(module).values()]
    return any("_torchdynamo_orig_callable" in getattr(one, "__dict__", ()) for one in functions)


def _referrers(
    model: nn.Module,
) -> tuple[dict[int, list[tuple[nn.Module, str]]], list[nn.Module]]:
    """The referrers of each object that `model` reaches, by its identity; and all its modules.

    An object is a module or a tensor. A referrer is a module and the name of its attribute.
    """
    found: dict[int, list[tuple[nn.Module, str]]] = {}
    modules, seen = [model], {id(model)}
    for module in modules:
        for attribute, one in _leads(module):
            found.setdefault(id(one), []).append((module, attribute))
            if _is_module(one) and id(one) not in seen:
                seen.add(id(one))
                modules.append(one)  # type: ignore[arg-type]
    return found, modules


def _leads(module: nn.Module) -> Iterator[tuple[str, object]]:
    for part in HELD:
        for one in list(getattr(module, part).values()):
            if one is not None:
                yield part, one
    for name in HOOKS:
        for hook in list(getattr(module, name).values()):
            if isinstance(hook, MethodType) and _is_module(hook.__self__):
                yield name, hook.__self__
    for name, value in _attributes(module):
        for one in references(value):
            if _is_module(one) or isinstance(one, Tensor):
                yield name, one


def _attributes(module: nn.Module) -> list[tuple[str, Any]]:
    return [
        (name, value)
        for name, value in list(vars(module).items())
        if type(value) not in PLAIN and name not in PLUMBING and not name.startswith(ENGINE_STATE)
    ]


def _is_module(value: object) -> bool:
    return issubclass(type(value), nn.Module)  # isinstance is true of a weak proxy, too


def _uncopyable(
    modules: Iterable[nn.Module], wanted: set[int], tensors: Sequence[Tensor]
) -> Iterator[str]:
    """The attributes that reach the path through objects that a call cannot copy."""
    for module in modules:
        for name, value in _attributes(module):
            held = [*references(value)]
            reached = [*global_references(value)]
            reached += [other for one in held if not _is_module(one) for other in _within(one)]
            if any(map(wanted.__contains__, map(id, reached))) or any(
                isinstance(one, Tensor) and id(one) not in wanted and overlaps(one, tensor)
                for one in held
                for tensor in tensors
            ):
                yield f"{type(module).__name__}.{name}"


def _within(value: object, most: int = 100_000) -> Iterator[object]:
    """The modules and tensors that an object of another class holds, directly or indirectly."""
    pending, seen = [value], {id(value)}
    while pending and len(seen) < most:
        one = pending.pop()
        if isinstance(one, (Tensor, *_NOT_SEARCHED)) or type(one).__module__.startswith("ttfunc"):
            continue
        for held in gc.get_referents(one):
            if isinstance(held, (nn.Module, Tensor)):
                yield held
            elif id(held) not in seen and gc.is_tracked(held):
                seen.add(id(held))
                pending.append(held)


def changed_meanwhile() -> RuntimeError:
    """The error for a model whose path changed between two looks at it."""
    if is_exported():
        return RuntimeError(
            "torch.export shows other modules of this model at each look, since it has one under "
            "several names. Export it with strict=True."
        )
    return RuntimeError("the model was changed by another thread as the call began. Try again.")
