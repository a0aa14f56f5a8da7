"""Which modules of a model hold the token matrices that are to be trained."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import TypeAlias

from torch import nn

from ttfunc.engines.ownership import shape_of
from ttfunc.model.held import tensors_of
from ttfunc.model.matrix import holds_floats

Targets: TypeAlias = "str | re.Pattern[str] | Sequence[str | re.Pattern[str]]"

# The layer within one of PEFT's: a LoRA's, or that of trainable tokens.
_AROUND = ("base_layer", "token_adapter")


def find_targets(model: nn.Module, targets: Targets | None) -> dict[str, nn.Module]:
    """The modules that `targets` names, by their full names; by default the input embedding.

    Where PEFT has put a layer around another, that is the one within, `"lm_head.base_layer"`.
    A string is a full module name (`""` is the model itself), or else the end of one at a dot
    (`"embed_tokens"` finds `model.embed_tokens`). A compiled pattern must match the whole name.
    Each item of a list must match. Raises ValueError if nothing matches, TypeError for a module
    that is neither an Embedding nor a Linear.
    """
    if targets is None:
        return dict([input_embedding(model)])
    if isinstance(targets, (str, re.Pattern)) or not isinstance(targets, Iterable):
        targets = [targets]
    found: dict[str, nn.Module] = {}
    for target in targets:
        if not isinstance(target, (str, re.Pattern)):
            raise TypeError(
                f"targets must be module names, got {type(target).__name__}: {target!r}. Give a "
                "string, a compiled pattern, or a list of them."
            )
        found |= _found(model, target)
    if not found:
        raise ValueError(f"targets is empty: {targets!r}. Name a module, or leave it out.")
    return found


def _found(model: nn.Module, target: str | re.Pattern[str]) -> dict[str, nn.Module]:
    modules = dict(model.named_modules(remove_duplicate=False))
    found = dict(layer_of(name, modules[name]) for name in _matching(list(modules), target))
    if not found:
        if isinstance(target, str) and _matching(list(modules), target.removesuffix(".weight")):
            raise ValueError(
                f"target {target!r} is a parameter, but a target must be the module that holds "
                f"it. Give targets={target.removesuffix('.weight')!r}."
            )
        raise ValueError(
            f"target {target!r} matches no module. {_candidates(model)} A string is a full module "
            "name or its end at a dot; for a regular expression give re.compile(...)."
        )
    for name, module in found.items():
        check_target(model, name, module)
    return found


def _matching(names: list[str], target: str | re.Pattern[str]) -> list[str]:
    if isinstance(target, re.Pattern):
        return [name for name in names if target.fullmatch(name)]
    if target in names:
        return [target]
    return [name for name in names if target and name.endswith(f".{target}")]


def layer_of(name: str, module: nn.Module) -> tuple[str, nn.Module]:
    """The layer with the matrix, within those that PEFT put around it; any other module itself."""
    while "weight" not in module._parameters:
        part = next((one for one in _AROUND if module._modules.get(one) is not None), None)
        if part is None:
            break
        name, module = f"{name}.{part}".removeprefix("."), module._modules[part]  # type: ignore
    return name, module


def check_target(model: nn.Module, name: str, module: nn.Module) -> None:
    """Raise TypeError or ValueError if the module has no rows that can be trained."""
    weight = module._parameters.get("weight")
    if "modules_to_save" in module._modules:
        raise copied_whole(name)
    known = isinstance(module, (nn.Embedding, nn.Linear)) or any(
        module is layer_of("", end)[1] for end in ends_of(model) if end is not None
    )
    if not known or (weight is not None and len(shape_of(weight)) != 2):
        raise TypeError(
            f"target {name!r} is a {type(module).__name__}: only Embedding and Linear modules have "
            f"rows to train. {_candidates(model)}"
        )
    if weight is None:
        raise TypeError(
            f"target {name!r} has no parameter named weight (it is computed, or managed by an "
            "engine), so there are no rows to patch. Remove the parametrization first."
        )
    if not isinstance(weight, nn.Parameter):
        raise TypeError(
            f"the weight of {name!r} is a stand-in of a functional call that is running, not the "
            "model's own. Call this before or after that call, or on the model itself."
        )
    scaled = any("scale" in beside for beside, _ in tensors_of(module))
    if not holds_floats(weight) or (weight.itemsize == 1 and scaled):
        kind = "" if type(weight) is nn.Parameter else f" ({type(weight).__name__})"
        raise TypeError(
            f"target {name!r} has a weight of dtype {weight.dtype}{kind}: only floating-point rows "
            "can be trained. Leave the token matrices out of the quantisation."
        )


def copied_whole(name: str, more: str = "") -> ValueError:
    return ValueError(
        f"PEFT trains a whole copy of {name!r}, because it is among modules_to_save{more}. Leave "
        "it out of these, and let rows be what is trained."
    )


def ends_of(model: nn.Module) -> list[nn.Module | None]:
    """The embedding and the head that the model itself names, each None if it names none."""
    found = []
    for end in ("input", "output"):
        try:
            named = getattr(model, f"get_{end}_embeddings")()
        except (AttributeError, NotImplementedError):  # not of transformers, or a composite
            named = None
        found.append(named if isinstance(named, nn.Module) else None)
    return found


def input_embedding(model: nn.Module) -> tuple[str, nn.Module]:
    """The embedding that the model names, else the only one, else the one named embed_tokens."""
    named = ends_of(model)[0]
    modules: list[tuple[str, nn.Module]] = list(model.named_modules())
    own = [layer_of(n, m) for n, m in modules if m is named]
    of_name = [layer_of(n, m) for n, m in modules if n.rpartition(".")[2] == "embed_tokens"]
    for choice in (
        # Some models have an embedding class of their own.
        [(n, m) for n, m in own if has_matrix(m)],
        [(n, m) for n, m in modules if isinstance(m, nn.Embedding)],
        [(n, m) for n, m in of_name if isinstance(m, nn.Embedding) or has_matrix(m)],
    ):
        if len(choice) == 1:
            check_target(model, *choice[0])
            return choice[0]
    raise ValueError(
        f"cannot tell which module is the input embedding of {type(model).__name__}. "
        f"{_candidates(model)} Name one: init_deltas(model, idx, targets=...)."
    )


def has_matrix(module: nn.Module) -> bool:
    return "weight" in module._parameters or "modules_to_save" in module._modules


def _candidates(model: nn.Module, most: int = 8) -> str:
    embeddings = [n for n, m in model.named_modules() if isinstance(m, nn.Embedding) and n]
    linears = [n for n, m in model.named_modules() if isinstance(m, nn.Linear) and n]
    if not embeddings + linears:
        return 'The model has no named Embedding or Linear module; targets="" is the model itself.'
    # Heads come last in a model, so the last Linear modules are the likely ones.
    shown = embeddings[:most] + linears[-max(2, most - len(embeddings)) :]
    return f"Candidates: {', '.join(map(repr, shown))}."
