"""What a TokenModule shows of its model: data as they are, modules and methods with the rows."""

from __future__ import annotations

import contextlib
import functools
import inspect
from collections.abc import Iterator
from contextvars import ContextVar
from types import MethodType
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from ttfunc.deltas import TokenDeltas
from ttfunc.merging import merge
from ttfunc.names import innermost
from ttfunc.slots import find_slots
from ttfunc.weight.deferred import PatchedWeight
from ttfunc.weight.fused_head import LongerWeight, can_fuse, longer_states


class Bridge(Protocol):
    """A TokenModule, as it is used here."""

    base: nn.Module

    def params(self) -> TokenDeltas: ...

    def weights(self) -> dict[str, Tensor]: ...

    def call(self, args: Any, kwargs: Any, method: str, at: nn.Module | None = None) -> Any: ...


_FUSING: ContextVar[object] = ContextVar("fusing", default=None)  # the module in such a call

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
    {"get_input_embeddings", "get_output_embeddings", "get_encoder", "get_decoder"}
)
# How methods begin that write or replace the weights of the model, or save them without the rows.
_WEIGHTS = (
    *("save", "push", "resize", "set_", "tie_", "load", "init", "_init", "post_init", "prune"),
    *("add_adapter", "delete_adapter", "enable_adapter", "disable_adapter", "merge", "unmerge"),
    *("unload", "quantize", "dequantize", "create_or_update_model_card"),
)


def shown(bridge: Bridge, name: str) -> Any:
    """An attribute of the model, as its TokenModule shows it. Raises AttributeError for none."""
    base = bridge.base
    inner = innermost(base)
    # A private attribute that a tool has set on the model does not hold for the module.
    if name.startswith("__") or (name.startswith("_") and not hasattr(type(inner), name)):
        raise AttributeError(f"a TokenModule of {type(base).__name__} has no attribute {name!r}.")
    value = getattr(inner if hasattr(inner, name) else base, name)
    if name == "base_model" and (head := _fused_weight(bridge)) is not None:
        return functools.partial(_longer_call, bridge, value, head)
    if isinstance(value, (nn.Module, Tensor)):
        return part(bridge, value)
    owner = value.__self__ if isinstance(value, MethodType) else None
    if not isinstance(owner, nn.Module):
        if name.startswith("_"):
            raise AttributeError(f"{name!r} of {type(base).__name__} is private to it.")
        return value
    if name in ON_BASE:
        return value
    if name == "save_pretrained" and _is_saved_whole(base, owner):
        return functools.partial(_save_merged, bridge, owner)
    if name.startswith(_WEIGHTS):
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
        return bridge.call(args, kwargs, name, owner)

    return with_rows


def _check_multiplies(head: Any) -> None:
    if "base_layer" in getattr(head, "_modules", {}):
        raise ValueError(
            f"the head of the model is a {type(head).__module__}.{type(head).__name__}: code that "
            "takes its weight (as TRL's trainers do) would leave the adapter on it untrained. "
            "Leave the head out of the adapter's target_modules."
        )


@contextlib.contextmanager
def fusing(bridge: Bridge) -> Iterator[None]:
    """For a call with TRL's `fused_lm_head=True`, whose forward takes the backbone and the head.

    In it, both have k columns more, so that the head's weight needs no gradient (see fused_head).
    """
    token = _FUSING.set(bridge)
    try:
        yield
    finally:
        _FUSING.reset(token)


def _fused_weight(bridge: Bridge) -> PatchedWeight | None:
    if _FUSING.get() is not bridge:
        return None
    head = innermost(bridge.base).get_output_embeddings()  # type: ignore[operator]
    slots = find_slots(bridge.base, bridge.weights())
    own = getattr(head, "weight", None)
    weight = next((slot.stand_in for slot in slots if slot.held is own), None)
    return weight if can_fuse(weight) else None


def _longer_call(
    bridge: Bridge, backbone: nn.Module, head: PatchedWeight, *args: Any, **kwargs: Any
) -> Any:
    out = bridge.call(args, kwargs, "forward", at=backbone)
    out.last_hidden_state = longer_states(out.last_hidden_state, head)
    return out


def _is_saved_whole(base: nn.Module, owner: nn.Module) -> bool:
    """Whether it is a transformers model without an adapter in it."""
    adapted = any("base_layer" in module._modules for module in base.modules())
    known = owner is base and "state_dict" in inspect.signature(base.save_pretrained).parameters  # type: ignore[arg-type]
    return known and not adapted


def _save_merged(bridge: Bridge, owner: nn.Module, directory: Any, **options: Any) -> None:
    """What `save_pretrained` writes of the merged model; `options` are its own."""
    with torch.no_grad():
        merged = merge(owner.state_dict(), bridge.params())
    # On the copy, whose config has the size of the vocabulary.
    bridge.call((directory,), {"state_dict": merged, **options}, "save_pretrained", at=owner)


def part(bridge: Bridge, own: Any) -> Any:
    """A module or a tensor of the model, as its TokenModule shows it.

    A token matrix is the patched weight. A module that has one is called with the rows in it; what
    is set on it, and a hook, goes to the model's own module. Anything else is the model's own.
    """
    slots = find_slots(bridge.base, bridge.weights())
    weights = {id(slot.held): slot.stand_in for slot in slots}
    if isinstance(own, Tensor):
        weight = weights.get(id(own), own)
        if _FUSING.get() is bridge and can_fuse(weight):
            return LongerWeight.of(weight)
        return weight
    if not isinstance(own, nn.Module) or weights.keys().isdisjoint(map(id, own.parameters())):
        return own

    def attribute(self: nn.Module, name: str) -> Any:
        value = getattr(own, name)
        return part(bridge, value) if isinstance(value, (nn.Module, Tensor)) else value

    def call(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return bridge.call(args, kwargs, "forward", own)

    kind = type(own)
    space = {"__getattr__": attribute, "__call__": call, "__module__": kind.__module__}
    copy: nn.Module = object.__new__(type(kind.__name__, (kind,), space))
    copy.__dict__ = vars(own)  # one and the same, so that nothing that is set here is lost
    return copy
