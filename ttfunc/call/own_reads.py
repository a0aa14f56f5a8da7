"""Reads of the model's own matrix during a call, past the copies that the call runs on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor
from torch.overrides import TorchFunctionMode

from ttfunc.call.slots import Slot
from ttfunc.torch_private import tree_leaves
from ttfunc.weight.deferred import READS
from ttfunc.weight.overrides import ANSWERED_BY_BASE, ANSWERED_BY_PLACEHOLDER

# Functions that may get the model's own tensor during a call; an inner call uses them.
_QUESTIONS = ANSWERED_BY_BASE | ANSWERED_BY_PLACEHOLDER | {Tensor.detach, Tensor.is_inference}
# Those that an engine calls itself on what it has gathered.
_CASTS = {Tensor.to, Tensor.type_as, Tensor.float, Tensor.double, Tensor.half, Tensor.bfloat16}


class RefuseOwn(TorchFunctionMode):
    """Raises where a function is given the model's own tensor instead of that of the call.

    Of a tensor that an engine owns these are the functions that models read a matrix with: the
    engine gives it to others itself.
    """

    def __init__(self, uncopyable: Sequence[str], slots: Sequence[Slot]) -> None:
        super().__init__()
        self._own = {id(slot.held): slot.name for slot in slots if slot.place is None}
        self._places = [(slot.place, slot.name) for slot in slots if slot.place is not None]
        self._aside = uncopyable

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if func not in _QUESTIONS:
            own = self._own
            if self._places and func in READS and func not in _CASTS:
                own = own | {id(place.held()): name for place, name in self._places}
            for one in tree_leaves((args, kwargs)) if own else ():
                if id(one) in own:
                    what = f"was given to {func.__name__}"
                    raise RuntimeError(reached(own[id(one)], self._aside, what))
        return func(*args, **(kwargs or {}))


def reached(name: str, uncopyable: Sequence[str], what: str) -> str:
    """The message for a matrix that was reached, with what leads to it and the way out."""
    return (
        f"the model's own {name!r} {what} during a functional call: by a hook, or through "
        f"{list(uncopyable)}, an object or a global that leads to it and that a call cannot copy. "
        "Hold the module in a module, a list or a dict, or use torch.func.functional_call, which "
        "changes the model during the call."
    )
