"""Reads of the model's own matrix during a call, past the copies that the call runs on.

No search finds everything that leads to a matrix outside of the path: a global, an object, a view
of its memory. So ttfunc watches each torch function in the first call of each kind, and in every
call of a model with an object that is known to lead there. A read of the model's own matrix is an
error.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ttfunc.call.path import Path
from ttfunc.call.swaps import Swap
from ttfunc.model.memory import addresses_of, overlaps
from ttfunc.torch_private import in_backward, is_of_a_graph, is_traced, leave_mode
from ttfunc.weight.deferred import READS
from ttfunc.weight.overrides import ANSWERED_BY_BASE, ANSWERED_BY_PLACEHOLDER

# Functions that may get the model's own tensor during a call: no values are read.
_QUESTIONS = ANSWERED_BY_BASE | ANSWERED_BY_PLACEHOLDER | {Tensor.detach, Tensor.is_inference}
# Those that an engine calls itself on what it has gathered.
_CASTS = {Tensor.to, Tensor.type_as, Tensor.float, Tensor.double, Tensor.half, Tensor.bfloat16}
_CALL = nn.Module.__call__.__code__


class OwnReads(TorchFunctionMode):
    """A mode that raises if a function gets the model's own tensor, or another one in its memory.

    For a tensor that an engine owns, only lookups and products are checked: the engine itself gives
    it to other functions.
    """

    def __init__(self, model: nn.Module, swaps: Sequence[Swap], uncopyable: Sequence[str]) -> None:
        super().__init__()
        self._model, self._uncopyable = model, uncopyable
        self._places = [(place, swap.names[-1]) for swap in swaps for place, _ in swap.in_engine]
        self._own: dict[int, str] = {}
        self._memory: list[tuple[int, int, str]] = []
        for name, weight, tensor in (
            (swap.names[-1], swap.weight, one)
            for swap in swaps
            for one in swap.held
            if not swap.in_engine
        ):
            # A caller may give the model's own tensor, or a view of it.
            if overlaps(weight, tensor):
                continue
            self._own[id(tensor)] = name
            if not is_traced() and (addresses := addresses_of(tensor)):
                self._memory.append((*addresses, name))

    def enter(self) -> None:
        """Begin the watch in this thread."""
        self.__enter__()  # type: ignore[no-untyped-call]

    def leave(self) -> None:
        """End the watch if it has begun; an interrupt may have come first."""
        leave_mode(self)

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        # Dynamo, which may compile a function in a watched call, traces no identities.
        if not (torch.compiler.is_dynamo_compiling() or func in _QUESTIONS or is_of_a_graph(func)):
            for name in filter(None, (self._read(func, one) for one in _tensors(args, kwargs))):
                if not (in_backward() or self._is_meant()):
                    what = f"was given to {getattr(func, '__name__', func)}"
                    raise read_past_the_copies(name, self._uncopyable, what, _where())
        return func(*args, **(kwargs or {}))

    def _read(self, func: Any, tensor: Tensor) -> str | None:
        """The name of the model's own matrix whose memory the tensor shares; None for none."""
        if name := self._own.get(id(tensor)):
            return name
        if self._places and func in READS and func not in _CASTS:
            for place, name in self._places:
                if place.held() is tensor:
                    return name
        first, last = addresses_of(tensor) or (0, 0)
        return next((name for a, b, name in self._memory if first < b and a < last), None)

    def _is_meant(self) -> bool:
        """Whether the read is of another call: a hook's of the model itself, or one of ttfunc's."""
        for frame in _frames():
            if frame.f_globals.get("__name__", "").startswith("ttfunc."):
                return frame.f_locals.get("watch") is not self
            if frame.f_code is _CALL and frame.f_locals.get("self") is self._model:
                return True
        return False


def _tensors(args: Any, kwargs: Mapping[str, Any] | None) -> Iterator[Tensor]:
    """The tensors among the arguments of a torch function, also in lists and tuples."""
    for one in (*args, *kwargs.values()) if kwargs else args:
        if isinstance(one, Tensor):
            yield one
        elif isinstance(one, (list, tuple)):
            yield from _tensors(one, None)


def _frames() -> Iterator[FrameType]:
    """The frames of the code that has called a torch function, the innermost first."""
    frame: FrameType | None = sys._getframe()
    while frame is not None:
        if frame.f_globals.get("__name__") != __name__:
            yield frame
        frame = frame.f_back


def _where() -> str:
    """Where the model's code reads: the innermost frame outside of torch."""
    frames = (one for one in _frames() if not one.f_globals.get("__name__", "").startswith("torch"))
    frame = next(frames)
    return f", in {frame.f_code.co_qualname} ({frame.f_code.co_filename}:{frame.f_lineno})"


def watch_of(model: nn.Module, swaps: Sequence[Swap], path: Path, kind: object) -> OwnReads | None:
    """The watch over a call; None if calls of its kind were watched before, or it is compiled.

    Compiled parts of a model would be compiled again for a call that is watched, and are not.
    Raises RuntimeError for a compiled call that may read past the copies.
    """
    if torch.compiler.is_dynamo_compiling():
        if path.uncopyable:
            what = "may be read in a compiled call"
            raise read_past_the_copies(swaps[0].names[0], path.uncopyable, what)
        return None
    if path.uncopyable or not (kind in path.watched or path.is_compiled or is_traced()):
        return OwnReads(model, swaps, path.uncopyable)
    return None


def read_past_the_copies(
    name: str, uncopyable: Sequence[str], what: str, where: str = ""
) -> RuntimeError:
    """The error for a read of the model's own matrix: what led to it, and the way out."""
    through = f"{list(uncopyable)}, " if uncopyable else ""
    return RuntimeError(
        f"the model's own {name!r} {what} during a functional call{where}: by a hook, or through "
        f"{through}an object, a global or a view of its memory that leads to it and that a call "
        "cannot copy. Hold the module in a module, a list or a dict, or use "
        "torch.func.functional_call, which changes the model during the call."
    )
