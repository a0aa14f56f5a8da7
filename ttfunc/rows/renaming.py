"""Parameters under other names than the model's: those of a wrapper, a file or the user."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import replace

from ttfunc.model.names import check_names, is_end, peft_twin, same_end, without_peft
from ttfunc.rows.deltas import RowSpec, TokenDeltas

_NONE: Mapping[str, str] = {}


def renamed(
    params: TokenDeltas,
    names: Mapping[str, str] | None,
    held: Collection[str],
    where: str,
    missing: Callable[[RowSpec, str], str],
) -> TokenDeltas:
    """`params` under names that are `held` elsewhere, in place of the model's.

    Without `names`, those of a model in a PeftModel and of the model itself count as the same, and
    so do those under which transformers saves the model.
    For messages, `where` says what holds these names, and `missing` what is wrong with a name that
    is not held. Raises TypeError, KeyError or ValueError unless each of `names` maps a name of the
    parameters to a held name, and no two names become one.
    """
    if names is None:
        rows = {key: _beside_peft(_called(spec, held), held) for key, spec in params.specs.items()}
        return TokenDeltas(params.deltas, rows)
    check_names(names)
    known = {name: spec for spec in params.specs.values() for name in spec.names}
    for name, other in names.items():
        told = f"names has {other!r} for {name!r}, but "
        if name not in known:
            raise KeyError(f"{told}the parameters are for {list(known)}. Map from one of these.")
        if other not in held:
            raise KeyError(f"{told}{missing(known[name], other)}")
        if name != other and name in held:
            raise ValueError(
                f"{told}{where} has {name!r} too, which would be left as it is. Is it of "
                "the same model?"
            )
    called = Counter(names.get(name, name) for name in known)
    if twice := [name for name, times in called.items() if times > 1]:
        raise ValueError(f"names leads to {twice} more than once. Give each matrix its own name.")
    rows = {key: _called(spec, held, names) for key, spec in params.specs.items()}
    return TokenDeltas(params.deltas, rows)


def _called(spec: RowSpec, held: Collection[str], names: Mapping[str, str] = _NONE) -> RowSpec:
    """Under the given names, else the model's own, else those of the model's folder."""
    origin = spec.origin
    if names and not origin.biases:  # another model may have some where this one had none
        origin = replace(origin, biases=None)
    saved = origin.saved_as
    own = {name: saved[name] for name in saved if name not in held and saved[name] in held}
    called = (names.get(name, own.get(name, name)) for name in spec.names)
    return replace(spec, names=tuple(dict.fromkeys(called)), origin=origin)


def _beside_peft(spec: RowSpec, held: Collection[str]) -> RowSpec:
    for other in (str, peft_twin, without_peft):
        names = tuple(map(other, spec.names))
        if any(name in held for name in names):
            return replace(spec, names=names)
    return spec


def apart_among(spec: RowSpec, held: Iterable[str]) -> list[str]:
    """Which `held` names are of matrices that were others than this one when its rows were made.

    Parts that wrappers add, and a prefix before either name, make no difference, unless a name is
    as near to those of the matrix itself.
    """
    found = []
    for name in held:
        nearest = max(same_end(name, other) for other in spec.names)
        known = name in spec.origin.apart or peft_twin(name) in spec.origin.apart
        if known or any(is_end(name, other) > nearest for other in spec.origin.apart):
            found.append(name)
    return found


def key(kind: str, name: str) -> str:
    """The entry of this kind for a name. It has no dot, which a parameter's name must not have.

    >>> key("deltas", "model.embed_tokens.weight")
    'deltas/model/embed_tokens/weight'
    """
    escaped = name.replace("~", "~0").replace("/", "~1")  # as RFC 6901 does
    return f"{kind}/{escaped.replace('.', '/')}"


def name_in(entry: str, kind: str) -> str | None:
    """The name that `key` has made this entry of; None for an entry of another kind."""
    first, _, rest = entry.partition("/")
    if first != kind or not rest or "." in rest:
        return None
    return rest.replace("/", ".").replace("~1", "/").replace("~0", "~")
