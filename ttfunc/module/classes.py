"""Classes that pass for the model's own: of a TokenModule, and of views of the model's objects."""

from __future__ import annotations

import inspect
import weakref
from collections.abc import Mapping
from typing import Any, TypeVar

from torch import nn

_Kind = TypeVar("_Kind", bound=nn.Module)

# Both ends are weak: the class of a model lives no longer than the model and its modules.
_CLASSES: weakref.WeakKeyDictionary[type[nn.Module], weakref.ref[type[nn.Module]]]
_CLASSES = weakref.WeakKeyDictionary()


def subclass_like(model_class: type[nn.Module], module_class: type[_Kind]) -> type[_Kind]:
    """A subclass of `module_class` that Trainer takes for the model's class.

    By the name, Trainer decides whether to shift the labels. By the signature of `forward`, on the
    class and on the instance, it chooses columns, finds labels and passes `num_items_in_batch`. All
    modules over models of one class share the subclass.
    """
    known = _CLASSES.get(model_class, lambda: None)()
    if known is not None and known.__base__ is module_class:
        return known  # type: ignore[return-value]

    def forward(self: _Kind, *args: Any, **kwargs: Any) -> Any:
        return module_class.forward(self, *args, **kwargs)

    # Not functools.wraps: accelerate would unwrap its __wrapped__ and call that instead.
    forward.__signature__ = inspect.signature(model_class.forward)  # type: ignore[attr-defined]
    space = {"forward": forward, "__module__": __name__, "__doc__": module_class.__doc__}
    made = type(model_class.__name__, (module_class,), space)
    _CLASSES[model_class] = weakref.ref(made)
    return made


def view_of(own: Any, answers: Mapping[str, Any]) -> Any:
    """An object that passes for `own` and shares its `__dict__`, with other answers in its class.

    What is set on the view is set on `own`, except where an answer is a property with a setter.
    """
    kind = type(own)
    view = object.__new__(kind)
    view.__dict__ = vars(own)
    space = {
        "__class__": property(lambda _: kind),  # so that a slice of a ModuleList is a ModuleList
        "__module__": kind.__module__,
        "_viewed": own,
        **answers,
    }
    # The class comes last, because an answer may stand for `__dict__` itself.
    object.__setattr__(view, "__class__", type(kind.__name__, (kind,), space))
    return view


def viewed(value: Any) -> Any:
    """What a view was made of; any other value as it is."""
    return getattr(type(value), "_viewed", value)
