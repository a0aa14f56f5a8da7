"""The parameters of a module in an engine, in its copy for a call: as they are at each look."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, MutableMapping
from typing import Any


class LiveParameters(MutableMapping[str, Any]):
    """What another dictionary holds now, with some of its values replaced.

    An engine gathers into the module itself, and frees there. Writes go to the other dictionary.
    """

    def __init__(self, own: dict[str, Any], others: Mapping[str, Any]) -> None:
        self._own, self._others = own, dict(others)

    def __getitem__(self, name: str) -> Any:
        return self._others[name] if name in self._others else self._own[name]

    def __setitem__(self, name: str, value: Any) -> None:
        self._others.pop(name, None)
        self._own[name] = value

    def __delitem__(self, name: str) -> None:
        self._others.pop(name, None)
        del self._own[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._own)

    def __len__(self) -> int:
        return len(self._own)

    def copy(self) -> dict[str, Any]:
        # ZeRO-3's dictionary gathers what is taken from it by name, so nothing here is.
        return {name: self._others.get(name, one) for name, one in self._own.items()}

    def get(self, name: str, default: Any = None) -> Any:
        return self._others[name] if name in self._others else self._own.get(name, default)

    def __contains__(self, name: object) -> bool:
        return name in self._own

    def values(self) -> Any:
        return self.copy().values()

    def items(self) -> Any:
        return self.copy().items()
