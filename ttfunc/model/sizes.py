"""What a model says of the size of its vocabulary, and what has that size, beside the matrix."""

from __future__ import annotations

import copy
from collections.abc import Callable, Container, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from torch import Tensor, nn

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


def is_bias(name: str, shape: Sequence[int], height: int) -> bool:
    """Whether it is a bias of the logits of `height` tokens, by its name and its shape."""
    return name.endswith("bias") and tuple(shape) in {(height,), (1, height)}


def bias_names(
    shapes: Mapping[str, Sequence[int]],
    matrix: Iterable[str],
    height: int,
    known: Sequence[str] | None = None,
) -> list[str]:
    """The biases in a state dict, of which the shapes are known: beside the matrix, or above it.

    known: their names in the model, if the model was asked; the state dict may have other ones.
    """
    if known is not None and any(name in shapes for name in known):
        return [name for name in known if name in shapes and is_bias(name, shapes[name], height)]
    holders = [name.rpartition(".")[0] + "." for name in matrix]
    last = None if known is None else {name.rpartition(".")[2] for name in known}
    return [
        name
        for name, shape in shapes.items()
        if is_bias(name, shape, height)
        and any(holder.startswith(name[: name.rfind(".") + 1]) for holder in holders)
        and (last is None or name.rpartition(".")[2] in last)
    ]
