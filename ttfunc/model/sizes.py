"""What a model says of the size of its vocabulary, and what has that size, beside the matrix.

Models of transformers name the entries of their configs as they like, may have several of one
value, and derive sizes from them (`vocab_size + 8`). Built without values and with another entry,
which takes hundredths of a second, they tell what it is the size of.
"""

from __future__ import annotations

import copy
import functools
import json
from collections.abc import Callable, Collection, Container, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ttfunc.model.names import within
from ttfunc.torch_private import outside_of_modes

# What refers to nothing.
PLAIN = {type(None), bool, int, float, complex, str, bytes, range, slice}
# Attributes that are the number of tokens: of configs, and of modules.
USUAL = ("vocab_size", "decoder_vocab_size", "n_words")
_OF_MODULES = (*USUAL, "num_embeddings", "out_features")
_OF_ALL = frozenset(vars(nn.Module()))


class Entry(NamedTuple):
    """A size in a config: before the new tokens, with them, and in the model itself."""

    old: int
    new: int
    start: int

    @property
    def back(self) -> Entry:
        return Entry(self.new, self.old, self.start)


class Resized:
    """Copies of what says the size of a vocabulary, for one call in which it is another.

    That is a config or another object, or a dict, which has the size under a usual name, or holds
    such an object. `others` has the copies by the identity of the originals, so that what was one
    config is one still; `own` has the originals by that of the copies.

    sizes: of the vocabulary, from the old one to the new one.
    """

    def __init__(self, sizes: Mapping[int, int]) -> None:
        self._sizes = sizes
        self.others: dict[int, Any] = {}
        self.own: dict[int, Any] = {}
        self._placed: list[tuple[Any, Any, list[dict[str, Any]]]] = []

    def put_into(self, state: dict[str, Any], apart: Container[str] = ()) -> None:
        """Give a module's dictionary the new sizes, but for the attributes that are kept apart."""
        for name, value in list(state.items()):
            if type(value) in PLAIN:
                if name in _OF_MODULES:
                    state[name] = self._new(value)
            elif name not in _OF_ALL and name not in apart:
                state[name] = self._of(value, 2)

    def carry_over(self, fixed: Callable[[Any], Any]) -> None:
        """Write what the call has set on the copies to the originals, each value as `fixed`."""
        for original, copied, placed in self._placed:
            for was, found, into in zip(placed, _held(copied), _held(original), strict=True):
                for name, value in found.items():
                    if name not in was or not _same(was[name], value):
                        into[name] = fixed(value)
                for name in was.keys() - found.keys():
                    into.pop(name, None)

    def _new(self, value: Any) -> Any:
        return self._sizes.get(value, value) if type(value) is int else value

    def _of(self, value: Any, depth: int) -> Any:
        """The copy of a value, or itself where neither it nor what it holds says a size."""
        if id(value) in self.others:
            return self.others[id(value)]
        if issubclass(type(value), (nn.Module, Tensor, type)):
            return value
        if not isinstance(value, dict) and callable(value):  # (Dynamo does not ask it of a dict)
            return value
        changed = [self._changed(held, _names(value), depth) for held in _held(value)]
        if not any(changed) or (copied := _copied(value)) is None:
            return value
        held = _held(copied)
        for own, new in zip(held, changed, strict=True):
            own.update(new)
        self.others[id(value)], self.own[id(copied)] = copied, value
        self._placed.append((value, copied, [dict(own) for own in held]))
        return copied

    def _changed(self, held: dict[Any, Any], names: Container[Any], depth: int) -> dict[Any, Any]:
        """What is to be another value in an object, of its attributes or of its items."""
        found = {}
        for key, one in held.items():
            if type(one) in PLAIN:
                found[key] = self._new(one) if key in names else one
            elif id(one) in self.others or (depth and str(key).endswith("config")):
                found[key] = self._of(one, depth - 1)
        return {key: new for key, new in found.items() if new is not held[key]}


def _held(value: Any) -> list[dict[Any, Any]]:
    """The dictionaries in which an object has its attributes and items."""
    # By its class: a proxy would answer for what it stands for.
    own = [vars(value)] if type(value).__dictoffset__ else []
    return [*own, value] if issubclass(type(value), dict) else own


def _names(value: Any) -> tuple[str, ...]:
    # Some of transformers' configs have the size under another name.
    other = getattr(type(value), "attribute_map", None)
    return (*USUAL, other["vocab_size"]) if other and "vocab_size" in other else USUAL


def _copied(value: Any) -> Any:
    """A shallow copy of an object; None of one that cannot be copied."""
    try:
        made = object.__new__(type(value))  # which runs no code of its class
        vars(made).update(vars(value))
    except TypeError:  # a class over dict, say
        try:
            made = copy.copy(value)
        except Exception:
            return None
    return made


def _same(was: Any, value: Any) -> bool:
    return was is value or (type(value) is int and type(was) is int and was == value)


def with_entries(config: Any, entries: Mapping[str, Entry]) -> Any:
    """A copy of a config with the new numbers at these paths."""
    changed = copy.deepcopy(config)
    for path, entry in entries.items():
        *outer, last = path.split(".")
        holder = changed
        for part in outer:
            holder = holder[part] if isinstance(holder, dict) else getattr(holder, part)
        if isinstance(holder, dict):
            holder[last] = entry.new
        else:
            setattr(holder, last, entry.new)
    return changed


# Which entries of a config are the size of a matrix

Shapes = dict[str, tuple[int, ...]]


def sizes_of(
    model: nn.Module, held: Sequence[str], names: Sequence[str], height: int, grown: int
) -> tuple[dict[str, int], list[str]] | None:
    """The entries that are the size of a matrix, with their values; and the names of what else is.

    None where the class of the model, which is of transformers, cannot tell. The entries are paths,
    as `text_config.vocab_size`. held: all names, with the parts that wrappers around or in the
    model add. names: the matrix's. grown: by how much it is to be higher.
    """
    config: Any = model.config
    classes: Any = type(model), type(config)
    try:
        text = json.dumps(config.to_dict())
        plain, effects = _effects(*classes, text, height, grown)
    except Exception:  # any class may be asked, and may need what is not there
        return None
    own = {other for name in names if (other := _plain(name, plain))}
    sizing = {path: changed for path, changed in effects.items() if own & changed.keys()}
    if any(changed[name] != (grown, 0) for changed in sizing.values() for name in own & {*changed}):
        return None
    others = {name for changed in sizing.values() for name in changed if name not in own}
    values = dict(_entries(json.loads(text)))

    def is_beside(path: tuple[str, ...]) -> bool:
        """Whether it is a usual name, beside one of these or in a config around it."""
        return path[-1] in USUAL and any(one[: len(path) - 1] == path[:-1] for one in sizing)

    idle = [
        path
        for path, changed in effects.items()
        if not changed and values[path] == height and is_beside(path)
    ]
    return (
        {".".join(path): values[path] for path in [*sizing, *idle]},
        [name for name in held if _plain(name, plain) in others],
    )


def _plain(name: str, plain: Collection[str]) -> str | None:
    """The longest of the `plain` names that a name ends in, but for the parts of wrappers."""
    end = within(name)
    while end and end not in plain:
        end = end.partition(".")[2]
    return end or None


@functools.lru_cache(maxsize=8)
def _effects(
    cls: type, config_class: Any, text: str, height: int, grown: int
) -> tuple[Shapes, dict[tuple[str, ...], Shapes]]:
    """The shapes of such a model; and for each entry which of them it changes, and by how much."""

    def changed(*paths: tuple[str, ...]) -> Shapes:
        described = json.loads(text)
        for path in paths:
            holder = functools.reduce(lambda part, key: part[key], path[:-1], described)
            holder[path[-1]] += grown
        return {
            name: tuple(new - old for new, old in zip(shape, plain.get(name, shape), strict=True))
            for name, shape in _shapes(cls, config_class, described).items()
            if shape != plain.get(name)
        }

    plain = _shapes(cls, config_class, json.loads(text))
    effects, failed = {}, []
    for path, value in _entries(json.loads(text)):
        if "vocab" not in path[-1] and path[-1] not in USUAL and value != height:
            continue
        try:
            effects[path] = changed(path)
        except Exception:  # such a model cannot be: some entries hold for several parts
            failed.append(path)
    return plain, effects | dict.fromkeys(failed, changed(*failed) if failed else {})


def _shapes(cls: type, config_class: Any, described: Mapping[str, Any]) -> Shapes:
    state = torch.get_rng_state()
    with outside_of_modes(), torch.device("meta"):
        model = cls(config_class.from_dict(described))
    if not torch.equal(state, torch.get_rng_state()):  # some classes draw on the CPU
        torch.set_rng_state(state)
    held: Mapping[str, Tensor] = model.state_dict(keep_vars=True)
    return {name: tuple(one.shape) for name, one in held.items() if isinstance(one, Tensor)}


def _entries(
    described: Mapping[str, Any], path: tuple[str, ...] = ()
) -> Iterator[tuple[tuple[str, ...], int]]:
    """Each number of a config, and those of the configs in it."""
    for key, value in described.items():
        if isinstance(value, dict):
            yield from _entries(value, (*path, key))
        elif type(value) is int:
            yield (*path, key), value
