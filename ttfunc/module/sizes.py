"""The size of the vocabulary that a TokenModule with new tokens shows: the size in a call."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from ttfunc.model.sizes import Resized
from ttfunc.module.classes import view_of, viewed
from ttfunc.rows.deltas import RowSpec


class Sizes:
    """The heights of the matrices that grow, and the configs in which they are shown.

    A config is shown as a view of the model's: what is set on it is set on the model's config,
    except for the size, which stays the size of the model.
    """

    def __init__(self, specs: Mapping[str, RowSpec]) -> None:
        self._new = {spec.shape[0]: spec.height for spec in specs.values() if spec.grown}
        self._old = {new: old for old, new in self._new.items()}
        # Each config and its view by the identity of the config, which is kept for its identity.
        self._configs: dict[int, tuple[Any, Any]] = {}

    def names_in(self, holder: Any) -> list[str]:
        """The attributes of a module or a config that are a size, or a config with a size in it."""
        if not self._new:
            return []
        own = vars(holder)
        state: dict[str, Any] = dict(own) if isinstance(holder, nn.Module) else {"config": holder}
        Resized(self._new).put_into(state)
        if not isinstance(holder, nn.Module):
            state = {**vars(state["config"])}
        # A dict is shown as it is: a copy of it would lose what is put into it.
        return [n for n, one in state.items() if one is not own[n] and not isinstance(one, dict)]

    def shown(self, value: Any) -> Any:
        """The value of such an attribute, as it is in a call."""
        if type(value) is int:
            return self._new.get(value, value)
        if id(value) not in self._configs:
            self._configs[id(value)] = value, view_of(value, self._answers_of_config(value))
        return self._configs[id(value)][1]

    def answers(self, holder: Any) -> dict[str, Any]:
        """What a view of a module or a config answers: its sizes as they are in a call."""

        def answer(name: str) -> property:
            def read(_: object) -> Any:
                return self.shown(vars(holder)[name])

            def write(_: object, value: Any) -> None:
                vars(holder)[name] = self._own(value)

            return property(read, write)

        return {name: answer(name) for name in self.names_in(holder)}

    def _own(self, value: Any) -> Any:
        """The model's own value for one that may have been shown."""
        return self._old.get(value, value) if type(value) is int else viewed(value)

    def _answers_of_config(self, config: Any) -> dict[str, Any]:
        kind, sizes = type(config), self.answers(config)

        def attributes(_: object) -> dict[str, Any]:
            own = vars(config)
            return {**own, **{name: self.shown(own[name]) for name in sizes}}

        # The last two are read by code that writes the config to a file, and that copies it.
        return {
            **sizes,
            "__dict__": property(attributes),
            "__reduce_ex__": lambda self, _: (object.__new__, (kind,), self.__dict__),
        }
