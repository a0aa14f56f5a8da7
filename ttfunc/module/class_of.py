"""The class of a TokenModule, which tools take for the model's own class."""

from __future__ import annotations

import inspect
import weakref
from typing import Any, TypeVar

from torch import nn

_Kind = TypeVar("_Kind", bound=nn.Module)

_CLASSES: weakref.WeakKeyDictionary[type[nn.Module], weakref.ref[type[nn.Module]]]
_CLASSES = weakref.WeakKeyDictionary()


def like(model_class: type[nn.Module], module_class: type[_Kind]) -> type[_Kind]:
    """A subclass that Trainer takes for the model's class; modules over one class share it."""
    known = _CLASSES.get(model_class, lambda: None)()
    if known is None or known.__base__ is not module_class:
        known = _subclass(model_class, module_class)
        _CLASSES[model_class] = weakref.ref(known)
    return known  # type: ignore[return-value]


def _subclass(model_class: type[nn.Module], module_class: type[_Kind]) -> type[_Kind]:
    """A subclass with the name and the signature that Trainer relies on.

    Trainer shifts the labels according to the name. According to the signature of `forward`, on the
    class and on the instance, it chooses columns, finds labels and passes `num_items_in_batch`.
    """

    def forward(self: _Kind, *args: Any, **kwargs: Any) -> Any:
        return module_class.forward(self, *args, **kwargs)

    # Not functools.wraps: accelerate would unwrap its __wrapped__ and call that instead.
    forward.__signature__ = inspect.signature(model_class.forward)  # type: ignore[attr-defined]
    space = {"forward": forward, "__module__": __name__, "__doc__": module_class.__doc__}
    return type(model_class.__name__, (module_class,), space)
