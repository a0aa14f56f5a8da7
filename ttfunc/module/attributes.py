"""What a TokenModule shows of its model: data as they are, modules and methods with the rows.

`module` is always the TokenModule. Its class calls these functions, so they do not import it.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping
from operator import is_
from types import MethodType
from typing import Any, NoReturn

from torch import Tensor, nn

from ttfunc.model.names import innermost
from ttfunc.model.sizes import Resized
from ttfunc.module.classes import view_of, viewed
from ttfunc.module.saving import saving_method
from ttfunc.module.trl import (
    backbone_for_loss,
    check_asking,
    check_multiplies,
    check_reference,
    weight_for_loss,
)
from ttfunc.rows.deltas import RowSpec
from ttfunc.rows.summary import summary

# Methods that read no token matrix. Some of them switch the model itself.
_ON_BASE = frozenset(
    {
        *("activation_checkpointing_enable", "activation_checkpointing_disable"),
        *("gradient_checkpointing_enable", "gradient_checkpointing_disable"),
        *("enable_input_require_grads", "disable_input_require_grads"),
        *("can_generate", "get_memory_footprint", "_supports_logits_to_keep"),
        *("prepare_decoder_input_ids_from_labels", "tokenize", "preprocess"),
    }
)
# Beginnings of methods that write or replace the model's weights, or save them without the rows.
_WRITERS = (
    *("save", "push", "resize", "set_", "tie_", "load", "init", "_init", "post_init", "prune"),
    *("add_adapter", "delete_adapter", "enable_adapter", "disable_adapter", "merge", "unmerge"),
    *("unload", "quantize", "dequantize", "create_or_update_model_card"),
)


def attribute_of(module: Any, name: str) -> Any:
    """An attribute of the model, as its TokenModule shows it. Raises AttributeError for none."""
    base = module.base
    inner = innermost(base)
    check_asking(base, name)
    # A private attribute that a tool has set on the model does not hold for the module.
    if name.startswith("__") or (name.startswith("_") and not hasattr(type(inner), name)):
        raise AttributeError(f"a TokenModule of {type(base).__name__} has no attribute {name!r}.")
    holder = inner if hasattr(inner, name) else base
    value = getattr(holder, name)
    if name == "base_model" and (longer := backbone_for_loss(module, value)):
        return longer
    is_computed = isinstance(value, Tensor) and isinstance(
        inspect.getattr_static(type(holder), name, None), property
    )
    if is_computed:
        return module._call((), {}, lambda copy: getattr(copy, name), holder)
    if isinstance(value, MethodType) and isinstance(value.__self__, nn.Module):
        return _method(module, name, value)
    if name.startswith("_") and not isinstance(value, (nn.Module, Tensor)):
        raise AttributeError(f"{name!r} of {type(base).__name__} is private to it.")
    if name in module._sizes.names_in(holder):
        return module._sizes.shown(value)
    return with_rows(module, value)


# Methods


def _method(module: Any, name: str, method: MethodType) -> Any:
    """A method of the model that runs with the rows."""
    if name in _ON_BASE:
        return method
    own = _METHODS.get(name) or saving_method(module, name, method)
    if own is None and name.startswith(_WRITERS):
        raise AttributeError(
            f"{name!r} of the {type(module.base).__name__} in a TokenModule does not use the "
            f"trained rows. module.base.{name} is the plain model's. functional_call(module.base, "
            "patch(module.params()), ..., method=...) runs a method with the rows, and "
            "ttfunc.save(module.params(), path) saves them."
        )

    @functools.wraps(method)
    def called(*args: Any, **kwargs: Any) -> Any:
        if own is not None:
            return own(module, method, *args, **kwargs)
        return module._call(args, kwargs, method.__name__, method.__self__)

    return called


def _part(module: Any, get: Any, *args: Any, **kwargs: Any) -> Any:
    return with_rows(module, get(*args, **kwargs))


def _head(module: Any, get: Any) -> Any:
    check_multiplies(get())
    return _part(module, get)


def _num_parameters(module: Any, count: Any, *args: Any, **kwargs: Any) -> int:
    """The model's own `num_parameters`, and the rows, which are embeddings."""
    given = inspect.signature(count).bind(*args, **kwargs).arguments
    rows = [] if given.get("exclude_embeddings") else [*module.params().deltas.values()]
    trained = (row.numel() for row in rows if row.requires_grad or not given.get("only_trainable"))
    return int(count(*args, **kwargs)) + int(sum(trained))


def _nb_trainable_parameters(module: Any, _: object) -> tuple[int, int]:
    found = summary(module.base, module.params())
    return found.trainable_parameters, found.total_parameters


def _print_trainable_parameters(module: Any, _: object) -> None:
    print(summary(module.base, module.params()))


def _add_model_tags(module: Any, tag: Any, *args: Any, **kwargs: Any) -> Any:
    """TRL's trainers call it when they have made their reference."""
    check_reference(module.base)
    return tag(*args, **kwargs)


# Methods that are not a call of the model with the rows in it.
_METHODS: dict[str, Callable[..., Any]] = {
    **dict.fromkeys(("get_input_embeddings", "get_encoder"), _part),
    **dict.fromkeys(("get_decoder", "get_base_model"), _part),
    "get_output_embeddings": _head,
    "add_model_tags": _add_model_tags,
    "num_parameters": _num_parameters,  # transformers'
    "get_nb_trainable_parameters": _nb_trainable_parameters,  # PEFT's, as the next one
    "print_trainable_parameters": _print_trainable_parameters,
}


# Modules and tensors


def with_rows(
    module: Any, value: Any, weights: Callable[[], dict[int, Tensor]] | None = None
) -> Any:
    """A module or a tensor of the model, or a list or dict of them, with the rows in it.

    A token matrix is the patched weight. A module that has one is a view, which is called with the
    rows in it; what is set on it, and a hook, goes to the model's own module. Anything else is the
    model's own. `weights` gives the weights of a call, by the identity of the model's own.
    """
    if type(value) in (list, tuple, dict):
        weights = weights or functools.cache(module._in_call)
        held = [*value.values()] if type(value) is dict else value
        shown = [with_rows(module, one, weights) for one in held]
        if all(map(is_, shown, held)):
            return value
        return type(value)(zip(value, shown, strict=True) if type(value) is dict else shown)
    if not isinstance(value, (Tensor, nn.Module)):
        return value
    found = module._in_call() if weights is None else weights()
    if isinstance(value, Tensor):
        return weight_for_loss(module, found.get(id(value), value))
    if found.keys().isdisjoint(map(id, value.parameters())):
        return value
    return view_of(value, _answers(module, value))


def _answers(module: Any, own: nn.Module) -> dict[str, Any]:
    """What a view of the model's own module answers in its place."""
    refused = {n for n in dir(type(own)) if n.startswith(_WRITERS) or n == "state_dict"}

    def attribute(self: nn.Module, name: str) -> Any:
        if name in refused:
            raise AttributeError(
                f"{name!r} of a part of a TokenModule would read or write the weights of the model "
                f"without the rows. Take {name!r} of the TokenModule, or of a part of module.base."
            )
        return with_rows(module, getattr(own, name))

    def call(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return module._call(args, kwargs, "forward", own)

    def entries(of: str) -> property:
        return property(lambda self: with_rows(module, dict(vars(own)[of])))

    answers: dict[str, Any] = {
        # Without a getter it has no value, so that Python asks `__getattr__`, which says why.
        **dict.fromkeys(refused, property()),
        "__getattr__": attribute,
        "__call__": call,
        "__deepcopy__": _refuse_copy,
        "_modules": entries("_modules"),
        "_parameters": entries("_parameters"),
        **module._sizes.answers(own),
    }
    if module._modes is not None:
        answers["training"] = property(lambda self: (module._modes or {})[own])
        answers |= {"train": _refuse_modes, "eval": _refuse_modes}
    return answers


def _refuse_copy(self: nn.Module, memo: object) -> NoReturn:
    raise TypeError(
        "a part of a TokenModule has no weights of its own to copy. Copy the TokenModule, and take "
        "the part of the copy."
    )


def _refuse_modes(self: nn.Module, mode: bool = True) -> NoReturn:
    raise RuntimeError(
        "a part of a copy of a TokenModule has no training mode of its own. Switch the whole copy."
    )


# Sizes


class Sizes:
    """The sizes of the vocabulary that a TokenModule with new tokens shows: the sizes in a call.

    A config is shown as a view of the model's: what is set on it is set on the model's config,
    except for the size, which stays the size of the model.
    """

    def __init__(self, specs: Mapping[str, RowSpec]) -> None:
        self._new = {spec.shape[0]: spec.height for spec in specs.values() if spec.grown}
        self._old = {new: old for old, new in self._new.items()}
        # Each config and its view by the identity of the config, which is kept for its identity.
        self._configs: dict[int, tuple[Any, Any]] = {}

    def names_in(self, holder: Any) -> list[str]:
        """The attributes of a module or a config that are a size, or a config with a size in it."""
        if not self._new:
            return []
        own = vars(holder)
        state: dict[str, Any] = dict(own) if isinstance(holder, nn.Module) else {"config": holder}
        Resized(self._new).put_into(state)
        if not isinstance(holder, nn.Module):
            state = vars(state["config"])
        # A dict is shown as it is: a copy of it would lose what is put into it.
        return [n for n, one in state.items() if one is not own[n] and not isinstance(one, dict)]

    def shown(self, value: Any) -> Any:
        """The value of such an attribute, as it is in a call."""
        if type(value) is int:
            return self._new.get(value, value)
        if id(value) not in self._configs:
            sizes = self.answers(value)

            def attributes(_: object) -> dict[str, Any]:
                return {**vars(value), **{name: self.shown(vars(value)[name]) for name in sizes}}

            # These two are read by code that writes the config to a file, and that copies it.
            sizes_in_copies = {
                "__dict__": property(attributes),
                "__reduce_ex__": lambda self, _: (object.__new__, (type(value),), self.__dict__),
            }
            self._configs[id(value)] = value, view_of(value, sizes | sizes_in_copies)
        return self._configs[id(value)][1]

    def answers(self, holder: Any) -> dict[str, Any]:
        """What a view of a module or a config answers: its sizes as they are in a call."""

        def answer(name: str) -> property:
            def read(_: object) -> Any:
                return self.shown(vars(holder)[name])

            def write(_: object, value: Any) -> None:
                is_size = type(value) is int
                vars(holder)[name] = self._old.get(value, value) if is_size else viewed(value)

            return property(read, write)

        return {name: answer(name) for name in self.names_in(holder)}
