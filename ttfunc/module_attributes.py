"""What a TokenModule shows of its model: data as they are, modules and methods with the rows."""

from __future__ import annotations

import functools
import inspect
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn

from ttfunc.growth import config_entries
from ttfunc.merging import merge
from ttfunc.model.owners import engines_at_work, is_sharded
from ttfunc.model.sizes import with_entries
from ttfunc.module_parts import WRITERS, Bridge, is_fusing, part, stand_ins
from ttfunc.names import innermost
from ttfunc.weight.deferred import PatchedWeight
from ttfunc.weight.fused_head import can_fuse, longer_states

# Methods that read no token matrix. Some switch the model itself.
ON_BASE = frozenset(
    {
        *(
            f"{what}_checkpointing_{do}"
            for what in ("activation", "gradient")
            for do in ("enable", "disable")
        ),
        *("enable_input_require_grads", "disable_input_require_grads"),
        *("add_model_tags", "can_generate", "num_parameters", "get_memory_footprint"),
        *("prepare_decoder_input_ids_from_labels", "tokenize", "preprocess"),
        "_supports_logits_to_keep",
    }
)
# Methods that give a module of the model.
_GIVES_MODULE = frozenset(
    {
        *("get_input_embeddings", "get_output_embeddings", "get_encoder", "get_decoder"),
        "get_base_model",
    }
)


def shown(bridge: Bridge, name: str) -> Any:
    """An attribute of the model, as its TokenModule shows it. Raises AttributeError for none."""
    base = bridge.base
    inner = innermost(base)
    # A private attribute that a tool has set on the model does not hold for the module.
    if name.startswith("__") or (name.startswith("_") and not hasattr(type(inner), name)):
        raise AttributeError(f"a TokenModule of {type(base).__name__} has no attribute {name!r}.")
    holder = inner if hasattr(inner, name) else base
    value = getattr(holder, name)
    if name == "base_model" and (head := _fused_weight(bridge)) is not None:
        return functools.partial(_longer_call, bridge, value, head)
    if isinstance(value, Tensor) and isinstance(
        inspect.getattr_static(type(holder), name, None), property
    ):
        return bridge._call((), {}, lambda copy: getattr(copy, name), holder)
    owner = value.__self__ if isinstance(value, MethodType) else None
    if isinstance(owner, nn.Module):
        return _method(bridge, name, value, owner)
    if name.startswith("_") and not isinstance(value, (nn.Module, Tensor)):
        raise AttributeError(f"{name!r} of {type(base).__name__} is private to it.")
    return part(bridge, value) if _has_modules(value) else value


def _has_modules(value: Any) -> bool:
    if type(value) in (list, tuple, dict):
        values = value.values() if type(value) is dict else value
        return any(isinstance(one, (nn.Module, Tensor)) for one in values)
    return isinstance(value, (nn.Module, Tensor))


def _method(bridge: Bridge, name: str, value: MethodType, owner: nn.Module) -> Any:
    """A method of the model that runs with the rows."""
    base = bridge.base
    if name in ON_BASE:
        return value
    if name == "save_pretrained" and _is_saved_whole(base, owner):
        return functools.partial(_save_merged, bridge, value)
    if name.startswith(WRITERS):
        raise AttributeError(
            f"{name!r} of the {type(base).__name__} in a TokenModule does not use the trained "
            f"rows. module.base.{name} is the plain model's. functional_call(module.base, "
            "patch(module.params()), ..., method=...) runs a method with the rows, and "
            "ttfunc.save(module.params(), path) saves them."
        )

    @functools.wraps(value)
    def with_rows(*args: Any, **kwargs: Any) -> Any:
        if name in _GIVES_MODULE:
            found = value(*args, **kwargs)
            if name == "get_output_embeddings":
                _check_multiplies(found)
            return part(bridge, found)
        return bridge._call(args, kwargs, value.__name__, owner)

    return with_rows


def _check_multiplies(head: Any) -> None:
    if "base_layer" in getattr(head, "_modules", {}):
        raise ValueError(
            f"the head of the model is a {type(head).__module__}.{type(head).__name__}: code that "
            "takes its weight (as TRL's trainers do) would leave the adapter on it untrained. "
            "Leave the head out of the adapter's target_modules."
        )


def _fused_weight(bridge: Bridge) -> PatchedWeight | None:
    if not is_fusing(bridge):
        return None
    head = innermost(bridge.base).get_output_embeddings()  # type: ignore[operator]
    weight = stand_ins(bridge).get(id(getattr(head, "weight", None)))
    return weight if can_fuse(weight) else None


def _longer_call(
    bridge: Bridge, backbone: nn.Module, head: PatchedWeight, *args: Any, **kwargs: Any
) -> Any:
    out = bridge._call(args, kwargs, "forward", at=backbone)
    out.last_hidden_state = longer_states(out.last_hidden_state, head)
    return out


def _is_saved_whole(base: nn.Module, owner: nn.Module) -> bool:
    """Whether it is a transformers model without an adapter in it."""
    adapted = any("base_layer" in module._modules for module in base.modules())
    known = owner is base and "state_dict" in inspect.signature(base.save_pretrained).parameters  # type: ignore[arg-type]
    return known and not adapted


def _save_merged(bridge: Bridge, save: MethodType, *args: Any, **kwargs: Any) -> None:
    """What the model's `save_pretrained` writes of the merged model."""
    given = inspect.signature(save).bind(*args, **kwargs).arguments
    options = {**given.pop("kwargs", {}), **given}
    others = options.get("state_dict")
    if others is not None and others.keys() != bridge.state_dict().keys():
        raise ValueError(
            f"a state dict with {list(others)[:3]} is not that of this TokenModule. Leave it out: "
            "what is saved is the model with the rows in it."
        )
    owner = bridge.base
    entries = config_entries(bridge.params().specs)
    if engines_at_work() and any(map(is_sharded, owner.state_dict(keep_vars=True).values())):
        raise RuntimeError(
            f"each rank has a part of this {type(owner).__name__}, and save_pretrained writes it "
            "whole. Gather its state dict (get_model_state_dict of torch.distributed.checkpoint, "
            "with full_state_dict=True), and save merge(state_dict, module.params()) on one rank; "
            "or save the rows, and merge the folder that the model came from (merge_checkpoint)."
        )
    instead = stand_ins(bridge)  # in a copy also for what the base trains
    with torch.no_grad():
        own = dict(owner.named_parameters(remove_duplicate=False))
        state = {
            name: tensor if name not in own else _plain(instead.get(id(own[name]), tensor), tensor)
            for name, tensor in owner.state_dict().items()
        }
        merged = merge(state, bridge.params())

    def write(model: Any) -> None:  # a copy, whose config has a size of the vocabulary
        config = model.config
        try:
            if entries:
                model.config = with_entries(owner.config, entries)
            model.save_pretrained(**{**options, "state_dict": merged})
        finally:  # what the copy keeps, the model keeps
            model.config = config

    bridge._call((), {}, write, at=owner)


def _plain(other: Tensor, tensor: Tensor) -> Tensor:
    """The other one, but for a patched weight, which is merged."""
    return tensor if isinstance(other, PatchedWeight) else other.detach()
