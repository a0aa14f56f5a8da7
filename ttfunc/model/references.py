"""What a value refers to, and the same value with references to other objects.

Modules and tensors are found in lists, tuples, sets, dicts, weak references and proxies, and in
callables: bound methods, partials and closures. An object of any other class is left as it is.
"""

from __future__ import annotations

import functools
import weakref
from collections import OrderedDict, deque
from collections.abc import Iterator, Mapping
from operator import is_
from types import CellType, FunctionType, MethodType, ModuleType
from typing import Any

from torch import Tensor, nn

CALLABLES = (FunctionType, MethodType, functools.partial)
_SEQUENCES = (list, tuple, set, frozenset, deque)
# What can be changed in place.
CONTAINERS = (list, set, deque, dict, OrderedDict)
_MAPPINGS = (dict, OrderedDict)
# Another class to follow needs branches in `parts_of` and `substituted`; one that can be changed in
# place is also one of CONTAINERS, and needs a branch in `refill`.
_PROXIES = weakref.ProxyTypes
_FOLLOWED = {*CALLABLES, *_SEQUENCES, *_MAPPINGS, weakref.ref, *_PROXIES}
# What cannot be changed in place, though the objects in it may.
FIXED = _FOLLOWED.difference(CONTAINERS)
# What refers to nothing.
PLAIN = {type(None), bool, int, float, complex, str, bytes, range, slice}


def references(value: object, seen: set[int] | None = None) -> Iterator[object]:
    """The modules, the tensors and the objects of other classes that `value` is or refers to."""
    seen = set() if seen is None else seen
    kind = type(value)
    if kind in PLAIN or id(value) in seen:
        return
    seen.add(id(value))
    if kind in _FOLLOWED:
        for part in parts_of(value):
            yield from references(part, seen)
    elif not isinstance(value, (type, ModuleType)):
        yield value


def substituted(value: Any, others: Mapping[int, Any]) -> Any:
    """`value` with `others[id(x)]` in place of each x that it refers to; itself if there is none.

    A container that holds such an x is made anew, and shares all else: a closure keeps all of its
    other cells.
    """
    if id(value) in others:
        return others[id(value)]
    kind: Any = type(value)
    if kind not in _FOLLOWED:
        return value
    held = parts_of(value)
    # What a proxy of a function leads to is left too: nothing would hold the function made anew.
    if kind in _PROXIES or _FOLLOWED.isdisjoint(map(type, held)):  # true of most values
        if others.keys().isdisjoint(map(id, held)):
            return value
    elif kind is not MethodType and not any(id(one) in others for one in references(value)):
        return value
    if kind is FunctionType:
        return _with_cells(value, others)
    others = {**others, id(value): value}  # ends the recursion for a list that holds itself
    if kind in _MAPPINGS:
        return kind({key: substituted(part, others) for key, part in value.items()})
    parts: list[Any] = [substituted(part, others) for part in held]
    if kind is MethodType:
        return value if all(map(is_, parts, held)) else MethodType(*parts)
    if kind is deque:
        return deque(parts, value.maxlen)
    if kind in _SEQUENCES:
        return kind(iter(parts))
    if kind is functools.partial:
        named = dict(zip(value.keywords, parts[1 + len(value.args) :], strict=True))
        return functools.partial(parts[0], *parts[1 : 1 + len(value.args)], **named)
    # A weak reference to another object. The class of a proxy cannot be called.
    return weakref.proxy(*parts) if kind in _PROXIES else kind(*parts)


def refill(container: Any, content: Any) -> None:
    """Make a list, set, dict or deque hold the items of another of its class.

    A list and a deque take their order; a dict keeps the order of the keys that it has.
    """
    parts, held = list(content), list(container)  # for a dict, its keys
    if isinstance(container, dict):
        parts, held = [*parts, *content.values()], [*held, *container.values()]
    if len(parts) == len(held) and all(map(is_, parts, held)):
        return
    # An interrupt may come between any two of these steps: no item is lost then.
    if isinstance(container, list):
        container[:] = parts
    elif isinstance(container, deque):
        container.extend(parts)
        for _ in range(len(container) - len(parts)):
            container.popleft()
    else:
        container.update(content)
        for key in set(container) - set(content):
            container.pop(key) if isinstance(container, dict) else container.discard(key)


def substitute_attributes(value: Any, others: Mapping[int, Any], most: int = 1000) -> None:
    """Replace attributes of an object of another class by `others`, in place."""
    pending, seen = [value], {id(value)}
    while pending and len(seen) < most:
        one = pending.pop()
        if type(one) in _PROXIES or isinstance(
            one, (nn.Module, Tensor, type, ModuleType, *CALLABLES)
        ):
            continue
        for name, held in list(getattr(one, "__dict__", {}).items()):
            other = substituted(held, others)
            if other is not held:
                vars(one)[name] = other
            elif id(held) not in seen and type(held) not in PLAIN:
                seen.add(id(held))
                pending.append(held)


def global_references(value: object) -> Iterator[object]:
    """The modules and tensors that functions in `value` find among their globals, by name."""
    pending, seen = [value], set()
    while pending:
        one = pending.pop()
        if id(one) in seen or type(one) not in CALLABLES:
            continue
        seen.add(id(one))
        pending += parts_of(one)
        if isinstance(one, FunctionType):
            named = (one.__globals__.get(name) for name in one.__code__.co_names)
            found = (parts_of(it)[0] if type(it) in _PROXIES else it for it in named)
            yield from (held for held in found if isinstance(held, (nn.Module, Tensor)))


def parts_of(value: Any) -> list[Any]:
    """What a value of a followed class holds directly."""
    kind = type(value)
    if kind in _MAPPINGS:
        return list(value.values())
    if kind is weakref.ref:
        return [value()]
    if kind in _PROXIES:
        return [_behind(value)]
    if kind is MethodType:
        return [value.__func__, value.__self__]
    if kind is functools.partial:
        return [value.func, *value.args, *value.keywords.values()]
    if kind is FunctionType:
        given = (*(value.__defaults__ or ()), *(value.__kwdefaults__ or {}).values())
        return [*map(_content, value.__closure__ or ()), *given]
    return list(value)


def _behind(proxy: Any) -> object:
    """The object that a weak proxy passes everything on to; None if it is gone."""
    try:
        return proxy.__init__.__self__
    except ReferenceError:
        return None


def _content(cell: CellType) -> object:
    try:
        return cell.cell_contents
    except ValueError:  # not filled yet
        return None


def _with_cells(function: FunctionType, others: Mapping[int, Any]) -> FunctionType:
    cells = list(function.__closure__ or ())
    fresh = {
        place: CellType(None)
        for place, cell in enumerate(cells)
        if any(id(one) in others for one in references(_content(cell), {id(function)}))
        or _content(cell) is function
    }
    closure = tuple(fresh.get(place, cell) for place, cell in enumerate(cells))
    made = FunctionType(function.__code__, function.__globals__, function.__name__, None, closure)
    made.__dict__.update(function.__dict__)
    others = {**others, id(function): made}  # a function may call itself
    made.__defaults__ = substituted(function.__defaults__, others)
    made.__kwdefaults__ = substituted(function.__kwdefaults__, others)
    for place, cell in fresh.items():
        cell.cell_contents = substituted(_content(cells[place]), others)
    return made
