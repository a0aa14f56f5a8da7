"""Which modules of a model hold the token matrices that are to be trained."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterable, Sequence
from typing import Any, TypeAlias

from torch import nn

from ttfunc.model.matrix import named_modules
from ttfunc.model.owners import Kept, is_owned, shape_of

Targets: TypeAlias = "str | re.Pattern[str] | Sequence[str | re.Pattern[str]]"


def find_targets(model: nn.Module, targets: Targets | None) -> dict[str, nn.Module]:
    """The modules that `targets` names, by their full names; by default the input embedding.

    A string is a full module name (`""` is the model itself), or else the end of one at a dot
    (`"embed_tokens"` finds `model.embed_tokens`). A compiled pattern must match the whole name.
    Each item of a list must match. Raises ValueError where nothing matches, TypeError for a module
    that is neither an Embedding nor a Linear.
    """
    if targets is None:
        return dict([_input_embedding(model)])
    if not isinstance(targets, (str, re.Pattern)):
        if not isinstance(targets, Iterable):
            raise _not_a_name(targets)
        if not targets:
            raise ValueError(f"targets is empty: {targets!r}. Name a module, or leave it out.")
        return {
            name: module
            for target in targets
            for name, module in find_targets(model, _checked(target)).items()
        }
    modules = dict(named_modules(model))
    found = {name: modules[name] for name in _matching(list(modules), targets)}
    if not found:
        if isinstance(targets, str) and _matching(list(modules), targets.removesuffix(".weight")):
            raise ValueError(
                f"target {targets!r} is a parameter, but a target must be the module that holds "
                f"it. Give targets={targets.removesuffix('.weight')!r}."
            )
        raise ValueError(
            f"target {targets!r} matches no module. {_candidates(model)} A string is a full module "
            "name or its end at a dot; for a regular expression give re.compile(...)."
        )
    for name, module in found.items():
        _check_module(model, name, module)
    return found


def _checked(target: object) -> str | re.Pattern[str]:
    if not isinstance(target, (str, re.Pattern)):
        raise _not_a_name(target)
    return target


def _not_a_name(target: object) -> TypeError:
    return TypeError(
        f"targets must be module names, got {type(target).__name__}: {target!r}. Give a "
        "string, a compiled pattern, or a list of them."
    )


def _matching(names: list[str], target: str | re.Pattern[str]) -> list[str]:
    if isinstance(target, re.Pattern):
        return [name for name in names if target.fullmatch(name)]
    if target in names:
        return [target]
    return [name for name in names if target and name.endswith(f".{target}")]


def _check_module(model: nn.Module, name: str, module: nn.Module) -> None:
    known = isinstance(module, (nn.Embedding, nn.Linear)) or module is _named_by_model(model)
    weight = module._parameters.get("weight")
    inner = module._modules.get("base_layer")
    if weight is None and isinstance(inner, (nn.Embedding, nn.Linear)):  # as peft wraps it
        path = f"{name}.base_layer" if name else "base_layer"
        raise TypeError(
            f"target {name!r} is a {type(inner).__name__} within an adapter "
            f"({type(module).__module__}.{type(module).__name__}): name the layer itself, "
            f"targets={path!r}."
        )
    if not known or (weight is not None and len(shape_of(weight)) != 2):
        raise TypeError(
            f"target {name!r} is a {type(module).__name__}: only Embedding and Linear modules have "
            f"rows to train. {_candidates(model)}"
        )
    if weight is not None and not isinstance(weight, nn.Parameter):
        raise TypeError(
            f"the weight of {name!r} is a stand-in of a functional call that is running, not the "
            "model's own. Call this before or after that call, or on the model itself."
        )
    if weight is None:
        raise TypeError(
            f"target {name!r} has no parameter named weight (it is computed, or managed by an "
            "engine), so there are no rows to patch. Remove the parametrization first."
        )
    if not weight.is_floating_point():
        raise TypeError(
            f"target {name!r} has a weight of dtype {weight.dtype}: only floating-point rows can "
            "be trained. Leave the token matrices out of the quantisation."
        )


def _named_by_model(model: nn.Module, end: str = "input") -> Any:
    """The embedding of that end that the model itself names; None where it names none."""
    try:
        return getattr(model, f"get_{end}_embeddings")()
    except (AttributeError, NotImplementedError):  # not a transformers model, or a composite one
        return None


def _input_embedding(model: nn.Module) -> tuple[str, nn.Module]:
    """The embedding that the model names, else the only one, else the one named embed_tokens."""
    named = _named_by_model(model)
    if isinstance(named, nn.Module) and "modules_to_save" in named._modules:
        raise ValueError(
            f"PEFT trains a whole copy of the input embedding of {type(model).__name__}, because "
            "it is among modules_to_save. Leave it out of these, and let rows be what is trained."
        )
    modules: list[tuple[str, nn.Module]] = list(model.named_modules())
    embeddings = [(n, m) for n, m in modules if isinstance(m, nn.Embedding)]
    for choice in (
        # Some models have an embedding class of their own.
        [(n, m) for n, m in modules if m is named and "weight" in m._parameters],
        embeddings,
        [(n, m) for n, m in embeddings if n.rpartition(".")[2] == "embed_tokens"],
    ):
        if len(choice) == 1:
            _check_module(model, *choice[0])
            return choice[0]
    raise ValueError(
        f"cannot tell which module is the input embedding of {type(model).__name__}. "
        f"{_candidates(model)} Name one: init_deltas(model, idx, targets=...)."
    )


def both_ends(model: nn.Module, likely: bool = False) -> dict[str, nn.Module]:
    """The input embedding and the head of a model that names both, where they are as high.

    With `likely`, the only Linear of this height is the head of a model that names none.
    """
    try:
        found = dict([_input_embedding(model)])
    except (TypeError, ValueError):  # which init_deltas says, where nothing else is named
        return {}
    (first,) = found.values()
    height = shape_of(first.get_parameter("weight"))[0]
    heads = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and shape_of(module.weight)[0] == height
    }
    named = _named_by_model(model, "output")
    if named is not None or not likely or len(heads) > 1:
        heads = {name: module for name, module in heads.items() if module is named}
    return {**found, **heads}


def head_apart(
    model: nn.Module, names: Sequence[str], token: int
) -> tuple[str, str, str | None] | None:
    """The input embedding that has the parameter `names`, and the head of the model, by name.

    And the module of the head that can be a target, and has a row of the token; None if there is
    none. None in place of all where the parameter is the head's too, where the model names no head,
    and where PEFT trains a copy of the head as a whole.
    """
    modules = list(named_modules(model))
    ends = [_named_by_model(model), _named_by_model(model, "output")]
    embeddings, heads = ([f"{name}." for name, one in modules if one is end] for end in ends)
    found = [name for name in names if name.startswith(tuple(embeddings))]
    tied = any(name.startswith(tuple(heads)) for name in names)
    if not (found and heads) or tied or "modules_to_save" in ends[1]._modules:
        return None
    embedding, head, target = found[0].rpartition(".")[0], heads[0], None
    for name, module in modules:
        weight = module._parameters.get("weight")
        if f"{name}.".startswith(head) and weight is not None and shape_of(weight)[0] > token:
            with contextlib.suppress(TypeError):
                _check_module(model, name, module)
                target = name
                break
    return embedding, head.removesuffix("."), target


def check_ties_kept(model: nn.Module, name: str, module: nn.Module) -> None:
    """Raise ValueError where an engine has made two parameters of a tied embedding and head.

    Between them identity decides no longer; only here the config of the model is asked.
    """
    if not is_owned(module, "weight"):
        return
    ends = [_named_by_model(model), _named_by_model(model, "output")]
    engines = Kept()
    weights = [
        engines.of(one, "weight", one.get_parameter("weight"))
        for one in ends
        if isinstance(one, nn.Module) and one._parameters.get("weight") is not None
    ]
    if module not in ends or len(weights) != 2 or weights[0] is weights[1]:
        return
    config: Any = getattr(model, "config", None)
    text = getattr(config, "get_text_config", lambda: config)()
    if getattr(text, "tie_word_embeddings", False):
        raise ValueError(
            f"the config of {type(model).__name__} says that its embedding and head are tied, but "
            f"since it is sharded {name!r} has a parameter of its own: rows of one would not reach "
            "the other. Make the parameters before the model is sharded (they stay right), or "
            "shard both ends in one group (fully_shard on the whole model)."
        )


def _candidates(model: nn.Module, most: int = 8) -> str:
    embeddings = [n for n, m in model.named_modules() if isinstance(m, nn.Embedding) and n]
    linears = [n for n, m in model.named_modules() if isinstance(m, nn.Linear) and n]
    if not embeddings + linears:
        return 'The model has no named Embedding or Linear module; targets="" is the model itself.'
    # Heads come last in a model, so the last Linear modules are the likely ones.
    shown = embeddings[:most] + linears[-max(2, most - len(embeddings)) :]
    return f"Candidates: {', '.join(map(repr, shown))}."
