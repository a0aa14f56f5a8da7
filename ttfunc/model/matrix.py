"""A token matrix: every name and every place under which a model holds it.

Identity decides: two names are tied if their parameters are one object, or two objects over the
same memory. No config is read for that.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from ttfunc.engines.ownership import EngineParameters, shape_of
from ttfunc.model.held import Held, held_in, tensor_under
from ttfunc.model.memory import memory_of, overlaps
from ttfunc.torch_private import is_fake, is_traced


@dataclass(eq=False)
class Matrix:
    """One distinct token matrix of a model.

    names: every name that `state_dict` gives it, in the order of the model.
    slots: one name for each distinct place (module, attribute) that holds it, with the tensor
        there; for an engine's parameter the tensor that the engine keeps between calls.
    has_max_norm: whether an Embedding with max_norm holds it, and rescales it in place at a read.
    model: the model, by a weak reference.
    looked_up: whether a lookup has read its rows since the last call with a product.
    """

    names: tuple[str, ...]
    slots: tuple[tuple[str, Tensor], ...]
    has_max_norm: bool
    model: weakref.ref[nn.Module]
    looked_up: bool = False

    @property
    def tensor(self) -> Tensor:
        """The `(V, D)` parameter under the first name."""
        return self.slots[0][1]

    @property
    def shape(self) -> tuple[int, int]:
        """The `(V, D)` of the whole, even if this rank has only a part of it."""
        height, width = shape_of(self.tensor)
        return height, width

    def moved_to(self, tensors: Sequence[Tensor]) -> None:
        """Put an engine's tensors into the slots, which no longer keep the whole matrix alive."""
        names = [name for name, _ in self.slots]
        self.slots = tuple(zip(names, tensors, strict=True))

    @property
    def current(self) -> Tensor:
        """The tensor that the model holds now, which is fake while torch.export traces it."""
        return (*self._stand_ins(), self.tensor)[0]

    def holds(self, tensor: Tensor) -> bool:
        """Whether `tensor` is the parameter in a slot, or stands for it in a trace."""
        return any(tensor is one for one in (*(one for _, one in self.slots), *self._stand_ins()))

    def _stand_ins(self) -> list[Tensor]:
        model = self.model() if is_traced() else None
        if model is None:
            return []
        now = [(tensor_under(model, name), one) for name, one in self.slots]
        return [fake for fake, one in now if fake is not None and is_stand_in(fake, one)]

    @property
    def distinct(self) -> dict[str, Tensor]:
        """One name for each distinct tensor object: what torch's own functional_call needs."""
        first: dict[int, tuple[str, Tensor]] = {}
        for name, tensor in self.slots:
            first.setdefault(id(tensor), (name, tensor))
        return dict(first.values())

    def in_copy(self, memo: Mapping[int, Any]) -> Matrix:
        """The matrix in the copy of its model that a deepcopy has made; itself without a copy.

        Also itself while the model is being copied, and if the copy has other ties.
        """
        model = self.model()
        copied = None if model is None else memo.get(id(model))
        if copied is None or "_modules" not in vars(copied):
            return self
        held = tensor_under(copied, self.slots[0][0])
        matrix = self if held is None else matrix_of(copied, held)
        return matrix if matrix.names == self.names else self


def is_stand_in(now: Tensor, tensor: Tensor) -> bool:
    """Whether `now` is a fake tensor with which torch.export replaces `tensor` in a model."""
    if not (is_traced() and is_fake(now)):
        return False
    return now.shape == tensor.shape and now.dtype == tensor.dtype and now.device == tensor.device


def holds_floats(tensor: Tensor) -> bool:
    """Whether it holds floats, and not their codes: some quantised classes have a float dtype."""
    return tensor.is_floating_point() and type(tensor).dequantize is Tensor.dequantize


def matrix_of(model: nn.Module, tensor: Tensor) -> Matrix:
    """Every place of `model` that holds `tensor`, as `matrices_of` finds them."""
    return matrices_of(model, [tensor])[0]


def matrices_of(model: nn.Module, tensors: Sequence[Tensor]) -> list[Matrix]:
    """The matrix of each tensor: every place of `model` with the same memory in the same shape.

    Raises ValueError if another place has a part of that memory, or all of it in another shape:
    the two cannot be patched together.
    """
    held = list(held_in(model))
    # An engine may have gathered each tied place into a tensor of its own; it keeps one for all.
    engines = EngineParameters()
    kept = {id(one.tensor): engines.of(*one[1:]) for one in held}
    keys = [memory_of(kept.get(id(tensor), tensor)) for tensor in tensors]
    places: dict[object, list[Held]] = {key: [] for key in keys}
    storages = {key[0] for key in keys}
    for one in held:
        key = memory_of(kept[id(one.tensor)])
        if key in places:
            places[key].append(one._replace(tensor=kept[id(one.tensor)]))
        elif key[0] in storages:
            for tensor in tensors:
                if overlaps(one.tensor, tensor):
                    raise ValueError(
                        f"{one.name!r} {tuple(one.tensor.shape)} is another view of the matrix "
                        f"{tuple(tensor.shape)}: the two cannot be patched together. Give it "
                        "memory of its own, or make it the same parameter."
                    )
    found = {key: _matrix(model, ones) for key, ones in places.items()}
    return [found[key] for key in keys]


def _matrix(model: nn.Module, places: Sequence[Held]) -> Matrix:
    slots: dict[tuple[int, str], tuple[str, Tensor]] = {}
    for one in places:
        slots.setdefault(one.place, (one.name, one.tensor))
    return Matrix(
        names=tuple(one.name for one in places if one.is_saved),
        slots=tuple(slots.values()),
        has_max_norm=any(getattr(one.module, "max_norm", None) is not None for one in places),
        model=weakref.ref(model),
    )


def names_apart(model: nn.Module, matrix: Matrix) -> tuple[str, ...]:
    """The names of other matrices of the same shape, which another model may tie to this one."""
    return tuple(
        one.name
        for one in held_in(model)
        if one.name not in matrix.names
        and one.is_saved
        and not (is_lazy(one.tensor) or one.tensor.is_nested)
        and shape_of(one.tensor) == matrix.shape
    )


def count_places(model: nn.Module, tensors: Iterable[Tensor]) -> int:
    """How many places of `model` hold one of these tensors, as its engines keep them."""
    wanted, engines = {id(tensor) for tensor in tensors}, EngineParameters()
    return len({one.place for one in held_in(model) if id(engines.of(*one[1:])) in wanted})
