"""What a module was like when it was looked at last, so that a call need not look into it again."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from torch import nn

from ttfunc.model.references import CALLABLES, CONTAINERS, FIXED, PLAIN

# What torch itself keeps in each module: hooks and flags.
PLUMBING = frozenset(vars(nn.Module()))


class Sight(NamedTuple):
    """The attributes of a module, as they are in its dictionary.

    kinds: the types of all attributes. objects, identities: the attributes that may refer to other
    objects, and their ids. containers, lengths: the lists and the like among these, and their
    lengths. callables: the functions. watched: the attributes to look into at each call.
    """

    kinds: tuple[type, ...]
    objects: tuple[str, ...]
    identities: tuple[int, ...]
    containers: tuple[str, ...]
    lengths: tuple[int, ...]
    callables: dict[str, int]
    watched: frozenset[str]

    @classmethod
    def of(cls, state: Mapping[str, Any], watched: Iterable[str]) -> Sight:
        """The attributes as they are now, with the names of those to watch."""
        objects = {
            name: value
            for name, value in state.items()
            if type(value) not in PLAIN and name not in PLUMBING
        }
        containers = [name for name, value in objects.items() if type(value) in CONTAINERS]
        # A closure stays the same object, but its contents may change.
        fixed = (name for name, value in objects.items() if type(value) in FIXED)
        return cls(
            tuple(map(type, state.values())),
            tuple(objects),
            tuple(map(id, objects.values())),
            tuple(containers),
            tuple(map(len, map(objects.__getitem__, containers))),
            callables(state),
            frozenset(watched).union(fixed) & state.keys(),
        )

    def holds(self, state: Mapping[str, Any]) -> bool:
        """Whether nothing has changed: a few comparisons, without a look into any attribute."""
        return (
            tuple(map(type, state.values())) == self.kinds
            and tuple(map(id, map(state.get, self.objects))) == self.identities
            and tuple(map(len, map(state.__getitem__, self.containers))) == self.lengths
        )

    def renewed(self, state: Mapping[str, Any]) -> Sight:
        """The attributes as they are now; those that are new are watched as well."""
        now = Sight.of(state, self.watched)
        new = now._known() - self._known()
        return now._replace(watched=now.watched.union(name for name, _ in new))

    def _known(self) -> set[tuple[str, int]]:
        known = {*zip(self.objects, self.identities, strict=True)}
        return known.union(zip(self.containers, self.lengths, strict=True))


def callables(state: Mapping[str, Any]) -> dict[str, int]:
    """The functions among a module's attributes, such as a `forward` that a tool has set."""
    return {name: id(value) for name, value in state.items() if type(value) in CALLABLES}
