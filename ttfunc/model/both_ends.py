"""The two ends of a model, its input embedding and its head: whether rows of one need the other."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from ttfunc.engines.ownership import EngineParameters, is_owned, shape_of
from ttfunc.model.targets import (
    check_target,
    ends_of,
    has_matrix,
    input_embedding,
    layer_of,
)

_IN_ADAPTERS = re.compile(r"\.(?:lora_\w+|original_module)(?:\.|$)")


def both_ends(model: nn.Module, likely: bool = False) -> dict[str, nn.Module]:
    """The input embedding and the head of a model that names both, where they are as high.

    With `likely`, the only Linear of this height is the head of a model that names none, and a head
    that cannot get longer with the embedding is refused: TypeError or ValueError.
    """
    try:
        embedding = input_embedding(model)
    except (TypeError, ValueError):  # which init_deltas says, where nothing else is named
        return {}
    found, first = dict([embedding]), embedding[1]
    height = shape_of(first.get_parameter("weight"))[0]
    named = ends_of(model)[1]
    heads = (layer_of(*one) for one in model.named_modules() if one[1] is named)
    head = next(heads, None) or (_only_linear(model, height) if likely else None)
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
    weight: Any = getattr(module, "weight", None) if has_matrix(module) else None
    high = weight is not None and len(shape_of(weight)) == 2 and shape_of(weight)[0] == height
    if high and likely:
        check_target(model, name, module)
    elif _is_another_vocabulary(model, weight, first):
        return found
    if high:
        return {**found, name: module}
    if likely:
        has = "no weight of its own" if weight is None else f"one of {tuple(shape_of(weight))}"
        raise ValueError(
            f"a new token needs a row at both ends, under one id: {embedding[0]!r} of "
            f"{type(model).__name__} has {height} rows, and the head {name!r} has {has}. Resize "
            "the model (model.resize_token_embeddings), and train rows of tokens that it has. "
            f"For tokens that are read and never said, targets={embedding[0]!r} is enough."
        )
    return found


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
    """The names of the input embedding, of a head apart from it, and of the head as a target.

    names: those of a parameter of the embedding. The last of the three is the module in the head
    that can be a target and has a row of the token; None if there is none. The whole is None where
    the parameter is the head's too, where the model names no head or one of another vocabulary, and
    where PEFT trains a copy of the head.
    """
    ends = ends_of(model)
    if ends[0] is None or ends[1] is None or "modules_to_save" in ends[1]._modules:
        return None
    modules = list(model.named_modules(remove_duplicate=False))
    embeddings, heads = ([f"{name}." for name, one in modules if one is end] for end in ends)
    found = [name for name in names if name.startswith(tuple(embeddings))]
    if not (found and heads) or any(name.startswith(tuple(heads)) for name in names):
        return None
    (_, first), (_, last) = layer_of("", ends[0]), layer_of("", ends[1])
    if _is_another_vocabulary(model, last._parameters.get("weight"), first):
        return None
    target = None
    for name, module in modules:
        weight = module._parameters.get("weight")
        if f"{name}.".startswith(heads[0]) and weight is not None and shape_of(weight)[0] > token:
            with contextlib.suppress(TypeError):
                check_target(model, name, module)
                target = name
                break
    return found[0].rpartition(".")[0], heads[0].removesuffix("."), target


def check_ties_kept(model: nn.Module, name: str, module: nn.Module) -> None:
    """Raise ValueError if an engine has made two parameters of a tied embedding and head.

    Between them identity decides no longer; only here the config of the model is asked.
    """
    if not is_owned(module, "weight"):
        return
    engines, ends = EngineParameters(), [end for end in ends_of(model) if end is not None]
    held = [(end, end._parameters.get("weight")) for end in ends]
    weights = {id(engines.of(end, "weight", one)) for end, one in held if one is not None}
    if module not in ends or len(weights) < 2:
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
