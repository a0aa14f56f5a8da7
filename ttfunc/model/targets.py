"""Which modules of a model hold the token matrices that are to be trained."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, TypeAlias

from torch import Tensor, nn

from ttfunc.engines.ownership import Kept, is_owned, shape_of
from ttfunc.model.matrix import holds_floats

Targets: TypeAlias = "str | re.Pattern[str] | Sequence[str | re.Pattern[str]]"

# The layer within one of PEFT's: a LoRA's, or that of trainable tokens.
_AROUND = ("base_layer", "token_adapter")
_IN_ADAPTERS = re.compile(r"\.(?:lora_\w+|original_module)(?:\.|$)")


def find_targets(model: nn.Module, targets: Targets | None) -> dict[str, nn.Module]:
    """The modules that `targets` names, by their full names; by default the input embedding.

    Where PEFT has put a layer around another, that is the one within, `"lm_head.base_layer"`.
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
    modules = dict(model.named_modules(remove_duplicate=False))
    found = dict(_layer(name, modules[name]) for name in _matching(list(modules), targets))
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


def _layer(name: str, module: nn.Module) -> tuple[str, nn.Module]:
    """The layer that PEFT has put others around, which has the matrix; another module as it is."""
    while "weight" not in module._parameters:
        part = next((one for one in _AROUND if module._modules.get(one) is not None), None)
        if part is None:
            break
        name, module = f"{name}.{part}".removeprefix("."), module._modules[part]  # type: ignore
    return name, module


def _check_module(model: nn.Module, name: str, module: nn.Module) -> None:
    weight = module._parameters.get("weight")
    if "modules_to_save" in module._modules:
        raise _copied_whole(name)
    known = isinstance(module, (nn.Embedding, nn.Linear)) or any(
        module is _layer("", one)[1]
        for one in (_named_by_model(model), _named_by_model(model, "output"))
        if isinstance(one, nn.Module)
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
    if not holds_floats(weight) or (weight.itemsize == 1 and _has_scale(module)):
        kind = "" if type(weight) is nn.Parameter else f" ({type(weight).__name__})"
        raise TypeError(
            f"target {name!r} has a weight of dtype {weight.dtype}{kind}: only floating-point rows "
            "can be trained. Leave the token matrices out of the quantisation."
        )


def _has_scale(module: nn.Module) -> bool:
    return any("scale" in name for name in (*module._parameters, *module._buffers))


def _copied_whole(name: str) -> ValueError:
    return ValueError(
        f"PEFT trains a whole copy of {name!r}, because it is among modules_to_save. Leave it out "
        "of these, and let rows be what is trained."
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
    modules: list[tuple[str, nn.Module]] = list(model.named_modules())
    of_name = [_layer(n, m) for n, m in modules if n.rpartition(".")[2] == "embed_tokens"]
    for choice in (
        # Some models have an embedding class of their own.
        [one for one in (_layer(n, m) for n, m in modules if m is named) if _has_matrix(one[1])],
        [(n, m) for n, m in modules if isinstance(m, nn.Embedding)],
        [(n, m) for n, m in of_name if isinstance(m, nn.Embedding) or _has_matrix(m)],
    ):
        if len(choice) == 1:
            _check_module(model, *choice[0])
            return choice[0]
    raise ValueError(
        f"cannot tell which module is the input embedding of {type(model).__name__}. "
        f"{_candidates(model)} Name one: init_deltas(model, idx, targets=...)."
    )


def _has_matrix(module: nn.Module) -> bool:
    return "weight" in module._parameters or "modules_to_save" in module._modules


def both_ends(model: nn.Module, likely: bool = False) -> dict[str, nn.Module]:
    """The input embedding and the head of a model that names both, where they are as high.

    With `likely`, the only Linear of this height is the head of a model that names none, and what
    cannot be longer with the embedding is refused: TypeError or ValueError.
    """
    try:
        found = dict([_input_embedding(model)])
    except (TypeError, ValueError):  # which init_deltas says, where nothing else is named
        return {}
    (first,) = found.values()
    height = shape_of(first.get_parameter("weight"))[0]
    head = _head(model) or (_only_linear(model, height) if likely else None)
    if head is None or isinstance(head[1], nn.Embedding):  # itself, or of another vocabulary
        return found
    name, module = head
    if likely and "modules_to_save" in module._modules:
        raise ValueError(
            f"a new token needs a row at both ends, and PEFT trains a whole copy of the head "
            f"{name!r} (modules_to_save), which has none for it. Leave the head out of "
            "modules_to_save, so that rows are what is trained of it too; or resize the model "
            "(model.resize_token_embeddings) before the adapter is made, and train rows of tokens "
            "that it has."
        )
    weight: Any = getattr(module, "weight", None) if _has_matrix(module) else None
    high = weight is not None and len(shape_of(weight)) == 2 and shape_of(weight)[0] == height
    if likely and high:
        _check_module(model, name, module)
    if high and (likely or not _is_another_vocabulary(model, weight, first)):
        return {**found, name: module}
    if likely and not _is_another_vocabulary(model, weight, first):
        has = "no weight of its own" if weight is None else f"one of {tuple(shape_of(weight))}"
        raise ValueError(
            f"a new token needs a row at both ends, under one id: {next(iter(found))!r} of "
            f"{type(model).__name__} has {height} rows, and the head {name!r} has {has}. Resize "
            "the model (model.resize_token_embeddings), and train rows of tokens that it has. "
            f"For tokens that are read and never said, targets={next(iter(found))!r} is enough."
        )
    return found


def _head(model: nn.Module) -> tuple[str, nn.Module] | None:
    """The output embeddings that the model names."""
    named = _named_by_model(model, "output")
    modules: Iterator[tuple[str, nn.Module]] = model.named_modules()
    return next((_layer(name, module) for name, module in modules if module is named), None)


def _only_linear(model: nn.Module, height: int) -> tuple[str, nn.Module] | None:
    """The one Linear of this height; adapters have some of their own."""
    heads = [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear)
        and shape_of(module.weight)[0] == height
        and not _IN_ADAPTERS.search(name)
    ]
    return heads[0] if len(heads) == 1 else None


def _is_another_vocabulary(model: nn.Module, weight: Tensor | None, first: nn.Module) -> bool:
    """Whether a head's matrix is looked up too, but not by the input embedding."""
    if weight is None or weight is first._parameters.get("weight"):
        return False
    return any(
        isinstance(module, nn.Embedding) and module._parameters.get("weight") is weight
        for module in model.modules()
    )


def head_apart(
    model: nn.Module, names: Sequence[str], token: int
) -> tuple[str, str, str | None] | None:
    """The input embedding that has the parameter `names`, and the head of the model, by name.

    And the module of the head that can be a target, and has a row of the token; None if there is
    none. None in place of all where the parameter is the head's too, where the model names no head
    or one of another vocabulary, and where PEFT trains a copy of the head as a whole.
    """
    modules = list(model.named_modules(remove_duplicate=False))
    ends = [_named_by_model(model), _named_by_model(model, "output")]
    embeddings, heads = ([f"{name}." for name, one in modules if one is end] for end in ends)
    found = [name for name in names if name.startswith(tuple(embeddings))]
    tied = any(name.startswith(tuple(heads)) for name in names)
    if not (found and heads) or tied or "modules_to_save" in ends[1]._modules:
        return None
    first, last = (_layer("", end)[1] for end in ends if isinstance(end, nn.Module))
    if _is_another_vocabulary(model, last._parameters.get("weight"), first):
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
