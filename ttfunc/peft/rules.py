"""What PEFT would do with an adapter's config on a model: which modules, and what is tied."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from ttfunc.disk.tensors import prefix_errors
from ttfunc.model.targets import find_targets
from ttfunc.peft.adapter import INDICES, PREFIX
from ttfunc.peft.pattern import matching
from ttfunc.rows.deltas import RowSpec, TokenDeltas


def bare(specs: Mapping[str, RowSpec]) -> dict[str, RowSpec]:
    """The same matrices under their names in the model itself, without a PeftModel around it."""
    names = {key: [one.removeprefix(PREFIX) for one in spec.names] for key, spec in specs.items()}
    return {names[key][0]: replace(specs[key], names=tuple(names[key])) for key in specs}


def check_ends(targets: Mapping[str, list[int]]) -> None:
    """Raises ValueError for module names that PEFT's LoRA would confuse."""
    for name in targets:
        if longer := [other for other in targets if other != name and other.endswith(name)]:
            raise ValueError(
                f"PEFT would give {longer[0]!r} the token indices of {name!r}, because it ends in "
                "that name, but their indices differ. Save them one at a time, or with ttfunc.save."
            )


def check_ties(params: TokenDeltas, model: nn.Module) -> None:
    """Raises ValueError where PEFT, by the config, would tie other weights than the model does."""
    says_so = bool(getattr(getattr(model, "config", None), "tie_word_embeddings", False))
    head = getattr(model, "get_output_embeddings", lambda: None)()
    headed = getattr(head, "weight", None)
    for name, spec in params.specs.items():
        embedding = spec.matrix is not None and spec.matrix.tensor is _input_weight(model)
        apart = embedding and isinstance(headed, Tensor) and headed is not _input_weight(model)
        if (len(spec.names) > 1 and not says_so) or (apart and says_so and len(spec.names) == 1):
            raise ValueError(
                f"tie_word_embeddings is {says_so} in the config of {type(model).__name__}, and "
                f"{name!r} is {spec.names}: PEFT reads the config, and would not tie the same. Set "
                "tie_word_embeddings as the model is."
            )


def _input_weight(model: nn.Module) -> object:
    return next(iter(find_targets(model, None).values())).weight


def check_targets(
    config: Mapping[str, Any], model: nn.Module, specs: Mapping[str, RowSpec]
) -> None:
    """Raises ValueError unless the matrices with rows are those that the config is for."""
    targeted = {f"{module}.weight" for module in _targeted_modules(config, model)}
    if missing := sorted(targeted - {name for spec in specs.values() for name in spec.names}):
        raise ValueError(
            f"it has no rows for its targets {missing}. It was trained on a model that ties them "
            "to others, or is damaged"
        )
    if others := [spec.names for spec in specs.values() if not targeted & set(spec.names)]:
        raise ValueError(
            f"it has rows for {others}, which is none of its targets {sorted(targeted)}. It was "
            "trained on a model that ties them: tie this one"
        )
    for spec in specs.values():
        apart = set(spec.names) - targeted
        if apart and spec.names and not _ties(model, targeted):
            raise ValueError(
                f"PEFT trained {sorted(targeted & set(spec.names))} without {sorted(apart)}, and "
                "in this model they are one matrix: the rows would be in both. Untie the model"
            )


def _ties(model: nn.Module, targeted: set[str]) -> bool:
    """Whether PEFT would tie others to a target: to the input embedding, if the config says so."""
    says_so = getattr(getattr(model, "config", None), "tie_word_embeddings", False)
    return bool(says_so) and f"{next(iter(find_targets(model, None)))}.weight" in targeted


def _targeted_modules(config: Mapping[str, Any], model: nn.Module) -> list[str]:
    """The modules with a weight that PEFT would give rows, by its rules."""
    weights = [name for name, _ in model.named_parameters(remove_duplicate=False)]
    names = [name.removesuffix(".weight") for name in weights if name.endswith(".weight")]
    standalone = config["peft_type"] == "TRAINABLE_TOKENS"
    wanted = config.get("target_modules") if standalone else config[INDICES["LORA"]]
    if standalone and isinstance(wanted, str):
        with prefix_errors("its target_modules cannot be followed"):
            return matching(wanted, names)
    if wanted is None or (not standalone and isinstance(wanted, list)):
        wanted = list(find_targets(model, None))
    if not isinstance(wanted, (list, dict)) or not all(isinstance(end, str) for end in wanted):
        raise ValueError(f"its targets are {wanted!r}, and names of modules are needed")
    # The ends in a LoRA may begin in the middle of a name.
    ends = tuple(f".{end}" if standalone else end for end in wanted)
    return [name for name in names if name in wanted or name.endswith(ends)]
