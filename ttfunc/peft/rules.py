"""What PEFT would do with an adapter's config on a model: which modules, and what is tied."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor, nn

from ttfunc.disk.tensors import prefix_errors
from ttfunc.model.names import PEFT_PREFIX
from ttfunc.model.targets import find_targets
from ttfunc.peft.adapter import INDICES
from ttfunc.rows.deltas import RowSpec, TokenDeltas

# Regular expressions out of a file are matched in bounded time. `re` backtracks, so a pattern of
# thirty characters can take for ever: each choice multiplies the time by the length of a name.
# For n characters, three repeats take some n³ / 6 steps: a few milliseconds for the longest name.
MOST = 3

_LITERAL = re.compile(r"(?:\\\W|[^\\.^$*+?{}\[\]()])*", re.S)
_ESCAPE_OR_CLASS = re.compile(r"\\.|\[\^?\]?(?:\\.|[^\]\\])*\]", re.S)
_CHOICE = re.compile(r"[*+{|]|(?<!\()\?")
_BEYOND = re.compile(r"\)[*+{]|\(\?[^:]")  # groups that repeat, look around, or change flags


def check_ends(targets: Mapping[str, list[int]]) -> None:
    """Raises ValueError for module names that PEFT's LoRA would confuse."""
    for name in targets:
        if longer := [other for other in targets if other != name and other.endswith(name)]:
            raise ValueError(
                f"PEFT would give {longer[0]!r} the token indices of {name!r}, because it ends in "
                "that name, but their indices differ. Save them one at a time, or with ttfunc.save."
            )


def check_ties(params: TokenDeltas, model: nn.Module) -> None:
    """Raises ValueError if PEFT, by the config, would tie other weights than the model does."""
    says_so = _says_tied(model)
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


def _says_tied(model: nn.Module) -> bool:
    return bool(getattr(getattr(model, "config", None), "tie_word_embeddings", False))


def _input_weight(model: nn.Module) -> object:
    return next(iter(find_targets(model, None).values())).weight


def check_targets(
    config: Mapping[str, Any], model: nn.Module, specs: Mapping[str, RowSpec]
) -> None:
    """Raises ValueError unless the matrices with rows are those that the config is for."""
    targeted = {f"{module}.weight" for module in _targeted_modules(config, model)}
    matrices = [tuple(n.removeprefix(PEFT_PREFIX) for n in spec.names) for spec in specs.values()]
    if missing := sorted(targeted.difference(*matrices)):
        raise ValueError(
            f"it has no rows for its targets {missing}. It was trained on a model that ties them "
            "to others, or is damaged"
        )
    if others := [names for names in matrices if not targeted & set(names)]:
        raise ValueError(
            f"it has rows for {others}, which is none of its targets {sorted(targeted)}. It was "
            "trained on a model that ties them: tie this one"
        )
    # PEFT ties others to the input embedding, if the config says so.
    ties = _says_tied(model) and f"{next(iter(find_targets(model, None)))}.weight" in targeted
    for names in matrices:
        if (apart := set(names) - targeted) and not ties:
            raise ValueError(
                f"PEFT trained {sorted(targeted & set(names))} without {sorted(apart)}, and in "
                "this model they are one matrix: the rows would be in both. Untie the model"
            )


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


def matching(pattern: str, names: Iterable[str]) -> list[str]:
    """The `names` that `pattern` matches as a whole, as with `re.fullmatch`.

    Raises ValueError for an invalid pattern, for a group that repeats, for looking around, and for
    more than MOST repeats and alternatives. (Alternatives of escaped names may be any number.)
    """
    if _LITERAL.fullmatch(pattern):  # as PEFT and save_peft write them
        wanted = {re.sub(r"\\(\W)", r"\1", one) for one in pattern.split("|")}
        if r"\|" not in pattern:
            return [name for name in names if name in wanted]
    try:
        compiled = re.compile(pattern)
    except (re.error, RecursionError, OverflowError) as error:
        raise ValueError(f"{pattern!r} is no pattern: {error}") from None
    bare = _ESCAPE_OR_CLASS.sub("x", pattern)
    if _BEYOND.search(bare) or len(_CHOICE.findall(bare)) > MOST:
        raise ValueError(
            f"{pattern!r} is a pattern that may take for ever: it repeats a group, looks around, "
            f"or has more than {MOST} repeats and alternatives. Name the modules"
        )
    return [name for name in names if compiled.fullmatch(name)]
