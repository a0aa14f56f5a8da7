"""The names under which a model's own `save_pretrained` writes its matrices."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from ttfunc.model.matrix import way_to
from ttfunc.torch_private import outside_of_modes

# What wrappers inside of a model put into its names; a merged or plain model has none of these.
_WRAPPERS = {"_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module", "base_layer"}


def saved_names(model: nn.Module, names: Iterable[str]) -> dict[str, str]:
    """Those of `names` that are others in a folder of the model, and what they are there.

    transformers renames the parameters of some models when it saves them. It is asked by what
    `save_pretrained` itself calls, with a tensor on meta under each name; no weight is read. A
    wrapper around the model (PEFT's, say) is left out of the names. Of a model that is none of
    transformers', nothing is known.
    """
    transformers = sys.modules.get("transformers.modeling_utils")
    kind, revert = (
        getattr(transformers, name, None)
        for name in ("PreTrainedModel", "revert_weight_conversion")
    )
    if kind is None or revert is None:
        return {}
    found: dict[str, str] = {}
    for name in names:
        parts = name.split(".")
        for depth, module in enumerate(way_to(model, name)):
            if isinstance(module, kind):
                bare = ".".join(part for part in parts[depth:] if part not in _WRAPPERS)
                found[name] = _saved(revert, module, bare)
                break
    return {name: other for name, other in found.items() if other != name}


def _saved(revert: Any, model: nn.Module, name: str) -> str:
    with outside_of_modes():
        tensor: Tensor = torch.empty(0, device="meta")
    try:
        saved = revert(model, {name: tensor})
    except Exception:  # it refuses some quantised models, which it cannot save either
        return name
    # A matrix that is stored in another form is another tensor, and cannot be written to by rows.
    return next((other for other, one in saved.items() if one is tensor), name)
