"""Other names of a matrix: in a wrapper, in an adapter, in the model's own folder, or mistyped."""

from __future__ import annotations

import difflib
import re
import sys
from collections.abc import Collection, Iterable, Mapping, Sequence
from itertools import takewhile
from pathlib import Path
from reprlib import repr as shown

import torch
from torch import nn

from ttfunc.model.held import names_of, way_to
from ttfunc.model.matrix import Matrix, holds_floats, matrix_of
from ttfunc.torch_private import outside_of_modes

# The parts that wrappers put into the names of a model, each with its wrapper.
_WRAPPERS = {
    "_orig_mod": "torch.compile",
    "_fsdp_wrapped_module": "FSDP",
    "_checkpoint_wrapped_module": "checkpoint_wrapper",
    "base_model.model": "PEFT",
    "base_layer": "PEFT",
    "token_adapter": "PEFT",
    "module": "DataParallel or DistributedDataParallel",
}
# These count only at the beginning of a name, because models have such parts themselves.
_FIRST = ("base_model.model", "module")
PEFT_PREFIX = "base_model.model."  # before each name of the model in a PeftModel


def _any_of(parts: Iterable[str]) -> str:
    return rf"(?:(?:{'|'.join(map(re.escape, parts))})\.)"


_LAYERS = re.compile(rf"(?<![^.]){_any_of(('base_layer', 'token_adapter'))}")
_WITHIN = re.compile(rf"(?<![^.]){_any_of(_WRAPPERS.keys() - {*_FIRST})}")
_ALL = re.compile(rf"^{_any_of(_WRAPPERS)}+|{_WITHIN.pattern}")


def check_names(names: object) -> None:
    """Raise TypeError for anything but a mapping from names to names."""
    if not isinstance(names, Mapping) or not all(isinstance(n, str) for n in names.values()):
        raise TypeError(f"names must map strings to strings, got {shown(names)}.")


def peft_twin(name: str) -> str:
    """The parameter's name without the PeftModel around the model; with one if there was none."""
    bare = name.removeprefix(PEFT_PREFIX)
    return f"{PEFT_PREFIX}{name}" if bare == name else bare


def without_peft(name: str) -> str:
    """The parameter's name in the model itself, without a PeftModel and its layers."""
    return _LAYERS.sub("", name.removeprefix(PEFT_PREFIX))


def innermost(model: nn.Module) -> nn.Module:
    """The model in a PeftModel; any other model as it is."""
    get = getattr(model, "get_base_model", None)
    inner = get() if callable(get) else model
    return inner if isinstance(inner, nn.Module) else model


def advice(names: Sequence[str], held: Collection[str]) -> str:
    """A hint at the names that `held` has for `names`, and how to give them; empty without one."""
    found = through_wrappers(names, held) or _behind_a_prefix(names, held)
    return f"{_question(found)} Then give names={found!r}." if found else ""


def _question(found: Mapping[str, str]) -> str:
    """A question for a message: whether another name was meant, and which wrapper makes it."""
    parts = [
        f"'{part}.' of {who}"
        for part, who in _WRAPPERS.items()
        if any(f".{a}".count(f".{part}.") != f".{b}".count(f".{part}.") for a, b in found.items())
    ]
    wrapped = f" One of the two has the {' and the '.join(parts)}." if parts else ""
    return f" Did you mean {next(iter(found.values()))!r}?{wrapped}"


def is_end(a: str, b: str) -> int:
    """The number of parts of the shorter name, if the longer one ends in it; else 0."""
    parts = same_end(a, b)
    return parts if parts > min(_bare(a).count("."), _bare(b).count(".")) else 0


def same_end(a: str, b: str) -> int:
    """The number of equal parts at the end of two names."""
    parts = zip(reversed(_bare(a).split(".")), reversed(_bare(b).split(".")), strict=False)
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], parts))


def through_wrappers(names: Iterable[str], held: Iterable[str]) -> dict[str, str]:
    """For each name the one in `held` that differs only by parts of wrappers, if there is one."""
    bare: dict[str, list[str]] = {}
    for name in held:
        bare.setdefault(_bare(name), []).append(name)
    found = {name: bare.get(_bare(name), []) for name in names}
    return {name: others[0] for name, others in found.items() if len(others) == 1}


def within(name: str) -> str:
    """The name without the parts that wrappers within a model put into it."""
    return _WITHIN.sub("", name)


def _bare(name: str) -> str:
    """The name without the parts of any wrapper, in or around the model."""
    return _ALL.sub("", name)


def _behind_a_prefix(names: Sequence[str], held: Collection[str]) -> dict[str, str]:
    """Each name with one in `held`, if a single prefix makes them equal."""
    longer = {other.removesuffix(names[0]) for other in held if other.endswith(f".{names[0]}")}
    shorter = {names[0].removesuffix(other) for other in held if names[0].endswith(f".{other}")}
    if len(longer) + len(shorter) != 1:
        return {}
    (prefix,) = longer or shorter
    pairs = {n: prefix + n if longer else n.removeprefix(prefix) for n in names}
    return {name: other for name, other in pairs.items() if other in held}


def did_you_mean(name: str, held: Collection[str]) -> str:
    """A question for a message: which of `held` are like `name`."""
    close = difflib.get_close_matches(name, held, n=3, cutoff=0.5)
    return f" Did you mean {' or '.join(map(repr, close))}?" if close else ""


def matrix_named(model: nn.Module, name: str, source: Path) -> Matrix:
    """The matrix that `model` has under `name`. Raises KeyError, with similar names, for none."""
    held = names_of(model)
    name = next((one for one in (name, peft_twin(name), without_peft(name)) if one in held), name)
    if name not in held:
        found = through_wrappers([name], held)
        hint = _question(found) if found else did_you_mean(name, held)
        raise KeyError(
            f"{type(model).__name__} has no parameter {name!r}, for which {str(source)!r} has "
            f"rows.{hint} Use the model that the rows were trained on, without a wrapper."
        )
    if not holds_floats(held[name]):
        raise ValueError(
            f"{name!r} is {held[name].dtype} ({type(held[name]).__name__}) in this "
            f"{type(model).__name__}, and floating-point numbers are needed. Leave the token "
            "matrices out of the quantisation."
        )
    return matrix_of(model, held[name])


def saved_names(model: nn.Module, names: Iterable[str]) -> dict[str, str]:
    """The names that differ in a folder of the model, each with its name there.

    transformers renames the parameters of some models when it saves them. The function that
    `save_pretrained` calls says how: it gets a tensor on meta under each name, and no weight is
    read. Names in a folder have no parts of wrappers. Other models keep their names.
    """
    transformers = sys.modules.get("transformers.modeling_utils")
    kind, revert = (
        getattr(transformers, name, None)
        for name in ("PreTrainedModel", "revert_weight_conversion")
    )
    if kind is None or revert is None:
        return {}
    with outside_of_modes():
        tensor = torch.empty(0, device="meta")
    found: dict[str, str] = {}
    for name in names:
        way = way_to(model, name)
        depth = next((depth for depth, one in enumerate(way) if isinstance(one, kind)), None)
        if depth is not None:
            own = ".".join(name.split(".")[depth:])
            try:
                saved = revert(way[depth], {within(own): tensor})
            except Exception:  # it refuses some quantised models, which it cannot save either
                saved = {}
            # A matrix stored in another form is another tensor, and cannot be written to by rows.
            others = (other for other, one in saved.items() if one is tensor)
            found[name] = next(others, within(own))
    return {name: other for name, other in found.items() if other != name}
