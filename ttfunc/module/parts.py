"""The modules and tensors of a model, as its TokenModule shows them: with the rows in them."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from contextvars import ContextVar
from functools import partial
from typing import Any, NoReturn, Protocol

from torch import Tensor, nn

from ttfunc.call.known_paths import model_at_call
from ttfunc.call.swaps import swaps_of
from ttfunc.module.fused_head import can_fuse, longer_weight
from ttfunc.module.sizes import Sizes
from ttfunc.rows.deltas import TokenDeltas

# How methods begin that write or replace the weights of the model, or save them without the rows.
WRITERS = (
    *("save", "push", "resize", "set_", "tie_", "load", "init", "_init", "post_init", "prune"),
    *("add_adapter", "delete_adapter", "enable_adapter", "disable_adapter", "merge", "unmerge"),
    *("unload", "quantize", "dequantize", "create_or_update_model_card"),
)
_FUSING: ContextVar[object] = ContextVar("fusing", default=None)  # the module in such a call


class Bridge(Protocol):
    """A TokenModule, as it is used here. modes: those of a copy, by modules of the base."""

    base: nn.Module
    _modes: dict[nn.Module, bool] | None
    _sizes: Sizes

    def params(self) -> TokenDeltas: ...

    def _over(self, model: nn.Module, params: TokenDeltas) -> Bridge: ...

    def _weights(self) -> dict[str, Tensor]: ...

    def state_dict(self) -> dict[str, Tensor]: ...

    def _call(self, args: Any, kwargs: Any, method: Any, at: nn.Module | None = None) -> Any: ...


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


def is_fusing(bridge: Bridge) -> bool:
    """Whether this module is in such a call."""
    return _FUSING.get() is bridge


def stand_ins(bridge: Bridge) -> dict[int, Tensor]:
    """The weights of a call, by the identity of the model's own."""
    swaps = swaps_of(bridge.base, bridge._weights(), model_at_call(bridge.base))
    return {key: one for swap in swaps for key, one in swap.replacements().items()}


def part(bridge: Bridge, own: Any, weights: Mapping[int, Tensor] | None = None) -> Any:
    """A module or a tensor of the model, or a list of them, as its TokenModule shows it.

    A token matrix is the patched weight. A module that has one is called with the rows in it; what
    is set on it, and a hook, goes to the model's own module. Anything else is the model's own.
    """
    weights = stand_ins(bridge) if weights is None else weights
    if isinstance(own, Tensor):
        weight = weights.get(id(own), own)
        return longer_weight(weight) if is_fusing(bridge) and can_fuse(weight) else weight
    if type(own) in (list, tuple):
        return type(own)(part(bridge, one, weights) for one in own)
    if type(own) is dict:
        return {key: part(bridge, one, weights) for key, one in own.items()}
    if not isinstance(own, nn.Module) or weights.keys().isdisjoint(map(id, own.parameters())):
        return own
    copy: nn.Module = object.__new__(_part_class(bridge, own))
    copy.__dict__ = vars(own)  # one and the same, so that nothing that is set here is lost
    return copy


def _part_class(bridge: Bridge, own: nn.Module) -> type[nn.Module]:
    """A class for this one module, which takes its submodules and tensors from the TokenModule."""
    kind = type(own)

    writers = {name for name in dir(kind) if name.startswith(WRITERS) or name == "state_dict"}

    def attribute(self: nn.Module, name: str) -> Any:
        if name in writers:
            _refuse(name)
        return part(bridge, getattr(own, name))

    def call(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return bridge._call(args, kwargs, "forward", own)

    def held(name: str) -> property:
        def shown(self: nn.Module) -> dict[str, Any]:
            weights = stand_ins(bridge)
            return {key: part(bridge, one, weights) for key, one in vars(own)[name].items()}

        return property(shown)

    space: dict[str, Any] = {
        "__class__": property(lambda self: kind),  # so that a slice of a ModuleList is one
        "__module__": kind.__module__,
        "__getattr__": attribute,
        "__call__": call,
        "__deepcopy__": _refuse_copy,
        "_modules": held("_modules"),
        "_parameters": held("_parameters"),
    }
    space |= bridge._sizes.properties(own, bridge._sizes.names_in(own))
    if bridge._modes is not None:
        space["training"] = property(lambda self: (bridge._modes or {})[own])
        space |= dict.fromkeys(("train", "eval"), _refuse_modes)
    # Where a property raises AttributeError, Python asks __getattr__, which says why.
    space |= {name: property(partial(_refuse, name)) for name in writers}
    return type(kind.__name__, (kind,), space)


def _refuse(name: str, _: object = None) -> NoReturn:
    raise AttributeError(
        f"{name!r} of a part of a TokenModule would read or write the weights of the model "
        f"without the rows. Take {name!r} of the TokenModule, or of a part of module.base."
    )


def _refuse_copy(self: nn.Module, memo: object) -> NoReturn:
    raise TypeError(
        "a part of a TokenModule has no weights of its own to copy. Copy the TokenModule, and take "
        "the part of the copy."
    )


def _refuse_modes(self: nn.Module, mode: bool = True) -> NoReturn:
    raise RuntimeError(
        "a part of a copy of a TokenModule has no training mode of its own. Switch the whole copy."
    )
