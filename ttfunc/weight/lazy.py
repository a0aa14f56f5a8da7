"""A tensor that is made when something reads it; until then it answers questions about itself.

Its memory is one NaN, expanded to its shape. Code that reads the memory directly gets an error or
NaN, and never wrong numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from ttfunc.own_names import OwnTensorNames
from ttfunc.torch_private import forbid_writes, no_torch_function, tree_map
from ttfunc.weight.overrides import QUESTIONS, refuse_writes


class OnTensorsAlone:
    """A `__torch_dispatch__` that a class's tensors have, and the class itself does not.

    The dispatcher looks it up on the tensor. torch.compile looks it up on the class, and refuses a
    class that has one.
    """

    def __get__(self, tensor: Tensor | None, owner: Any) -> Any:
        return Tensor.__torch_dispatch__ if tensor is None else owner._dispatched


class Lazy(Tensor, metaclass=OwnTensorNames):  # type: ignore[metaclass]
    """A tensor that `make` makes at each read.

    piece: makes only the rows from a start to a stop; None if that takes the whole tensor.
    """

    make: Callable[[], Tensor]
    piece: Callable[[int, int], Tensor] | None

    # For each torch function that does not need the tensor made, what to do in its place.
    handlers: ClassVar[Mapping[Any, Callable[..., Any]]] = {}

    def answering(self, question: Callable[..., Any]) -> Tensor:
        """The tensor that answers a question about metadata."""
        return self

    def now(self) -> Tensor:
        """The tensor that a handler gets: itself, or the one that is in its place right now."""
        return self if self.piece is not None else self.make()

    def made(self) -> Tensor:
        """The tensor itself."""
        return self.make()

    def values(self) -> Tensor:
        """The tensor as the dispatcher reads it, below autograd."""
        return self.made()

    def loses_writes(self) -> bool:
        """Whether a write to it would be lost, because each read makes it anew."""
        return True

    def __dir__(self) -> list[str]:  # torch's own would read the values
        return sorted(object.__dir__(self))

    @classmethod
    def handled(cls, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The result of the function's handler; NotImplemented if it has none."""
        handler = cls.handlers.get(func)
        return NotImplemented if handler is None else handler(*args, **kwargs)

    @classmethod
    def __torch_function__(
        cls,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if func in QUESTIONS:
            with no_torch_function():
                return _called(func, lambda one: one.answering(func), args, kwargs)
        args = tuple(map(_now, args))
        kwargs = {name: _now(value) for name, value in kwargs.items()}
        result = cls.handled(func, args, kwargs)
        if result is not NotImplemented:
            return result
        refuse_writes(func, args, kwargs, _is_lost)
        return _called(func, cls.made, args, kwargs, cls)

    # Code that bypasses __torch_function__ reaches the dispatcher, below autograd, and its gradient
    # goes to the NaN, which passes it on.
    __torch_dispatch__ = OnTensorsAlone()

    @classmethod
    def _dispatched(
        cls,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        refuse_writes(func, args, kwargs, _is_lost)
        with torch.no_grad():
            return _called(func, lambda one: one.values(), args, kwargs)


def expanded_nan(
    like: Tensor, shape: tuple[int, ...] | torch.Size, dtype: torch.dtype | None = None
) -> Tensor:
    """One NaN with the device and dtype of another tensor, expanded to a shape."""
    nan = like.new_full((), torch.nan, dtype=dtype or like.dtype)
    forbid_writes(nan)
    return nan.expand(shape)


def lazy(
    like: Tensor,
    shape: tuple[int, ...] | torch.Size,
    make: Callable[[], Tensor],
    piece: Callable[[int, int], Tensor] | None = None,
) -> Lazy:
    """A lazy tensor of a shape, with the dtype and device of another tensor and no gradient."""
    plain = torch.empty(0, dtype=like.dtype, device=like.device)  # not a DTensor, as `like` may be
    made = expanded_nan(plain, shape).as_subclass(Lazy)
    made.make, made.piece = make, piece
    return made


def _called(
    func: Callable[..., Any],
    read: Callable[[Any], Tensor],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    kind: type[Lazy] = Lazy,
) -> Any:
    """The result of `func` with `read(x)` in place of each lazy tensor x of a kind."""

    def given(one: Any) -> Any:
        return read(one) if isinstance(one, kind) else one

    return func(*tree_map(given, args), **tree_map(given, kwargs))


def _piece(tensor: Any, index: Any) -> Any:
    """A slice of the first dimension, from the tensor's `piece`."""
    if not isinstance(tensor, Lazy) or not isinstance(index, slice):
        return NotImplemented
    if tensor.piece is None or index.step not in (None, 1):
        return NotImplemented
    start, stop, _ = index.indices(len(tensor))
    return tensor.piece(start, max(start, stop))


def _now(value: Any) -> Any:
    return value.now() if isinstance(value, Lazy) else value


def _is_lost(value: Any) -> bool:
    return isinstance(value, Lazy) and value.loses_writes()


Lazy.handlers = {Tensor.__getitem__: _piece}
