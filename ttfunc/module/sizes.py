"""What a TokenModule with new tokens says of the size of its vocabulary: what it is in a call."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from ttfunc.model.sizes import Resized
from ttfunc.rows.deltas import RowSpec


class Sizes:
    """The heights of the matrices that grow, and the configs as they are shown.

    A config that is shown shares its attributes with the model's: what is set on it is set on the
    model's, but for the size, which stays that of the model.
    """

    def __init__(self, specs: Mapping[str, RowSpec]) -> None:
        self.new = {spec.shape[0]: spec.height for spec in specs.values() if spec.grown}
        self._old = {new: old for old, new in self.new.items()}
        self._shown: dict[int, tuple[Any, Any]] = {}  # by the identity of the config, which is kept

    def names_in(self, module: nn.Module) -> list[str]:
        """The attributes of a module that say a size, itself or in a config."""
        if not self.new:
            return []
        return _differing(vars(module), self.new)

    def of(self, value: Any) -> Any:
        """A size, or a config, as it is in a call; anything else as it is."""
        if type(value) is int:
            return self.new.get(value, value)
        if id(value) in self._shown:
            return self._shown[id(value)][1]
        if not self.new or not _differing({"config": value}, self.new):
            return value
        shown = object.__new__(type(value))
        shown.__dict__ = vars(value)  # one and the same, so that nothing that is set here is lost
        self._shown[id(value)] = value, shown
        shown.__class__ = self._class_of(value)
        return shown

    def set(self, holder: Any, name: str, value: Any) -> None:
        """Set what a module or a config says, where a new size stands for the old one."""
        vars(holder)[name] = self._old.get(value, value) if type(value) is int else own(value)

    def properties(self, holder: Any, names: list[str]) -> dict[str, Any]:
        """For a class of its own: attributes of these names, as they are in a call."""

        def attribute(name: str) -> property:
            return property(
                lambda _: self.of(vars(holder)[name]),
                lambda _, value: self.set(holder, name, value),
            )

        return {name: attribute(name) for name in names}

    def _class_of(self, config: Any) -> type:
        """The class of one config, which is taken for that of the model's config."""
        kind = type(config)
        resized = {"config": config}
        Resized(self.new).put_into(resized)
        names = _differing_from(vars(config), vars(resized["config"]))
        space: dict[str, Any] = {
            **self.properties(config, names),
            "__class__": property(lambda self: kind),
            # Read by what writes the config, and by what copies it.
            "__dict__": property(
                lambda _: vars(config) | {n: self.of(vars(config)[n]) for n in names}
            ),
            "__reduce_ex__": lambda self, _: (object.__new__, (kind,), self.__dict__),
            "_own_config": config,
            "__module__": kind.__module__,
        }
        return type(kind.__name__, (kind,), space)


def own(config: Any) -> Any:
    """The model's config for one that is shown; anything else as it is."""
    return getattr(type(config), "_own_config", config)


def _differing(state: Mapping[str, Any], sizes: Mapping[int, int]) -> list[str]:
    """The attributes that are others in a call, or configs in which there are such."""
    resized = dict(state)
    Resized(sizes).put_into(resized)
    return _differing_from(state, resized)


def _differing_from(state: Mapping[str, Any], resized: Mapping[str, Any]) -> list[str]:
    return [
        name
        for name, value in resized.items()
        if value is not state[name] and (type(value) is int or _is_shown(value, state[name]))
    ]


def _is_shown(resized: Any, own: Any) -> bool:
    """Whether it is a config, of which some attributes are others in a call."""
    if isinstance(own, dict) or not hasattr(own, "__dict__"):
        return False
    return bool(_differing_from(vars(own), vars(resized)))
