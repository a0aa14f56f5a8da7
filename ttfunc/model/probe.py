"""Which entries of a config are the size of a matrix: the model is built with other ones, to see.

Models of transformers name these entries as they like, may have several of one value, and derive
sizes from them (`vocab_size + 8`). Built without values, which takes hundredths of a second, they
tell.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import nn

from ttfunc.model.names import within
from ttfunc.model.sizes import USUAL
from ttfunc.torch_private import outside_of_modes

Shapes = dict[str, tuple[int, ...]]


class Sizes(NamedTuple):
    """The entries that are the size of a matrix, with their values; and names of what else is."""

    entries: dict[str, int]
    others: list[str]


def sizes_of(
    model: nn.Module, held: Sequence[str], names: Sequence[str], height: int, grown: int
) -> Sizes | None:
    """Of a matrix of `model`, a model of transformers; None where its class cannot tell.

    held: all names, with the parts that wrappers around or in the model add. names: the matrix's.
    grown: by how much it is to be higher. The entries are paths, as `text_config.vocab_size`.
    """
    config: Any = model.config
    classes: Any = type(model), type(config)
    try:
        text = json.dumps(config.to_dict())
        found = _effects(*classes, text, height, grown)
    except Exception:  # any class may be asked, and may need what is not there
        return None
    plain, effects = found
    own = {other for name in names if (other := _plain(name, plain))}
    sizing = {path: changed for path, changed in effects.items() if own & changed.keys()}
    if any(changed[name] != (grown, 0) for changed in sizing.values() for name in own & {*changed}):
        return None
    others = {name for changed in sizing.values() for name in changed if name not in own}
    values = dict(_entries(json.loads(text)))
    idle = [
        path
        for path, changed in effects.items()
        if not changed and values[path] == height and _is_above(path, sizing)
    ]
    return Sizes(
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
) -> tuple[Shapes, dict[tuple[str, ...], dict[str, tuple[int, ...]]]]:
    """The shapes of such a model; and for each entry which of them it changes, and by how much."""
    plain = _shapes(cls, config_class, json.loads(text))
    effects = {}
    failed = []
    for path, value in _entries(json.loads(text)):
        if "vocab" not in path[-1] and path[-1] not in USUAL and value != height:
            continue
        try:
            effects[path] = _changed(cls, config_class, text, [path], grown, plain)
        except Exception:  # such a model cannot be: some entries hold for several parts
            failed.append(path)
    together = _changed(cls, config_class, text, failed, grown, plain) if failed else {}
    return plain, effects | dict.fromkeys(failed, together)


def _changed(
    cls: type,
    config_class: Any,
    text: str,
    paths: Iterable[tuple[str, ...]],
    grown: int,
    plain: Shapes,
) -> dict[str, tuple[int, ...]]:
    described = json.loads(text)
    for path in paths:
        holder = functools.reduce(lambda part, key: part[key], path[:-1], described)
        holder[path[-1]] += grown
    shapes = _shapes(cls, config_class, described)
    return {
        name: tuple(new - old for new, old in zip(shape, plain.get(name, shape), strict=True))
        for name, shape in shapes.items()
        if shape != plain.get(name)
    }


def _shapes(cls: type, config_class: Any, described: Mapping[str, Any]) -> Shapes:
    state = torch.get_rng_state()
    with outside_of_modes(), torch.device("meta"):
        model = cls(config_class.from_dict(described))
    if not torch.equal(state, torch.get_rng_state()):  # some classes draw on the CPU
        torch.set_rng_state(state)
    held: Mapping[str, torch.Tensor] = model.state_dict(keep_vars=True)
    return {name: tuple(one.shape) for name, one in held.items() if isinstance(one, torch.Tensor)}


def _entries(
    described: Mapping[str, Any], path: tuple[str, ...] = ()
) -> Iterator[tuple[tuple[str, ...], int]]:
    """Each number of a config, and those of the configs in it."""
    for key, value in described.items():
        if isinstance(value, dict):
            yield from _entries(value, (*path, key))
        elif type(value) is int:
            yield (*path, key), value


def _is_above(path: tuple[str, ...], others: Iterable[tuple[str, ...]]) -> bool:
    """Whether it is a usual name, beside one of the others or in a config around it."""
    return path[-1] in USUAL and any(other[: len(path) - 1] == path[:-1] for other in others)
