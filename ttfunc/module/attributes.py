"""What a TokenModule shows of its model: data as they are, modules and methods with the rows."""

from __future__ import annotations

import functools
import inspect
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn

from ttfunc.engines.ownership import engines_at_work, is_sharded
from ttfunc.merging.merge import merge
from ttfunc.model.names import innermost
from ttfunc.model.sizes import with_entries
from ttfunc.module.callers import check_adapter, check_reference, check_teacher
from ttfunc.module.fused_head import can_fuse, longer_states
from ttfunc.module.merged import can_merge, without_adapter
from ttfunc.module.parts import WRITERS, Bridge, is_fusing, part, stand_ins
from ttfunc.rows.new_tokens import config_entries
from ttfunc.rows.summary import summary
from ttfunc.weight.deferred import PatchedWeight

# Methods that read no token matrix. Some switch the model itself.
ON_BASE = frozenset(
    {
        *(
            f"{what}_checkpointing_{do}"
            for what in ("activation", "gradient")
            for do in ("enable", "disable")
        ),
        *("enable_input_require_grads", "disable_input_require_grads"),
        *("can_generate", "get_memory_footprint"),
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
    if name == "peft_config":
        check_adapter()
    if name == "dtype":
        check_teacher(base)
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
    if bridge._sizes.new and name in bridge._sizes.names_in(holder):
        return bridge._sizes.of(value)
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
    if name in _OF_MODULE:
        return functools.partial(_OF_MODULE[name], bridge, value)
    if name == "save_pretrained" and _is_saved_whole(base, owner):
        return functools.partial(_save_merged, bridge, value)
    if name == "save_pretrained" and can_merge(base) and _takes_state_dict(value):
        return functools.partial(_save_without_adapter, bridge, value)
    if name == "merge_and_unload" and can_merge(base):
        return functools.partial(_merge_and_unload, bridge)
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


def _number(bridge: Bridge, count: Any, *args: Any, **kwargs: Any) -> int:
    """Transformers' `num_parameters`: the model's own, and the rows, which are embeddings."""
    given = inspect.signature(count).bind(*args, **kwargs).arguments
    rows = [] if given.get("exclude_embeddings") else [*bridge.params().deltas.values()]
    trained = (row.numel() for row in rows if row.requires_grad or not given.get("only_trainable"))
    return int(count(*args, **kwargs)) + sum(trained)


def _of_all(bridge: Bridge, count: Any) -> tuple[int, int]:
    """PEFT's `get_nb_trainable_parameters`."""
    found = summary(bridge.base, bridge.params())
    return found.trainable_parameters, found.total_parameters


def _tag(bridge: Bridge, tag: Any, *args: Any, **kwargs: Any) -> Any:
    """`add_model_tags`, which TRL's trainers call when they have made their reference."""
    check_reference(bridge.base)
    return tag(*args, **kwargs)


_OF_MODULE: dict[str, Any] = {
    "add_model_tags": _tag,
    "num_parameters": _number,
    "get_nb_trainable_parameters": _of_all,
    "print_trainable_parameters": lambda bridge, count: print(
        summary(bridge.base, bridge.params())
    ),
}


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
    return owner is base and not adapted and _takes_state_dict(base.save_pretrained)


def _takes_state_dict(save: Any) -> bool:
    return "state_dict" in inspect.signature(save).parameters


def _save_merged(bridge: Bridge, save: MethodType, *args: Any, **kwargs: Any) -> None:
    """What the model's `save_pretrained` writes of the merged model."""
    options = _options(bridge, save, args, kwargs)
    owner = bridge.base
    entries = config_entries(bridge.params().specs)
    _check_whole(owner)
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


def _options(bridge: Bridge, save: Any, args: Any, kwargs: Any) -> dict[str, Any]:
    """The arguments of `save_pretrained` by name, without a state dict of this module's."""
    given = inspect.signature(save).bind(*args, **kwargs).arguments
    options: dict[str, Any] = {**given.pop("kwargs", {}), **given}
    others = options.pop("state_dict", None)
    if others is not None and others.keys() != bridge.state_dict().keys():
        raise ValueError(
            f"a state dict with {list(others)[:3]} is not that of this TokenModule. Leave it out: "
            "what is saved is the model with the rows in it."
        )
    return options


def _check_whole(owner: nn.Module) -> None:
    if engines_at_work() and any(map(is_sharded, owner.state_dict(keep_vars=True).values())):
        raise RuntimeError(
            f"each rank has a part of this {type(owner).__name__}, and save_pretrained writes it "
            "whole. Gather its state dict (get_model_state_dict of torch.distributed.checkpoint, "
            "with full_state_dict=True), and save merge(state_dict, module.params()) on one rank; "
            "or save the rows, and merge the folder that the model came from (merge_checkpoint)."
        )


def _save_without_adapter(bridge: Bridge, save: MethodType, *args: Any, **kwargs: Any) -> None:
    """What the plain model's `save_pretrained` writes, with the adapter merged and the rows."""
    options = _options(bridge, save, args, kwargs)
    _check_whole(bridge.base)
    bridge._over(*without_adapter(bridge, shares=True)).save_pretrained(**options)  # type: ignore[attr-defined]


def _merge_and_unload(bridge: Bridge, **options: Any) -> nn.Module:
    """A plain model of its own with the adapter and the rows in it, resized for new tokens."""
    _check_whole(bridge.base)
    plain, params = without_adapter(bridge, shares=False, **options)
    with torch.no_grad():
        merged = merge(plain.state_dict(), params)
    if heights := [spec.height for spec in params.specs.values() if spec.grown]:
        resize: Any = getattr(plain, "resize_token_embeddings", None)
        if resize is None:
            raise ValueError(
                f"{type(plain).__name__} cannot be resized for the new tokens: it has no "
                "resize_token_embeddings. Merge the adapter, and give the rows to merge()."
            )
        resize(max(heights), mean_resizing=False)
    plain.load_state_dict(merged)
    return plain
