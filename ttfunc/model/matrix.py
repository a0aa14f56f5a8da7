"""A token matrix: every name and every place under which a model holds it.

Identity decides: two names are tied when their parameters are one object, or two objects over the
same memory. No config is read for it.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from ttfunc.engines.ownership import Kept, shape_of
from ttfunc.model.memory import memory_of, overlaps
from ttfunc.torch_private import is_fake, is_traced


@dataclass(eq=False)
class Matrix:
    """One distinct token matrix of a model.

    names: every name that `state_dict` gives it, the first one first.
    slots: one name for each distinct (module, attribute) that holds it, with its tensor; in an
        engine with the tensor that it keeps between calls. A module reached by two paths is one.
    has_max_norm: whether an Embedding with max_norm holds it; that rescales it in place at a read.
    model: the model, which these rows do not keep alive.
    looked_up: whether a token was looked up with its rows since the last call that multiplied.
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
        """Its `(V, D)`, of which this rank may have a part alone."""
        height, width = shape_of(self.tensor)
        return height, width

    def moved_to(self, tensors: Sequence[Tensor]) -> None:
        """Note what the slots hold since an engine has sharded them; the whole is let go of."""
        names = [name for name, _ in self.slots]
        self.slots = tuple(zip(names, tensors, strict=True))

    @property
    def current(self) -> Tensor:
        """What the model holds in its place: while torch.export traces it, a fake of `tensor`."""
        model = self.model() if is_traced() else None
        now = None if model is None else held_under(model, self.slots[0][0])
        return self.tensor if now is None or not is_stand_in(now, self.tensor) else now

    def holds(self, tensor: Tensor) -> bool:
        """Whether it is the parameter in one of the slots, or stands for it in a trace."""
        if any(tensor is one for _, one in self.slots):
            return True
        model = self.model() if is_traced() else None
        if model is None:
            return False
        return any(
            held_under(model, name) is tensor and is_stand_in(tensor, one)
            for name, one in self.slots
        )

    @property
    def distinct(self) -> dict[str, Tensor]:
        """One name for each distinct tensor object: what torch's own functional_call needs."""
        first: dict[int, tuple[str, Tensor]] = {}
        for name, tensor in self.slots:
            first.setdefault(id(tensor), (name, tensor))
        return dict(first.values())

    def in_copy(self, memo: Mapping[int, Any]) -> Matrix:
        """The same matrix in the copy of its model that deepcopy has made; itself without one.

        Also itself within the model, of which the copy is not made yet, and where the copy is tied
        in another way.
        """
        model = self.model()
        copied = None if model is None else memo.get(id(model))
        if copied is None or "_modules" not in vars(copied):
            return self
        held = held_under(copied, self.slots[0][0])
        matrix = self if held is None else matrix_of(copied, held)
        return matrix if matrix.names == self.names else self


def is_stand_in(now: Tensor, tensor: Tensor) -> bool:
    """Whether `now` is what torch.export calls a model with, in place of such a tensor."""
    if not (is_traced() and is_fake(now)):
        return False
    return now.shape == tensor.shape and now.dtype == tensor.dtype and now.device == tensor.device


def holds_floats(tensor: Tensor) -> bool:
    """Whether it has floats, and no codes for them: some quantised classes say a float's dtype."""
    return tensor.is_floating_point() and type(tensor).dequantize is Tensor.dequantize


def matrix_of(model: nn.Module, tensor: Tensor) -> Matrix:
    """Every place of `model` that holds `tensor`: by identity, or by the same memory and shape.

    A place is a parameter or a buffer. Raises ValueError where another place covers a part of the
    same memory, or all of it in another shape: the two cannot be patched together.
    """
    return matrices_of(model, [tensor])[0]


def matrices_of(model: nn.Module, tensors: Sequence[Tensor]) -> list[Matrix]:
    """`matrix_of` each of them: the model is searched once."""
    held = list(_held(model))
    # Two places that an engine has gathered for each by itself are one tensor as it keeps them.
    engines = Kept()
    kept = {id(one): engines.of(module, attribute, one) for _, module, attribute, one in held}
    keys = [memory_of(kept.get(id(tensor), tensor)) for tensor in tensors]
    wanted = {key: _Places() for key in keys}
    of_storage: dict[object, list[Tensor]] = {}
    for key, tensor in zip(keys, tensors, strict=True):
        of_storage.setdefault(key[0], []).append(tensor)
    for name, module, attribute, one in held:
        memory = memory_of(kept[id(one)])
        places = wanted.get(memory)
        if places is None:
            _check_apart(name, one, of_storage.get(memory[0], ()))
            continue
        if attribute not in module._non_persistent_buffers_set:
            places.names.append(name)
        places.slots.setdefault((id(module), attribute), (name, kept[id(one)]))
        places.has_max_norm |= getattr(module, "max_norm", None) is not None
    found = {
        key: Matrix(tuple(p.names), tuple(p.slots.values()), p.has_max_norm, weakref.ref(model))
        for key, p in wanted.items()
    }
    return [found[key] for key in keys]


def names_apart(model: nn.Module, matrix: Matrix) -> tuple[str, ...]:
    """The names of its other matrices of this shape, which may be tied to this one elsewhere."""
    return tuple(
        name
        for name, module, attribute, one in _held(model)
        if name not in matrix.names
        and attribute not in module._non_persistent_buffers_set
        and not (is_lazy(one) or one.is_nested)
        and shape_of(one) == matrix.shape
    )


def _held(model: nn.Module) -> Iterator[tuple[str, nn.Module, str, Tensor]]:
    """Every parameter and buffer, by each of its names: the module, the attribute, the tensor."""
    for path, module in named_modules(model):
        for attribute, one in chain(module._parameters.items(), module._buffers.items()):
            if one is not None:
                yield f"{path}.{attribute}" if path else attribute, module, attribute, one


class _Places:
    """Where a tensor is held, as far as it was found."""

    def __init__(self) -> None:
        self.names: list[str] = []
        self.slots: dict[tuple[int, str], tuple[str, Tensor]] = {}
        self.has_max_norm = False


def _check_apart(name: str, other: Tensor, tensors: Iterable[Tensor]) -> None:
    for tensor in tensors:
        if overlaps(other, tensor):
            raise ValueError(
                f"{name!r} {tuple(other.shape)} is another view of the matrix "
                f"{tuple(tensor.shape)}: the two cannot be patched together. Give it "
                "memory of its own, or make it the same parameter."
            )


def count_places(model: nn.Module, tensors: Iterable[Tensor]) -> int:
    """How many places of `model` hold one of exactly these tensors, as its engines keep them.

    A place is a module and an attribute of it; a module that has two names is one.
    """
    wanted, engines = {id(tensor) for tensor in tensors}, Kept()
    return sum(
        one is not None and id(engines.of(module, attribute, one)) in wanted
        for module in model.modules()
        for attribute, one in chain(module._parameters.items(), module._buffers.items())
    )


def way_to(model: nn.Module, name: str) -> list[nn.Module]:
    """The modules from the model to the one that holds `name`, as far as they exist."""
    way = [model]
    for part in name.split(".")[:-1]:
        module = way[-1]._modules.get(part)
        if module is None:
            break
        way.append(module)
    return way


def held_at(way: list[nn.Module], name: str) -> Tensor | None:
    """The parameter or buffer at the end of the way to its name; None where there is none."""
    if len(way) <= name.count("."):
        return None
    holder, attribute = way[-1], name.rpartition(".")[2]
    parameter = holder._parameters.get(attribute)
    return holder._buffers.get(attribute) if parameter is None else parameter


def held_under(model: nn.Module, name: str) -> Tensor | None:
    """The parameter or buffer that the model has under `name` now."""
    return held_at(way_to(model, name), name)


def named_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    yield from model.named_modules(remove_duplicate=False)
