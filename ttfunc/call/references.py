"""What a value refers to, and copies of a value that refer to other objects.

References are followed through the classes that tools use: lists, tuples, dicts, weak references,
bound methods, partials and closures. Objects of other classes are not looked into.
"""

from __future__ import annotations

import functools
import weakref
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from dis import get_instructions
from types import CellType, CodeType, FunctionType, MethodType, ModuleType
from typing import Any, TypeAlias

from torch import Tensor, nn

from ttfunc.model.sizes import PLAIN

HELD = ("_parameters", "_buffers", "_modules")
# What torch itself keeps in each module: hooks and flags.
PLUMBING = frozenset(vars(nn.Module()))
_CALLABLES = (FunctionType, MethodType, functools.partial)
# Another class to follow needs a branch in `parts_of` and one in `_rebuilt`.
FOLLOWED = {list, tuple, dict, weakref.ref, *_CALLABLES}
# For each object that was visited, by its identity: the object, and what replaces it.
Seen: TypeAlias = dict[int, tuple[Any, Any]]
_NOT_RESTORED: tuple[Any, ...] = (type, ModuleType, Tensor, *weakref.ProxyTypes)


def references(value: object, seen: set[int] | None = None) -> Iterator[object]:
    """The modules, tensors and objects of classes that are not followed, to which `value` leads."""
    kind = type(value)
    if kind in PLAIN:
        return
    if kind not in FOLLOWED:
        yield value
        return
    seen = set() if seen is None else seen
    if id(value) not in seen:
        seen.add(id(value))
        parts = parts_of(value)
        if not PLAIN.issuperset(map(type, parts)):
            for part in parts:
                yield from references(part, seen)


def substituted(value: Any, others: Mapping[int, Any]) -> Any:
    """`value` with `others[id(x)]` in place of each x that it leads to; itself if there is no x.

    A container that holds such an x is copied, and the copy shares everything else with it.
    """
    if id(value) in others:
        return others[id(value)]
    kind = type(value)
    if kind not in FOLLOWED:
        return value
    if kind is FunctionType:
        return _function_anew(value, lambda part, known: substituted(part, {**others, **known}))
    parts = parts_of(value)
    if PLAIN.issuperset(map(type, parts)):
        return value
    if kind in (list, dict):
        others = {**others, id(value): value}  # ends the recursion where one holds itself
    return _rebuilt(value, parts, [substituted(part, others) for part in parts])


def restored(value: Any, own: Callable[[Any], Any], seen: Seen, depth: int = 100) -> Any:
    """`value` with `own(x)` in place of each x that it reaches, through objects of any class.

    Objects that can change are changed in place. own: returns x itself if x stays. seen: objects
    that were visited before; this adds to it.
    """
    other = own(value)
    kind = type(value)
    if other is not value or kind in PLAIN or not depth or issubclass(kind, _NOT_RESTORED):
        return other
    if id(value) in seen:
        return seen[id(value)][1]
    seen[id(value)] = value, value

    def of(part: Any) -> Any:
        return restored(part, own, seen, depth - 1)

    if kind is FunctionType:
        fixed = _function_anew(value, lambda part, known: known.get(id(part)) or of(part))
    elif kind in _CALLABLES or kind is weakref.ref or issubclass(kind, tuple):
        fixed = _rebuilt(value, parts := parts_of(value), [*map(of, parts)])
    else:
        _restore_items(value, of)
        for name, part in _attributes(value):
            if (other := of(part)) is not part:
                object.__setattr__(value, name, other)
        return value
    seen[id(value)] = value, fixed
    return fixed


def _restore_items(value: Any, of: Callable[[Any], Any]) -> None:
    if isinstance(value, dict):
        for key, part in list(dict.items(value)):
            if (fixed := of(part)) is not part:
                dict.__setitem__(value, key, fixed)
    elif isinstance(value, (list, deque)):
        for place, part in enumerate(list(value)):
            if (fixed := of(part)) is not part:
                value[place] = fixed
    elif isinstance(value, set):
        for part in list(value):
            if (fixed := of(part)) is not part:
                value.add(fixed)
                value.discard(part)


def _attributes(value: Any) -> list[tuple[str, Any]]:
    """The attributes that an object has in its dictionary and in its slots."""
    kind: Any = type(value)
    found = list(vars(value).items()) if kind.__dictoffset__ else []
    found += [(name, getattr(value, name)) for name in slot_names(kind) if hasattr(value, name)]
    apart = PLUMBING.difference(HELD) if isinstance(value, nn.Module) else ()  # hooks stay
    return [(name, part) for name, part in found if isinstance(name, str) and name not in apart]


@functools.cache
def slot_names(kind: Any) -> tuple[str, ...]:
    """The attributes that objects of a class keep outside of their dictionary."""
    declared = [vars(base).get("__slots__", ()) for base in kind.__mro__]
    names = [one for names in declared for one in ((names,) if isinstance(names, str) else names)]
    return tuple(name for name in names if not name.startswith("__"))


def refill(container: Any, content: Any) -> None:
    """Make a list or a dict hold the items of another one; a dict keeps the order of its keys.

    An interrupt may come between any two steps: no item is lost then.
    """
    if isinstance(container, list):
        if not _same(container, content):
            container[:] = content
        return
    container.update(content)
    for key in container.keys() - content.keys():
        del container[key]


def global_references(value: object) -> Iterator[object]:
    """The globals that functions in `value` load."""
    pending, seen = [value], set()
    while pending:
        one = pending.pop()
        if id(one) in seen or type(one) not in _CALLABLES:
            continue
        seen.add(id(one))
        pending += parts_of(one)
        if isinstance(one, FunctionType):
            yield from map(one.__globals__.get, _names_of_globals(one.__code__))


@functools.lru_cache  # tools give many modules functions of one code
def _names_of_globals(code: CodeType) -> frozenset[str]:
    """The globals that a function loads. Its `co_names` has the names of attributes too."""
    loads = (one for one in get_instructions(code) if one.opname == "LOAD_GLOBAL")
    return frozenset(one.argval for one in loads)


def parts_of(value: Any) -> list[Any]:
    """The objects that a value of a followed class holds directly."""
    kind = type(value)
    if kind is dict:
        return list(value.values())
    if kind is weakref.ref:
        return [value()]
    if kind is MethodType:
        return [value.__func__, value.__self__]
    if kind is functools.partial:
        return [value.func, *value.args, *value.keywords.values()]
    if kind is FunctionType:
        given = (*(value.__defaults__ or ()), *(value.__kwdefaults__ or {}).values())
        return [*map(_content, value.__closure__ or ()), *given]
    return list(value)


def _rebuilt(value: Any, parts: list[Any], new: list[Any]) -> Any:
    """A value of a followed class with new parts; itself if they are the same objects."""
    kind: Any = type(value)
    if _same(parts, new):
        return value
    if kind is dict:
        return dict(zip(value, new, strict=True))
    if kind is functools.partial:
        named = dict(zip(value.keywords, new[1 + len(value.args) :], strict=True))
        function, *args = new[: 1 + len(value.args)]
        return functools.partial(function, *args, **named)
    if isinstance(value, tuple):
        return tuple.__new__(kind, new)  # also for a named one
    return new if kind is list else type(value)(*new)


def _same(some: Any, others: Any) -> bool:
    return len(some) == len(others) and all(a is b for a, b in zip(some, others, strict=True))


def _content(cell: CellType) -> object:
    try:
        return cell.cell_contents
    except ValueError:  # not filled yet
        return None


def _function_anew(
    function: FunctionType, change: Callable[[Any, dict[int, Any]], Any]
) -> FunctionType:
    """The function with `change(x, known)` in place of each x in its cells and defaults.

    It is the function itself if nothing changes. A function may refer to itself: `known` maps the
    old one to the new one.
    """
    cells = list(function.__closure__ or ())
    old = [_content(cell) for cell in cells]
    given = (function.__defaults__, function.__kwdefaults__)
    same = {id(function): function}
    found = [change(one, same) for one in old]
    if _same(found, old) and _same(given, [change(one, same) for one in given]):
        return function
    fresh = {
        place: CellType(None)
        for place, (was, now) in enumerate(zip(old, found, strict=True))
        if now is not was or was is function
    }
    closure = tuple(fresh.get(place, cell) for place, cell in enumerate(cells))
    made = FunctionType(function.__code__, function.__globals__, function.__name__, None, closure)
    made.__dict__.update(function.__dict__)
    known = {id(function): made}
    made.__defaults__, made.__kwdefaults__ = (change(one, known) for one in given)
    for place, cell in fresh.items():
        cell.cell_contents = change(old[place], known)
    return made
