"""What a model says of the size of its vocabulary, and what has that size, beside the matrix."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

# Attributes that are the number of tokens: of configs, and of modules.
_OF_CONFIGS = ("vocab_size", "decoder_vocab_size", "n_words")
_OF_MODULES = (*_OF_CONFIGS, "num_embeddings", "out_features")


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
    copy = made[id(config)] = object.__new__(type(config))
    vars(copy).update(vars(config))
    # Some of transformers' configs have it under another name.
    names = (*_OF_CONFIGS, getattr(config, "attribute_map", {}).get("vocab_size"))
    for attribute, value in vars(config).items():
        if attribute in names and type(value) is int:
            vars(copy)[attribute] = sizes.get(value, value)
        elif _is_config(attribute, value):
            vars(copy)[attribute] = _resized(value, sizes, made)
    return copy


def is_bias(name: str, shape: Sequence[int], height: int) -> bool:
    """Whether it is a bias of the logits of `height` tokens, by its name and its shape."""
    return name.endswith("bias") and tuple(shape) in {(height,), (1, height)}


def bias_names(
    shapes: Mapping[str, Sequence[int]], matrix: Iterable[str], height: int
) -> list[str]:
    """The biases in a state dict, of which the shapes are known: beside the matrix, or above it."""
    holders = [name.rpartition(".")[0] + "." for name in matrix]
    return [
        name
        for name, shape in shapes.items()
        if is_bias(name, shape, height)
        and any(holder.startswith(name[: name.rfind(".") + 1]) for holder in holders)
    ]


def in_configs(text: str, sizes: Mapping[int, int]) -> str:
    """The text of a config, in JSON, with other sizes of the vocabulary; otherwise as it was."""
    for old, new in sizes.items():
        number = rf'("(?:{"|".join(_OF_CONFIGS)})"\s*:\s*){old}(?=\s*[,}}])'
        text = re.sub(number, rf"\g<1>{new}", text)
    return text
