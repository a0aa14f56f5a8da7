"""What a model says of the size of its vocabulary, and what has that size, beside the matrix."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

# Attributes that are the number of tokens: of configs, and of modules.
USUAL = ("vocab_size", "decoder_vocab_size", "n_words")
_OF_MODULES = (*USUAL, "num_embeddings", "out_features")


class Entry(NamedTuple):
    """A size in a config: before the new tokens, with them, and in the model itself."""

    old: int
    new: int
    start: int

    @property
    def back(self) -> Entry:
        return Entry(self.new, self.old, self.start)


def resize(state: dict[str, Any], sizes: Mapping[int, int], made: dict[int, Any]) -> None:
    """Give a module's dictionary other sizes of the vocabulary, from the old one to the new one.

    The configs in it are replaced by copies; `made` has those that there are, by the identity of
    the original, so that what was one config is one still.
    """
    for name, value in list(state.items()):
        if name in _OF_MODULES and type(value) is int:
            state[name] = sizes.get(value, value)
        elif _is_config(name, value):
            state[name] = _resized(value, sizes, made)


def _is_config(name: str, value: Any) -> bool:
    if not name.endswith("config") or isinstance(value, dict):  # Dynamo asks no more of one
        return False
    return hasattr(value, "__dict__") and not callable(value)


def _resized(config: Any, sizes: Mapping[int, int], made: dict[int, Any]) -> Any:
    if id(config) in made:
        return made[id(config)]
    new = made[id(config)] = object.__new__(type(config))
    vars(new).update(vars(config))
    # Some of transformers' configs have it under another name.
    names = (*USUAL, getattr(config, "attribute_map", {}).get("vocab_size"))
    for attribute, value in vars(config).items():
        if attribute in names and type(value) is int:
            vars(new)[attribute] = sizes.get(value, value)
        elif _is_config(attribute, value):
            vars(new)[attribute] = _resized(value, sizes, made)
    return new


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
