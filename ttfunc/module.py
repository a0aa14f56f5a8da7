"""A module whose parameters are the trained rows, for tools that want an `nn.Module`."""

from __future__ import annotations

import copy
import inspect
import weakref
from collections.abc import Iterator, Mapping
from reprlib import repr as shown
from typing import Any, NoReturn, Self

import torch
from torch import Tensor, nn

from ttfunc.call import call_copy, functional_call
from ttfunc.deltas import RowSpec, TokenDeltas
from ttfunc.patching import check_current, patch

CHECKPOINTING = {
    f"{what}_checkpointing_{do}"
    for what in ("activation", "gradient")
    for do in ("enable", "disable")
}


class TokenModule(nn.Module):
    """A frozen model with trained rows, as a module whose only parameters are these rows.

    >>> model = torch.nn.Embedding(100, 8).requires_grad_(False)
    >>> params = ttfunc.init_deltas(model, [3, 7])
    >>> module = ttfunc.TokenModule(model, params)
    >>> [(name, tuple(p.shape)) for name, p in module.named_parameters()]
    [('deltas/weight', (2, 8))]
    >>> module(torch.tensor([3])).shape
    torch.Size([1, 8])

    `parameters()` are the leaves of `params`, a `(k, D)` one for each matrix. There is one set of
    rows: training the module trains `params`. `state_dict` also has the `(k,)` int64 token indices.
    So an optimizer, DDP and a checkpoint see kilobytes. The model is the attribute `base`, not a
    submodule. It is called by `functional_call`, and its weights never change. `to`, `train`,
    `eval` and the switches of gradient checkpointing act on it too. Float32 rows stay float32 over
    a half-precision base.

    Other attributes that are plain data (`config`, `device`) are read from the model; its methods,
    submodules and tensors are not, because they do not use the rows. The class takes the name and
    the signature of the model's class, because transformers' Trainer relies on them. A deep copy
    has rows and training modes of its own over the same base; it neither moves nor switches the
    base.

    Args:
        model: frozen, and the one that `params` were made from.
        params: with `(k, D)` deltas that are leaves. They become `nn.Parameter`s that require grad.

    Raises:
        ValueError: a model that is not frozen, deltas that have another shape or are not leaves,
            stale parameters.
        TypeError: `model` is not a module, or `params` is not a TokenDeltas.
        RuntimeError: parameters that belong to no model; at a call, a parameter of the model that
            now requires grad.
    """

    base: nn.Module
    _modes: dict[nn.Module, bool] | None  # of the base's modules, in a copy of this module

    def __init__(self, model: nn.Module, params: TokenDeltas) -> None:
        super().__init__()
        if not isinstance(model, nn.Module):
            raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}.")
        check_current(params)
        if free := _trainable(model):
            raise ValueError(
                f"{len(free)} parameters of {type(model).__name__} require grad ({free[0]!r}, …): "
                "backward would fill their gradients, and no optimizer that is given this module "
                "would see them. Freeze the model first: model.requires_grad_(False)."
            )
        # Not by nn.Module's own __setattr__, which would make the model a submodule.
        self.__dict__.update(base=model, _rows=dict(params.specs), training=model.training)
        self._modes = None
        parameters = {name: _parameter(delta, name) for name, delta in params.deltas.items()}
        for name, parameter in parameters.items():
            self.register_parameter(_key("deltas", name), parameter)
        self.__class__ = _like(type(model), type(self))

    def params(self) -> TokenDeltas:
        """The rows for `patch`, `merge` and `save`; the leaves are this module's own parameters."""
        deltas = {name: getattr(self, _key("deltas", name)) for name in self._rows}
        return TokenDeltas(deltas, dict(self._rows))

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What the model returns, with the rows in it."""
        return self._call(args, kwargs, "forward")

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """What the model generates, with the rows in it."""
        return self._call(args, kwargs, "generate")

    def train(self, mode: bool = True) -> Self:
        """Set the training mode of this module, and so of the model when it is next called."""
        if self._modes is None:
            self.base.train(mode)
        else:  # in a copy: the base belongs to the original
            self._modes = dict.fromkeys(self.base.modules(), mode)
        return super().train(mode)

    def _apply(self, fn: Any, recurse: bool = True) -> Self:
        if self._modes is None:
            self.base._apply(fn, recurse)

        def keep_wide(tensor: Tensor) -> Tensor:
            # Small updates vanish in half precision, whatever the base is in.
            moved: Tensor = fn(tensor)
            narrowed = moved.is_floating_point() and moved.itemsize < tensor.itemsize
            return tensor.to(moved.device) if narrowed else moved

        super()._apply(keep_wide, recurse)  # type: ignore[no-untyped-call]
        return self

    def _call(self, args: Any, kwargs: Any, method: str) -> Any:
        if torch.is_grad_enabled() and (free := _trainable(self.base)):
            raise RuntimeError(
                f"{len(free)} parameters of the {type(self.base).__name__} in a TokenModule "
                f"require grad since it was made ({free[0]!r}, …): backward would fill their "
                "gradients, and no optimizer that is given this module sees them. Freeze them, or "
                "train them and the rows with functional_call(model, patch(params), ...)."
            )
        # In training nothing but the loss reads the logits.
        weights = patch(self.params(), deferred_logits=self.training)
        modes = {m: mode for m, mode in (self._modes or {}).items() if m.training is not mode}
        if modes:
            return call_copy(self.base, weights, args, kwargs, method, modes)
        return functional_call(self.base, weights, args, kwargs, method=method)

    def __setattr__(self, name: str, value: Any) -> None:
        base = self.__dict__.get("base")
        known = base is not None and not name.startswith("_") and name in vars(base)
        # Plain data goes to the model (generate reads generation_config there), a forward does not.
        if known and name not in self.__dict__ and not callable(value):
            setattr(base, name, value)
        else:
            super().__setattr__(name, value)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            # A private attribute that a tool has set on the model does not hold for this module.
            if name.startswith("_") or "base" not in self.__dict__:
                raise
        value = getattr(self.base, name)
        if name in CHECKPOINTING or not (
            inspect.isroutine(value) or isinstance(value, (nn.Module, Tensor))
        ):
            return value
        raise AttributeError(
            f"{name!r} of the {type(self.base).__name__} in a TokenModule does not use the "
            f"trained rows. module.base.{name} is the plain model's. functional_call(module.base, "
            "patch(module.params()), ..., method=...) runs a method with the rows, and "
            "ttfunc.save(module.params(), path) saves them."
        )

    def _save_to_state_dict(
        self, destination: dict[str, Any], prefix: str, keep_vars: bool
    ) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        # Not as buffers: code that averages buffers would average the indices.
        for name, ids in self.params().token_indices.items():
            destination[prefix + _key("token_indices", name)] = ids

    def _load_from_state_dict(
        self,
        state_dict: Mapping[str, Any],
        prefix: str,
        local_metadata: Any,
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        # Also with strict=False: Trainer always loads so, and would go on with untrained rows.
        faults = [
            fault
            for name, spec in self._rows.items()
            for fault in _faults(name, spec, state_dict, prefix)
        ]
        if faults:
            error_msgs += faults
            return  # before anything is written
        ids = {prefix + _key("token_indices", name) for name in self._rows}
        rest = {key: value for key, value in state_dict.items() if key not in ids}
        # The rows stay the same leaves of the parameters, whatever the caller asks for.
        local_metadata = {**local_metadata, "assign_to_params_buffers": False}
        super()._load_from_state_dict(
            rest, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )

    def __deepcopy__(self, memo: dict[int, Any]) -> TokenModule:
        copied = type(self).__new__(type(self))
        modes = self._modes or {module: module.training for module in self.base.modules()}
        memo[id(self)] = copied
        shared = ("base", "_modes")
        state = {name: value for name, value in vars(self).items() if name not in shared}
        vars(copied).update(copy.deepcopy(state, memo), base=self.base, _modes=dict(modes))
        return copied

    def __getstate__(self) -> NoReturn:
        raise TypeError(
            "a TokenModule cannot be pickled, because its base would be pickled too. Save "
            "module.state_dict(), or call ttfunc.save(module.params(), path), and make a new "
            "TokenModule on the model."
        )

    def _replicate_for_data_parallel(self) -> NoReturn:
        raise RuntimeError(
            "nn.DataParallel does not copy the base of a TokenModule to its devices. Start a "
            "process for each device (torchrun), or use one device only (CUDA_VISIBLE_DEVICES=0)."
        )

    def __repr__(self) -> str:
        return f"TokenModule({type(self.base).__name__}, {self.params()})"


def _key(part: str, name: str) -> str:
    """The name of a parameter, which must have no dot. (The escapes are those of RFC 6901.)"""
    escaped = name.replace("~", "~0").replace("/", "~1")
    return f"{part}/{escaped.replace('.', '/')}"


def _trainable(model: nn.Module) -> list[str]:
    # named_parameters() takes several times as long, and this runs at every step.
    pairs = ((module, module._parameters) for module in model.modules())
    if not any(p is not None and p.requires_grad for _, held in pairs for p in held.values()):
        return []
    return [name for name, parameter in model.named_parameters() if parameter.requires_grad]


def _parameter(delta: Tensor, name: str) -> nn.Parameter:
    """The same tensor as a Parameter, so that an optimizer that already holds it trains it."""
    if not delta.is_leaf or delta.is_inference():
        raise ValueError(
            f"the delta of {name!r} is computed from others, or was made in inference mode, so it "
            "cannot be a parameter that is trained. Give leaves: "
            "optree.tree_map(lambda t: t.detach().clone(), params)."
        )
    if not isinstance(delta, nn.Parameter):
        delta.__class__ = nn.Parameter  # as torch does when it fills a lazy parameter
    return delta.requires_grad_()  # type: ignore[return-value]


_CLASSES: weakref.WeakKeyDictionary[type[nn.Module], weakref.ref[type[TokenModule]]]
_CLASSES = weakref.WeakKeyDictionary()


def _like(model_class: type[nn.Module], module_class: type[TokenModule]) -> type[TokenModule]:
    """A subclass that Trainer takes for the model's class; modules over one class share it."""
    known = _CLASSES.get(model_class, lambda: None)()
    if known is None or known.__base__ is not module_class:
        known = _subclass(model_class, module_class)
        _CLASSES[model_class] = weakref.ref(known)
    return known


def _subclass(model_class: type[nn.Module], module_class: type[TokenModule]) -> type[TokenModule]:
    """A subclass with the name and the signature that Trainer relies on.

    Trainer shifts the labels according to the name. According to the signature of `forward`, on the
    class and on the instance, it chooses columns, finds labels and passes `num_items_in_batch`.
    """

    def forward(self: TokenModule, *args: Any, **kwargs: Any) -> Any:
        return module_class.forward(self, *args, **kwargs)

    # Not functools.wraps: accelerate would unwrap its __wrapped__ and call that instead.
    forward.__signature__ = inspect.signature(model_class.forward)  # type: ignore[attr-defined]
    space = {"forward": forward, "__module__": __name__, "__doc__": module_class.__doc__}
    return type(model_class.__name__, (module_class,), space)


def _faults(name: str, spec: RowSpec, state_dict: Mapping[str, Any], prefix: str) -> Iterator[str]:
    """The reasons why the entries of a state dict cannot be the rows of these tokens."""
    rows, ids = (prefix + _key(part, name) for part in ("deltas", "token_indices"))
    if missing := [key for key in (rows, ids) if not isinstance(state_dict.get(key), Tensor)]:
        yield (
            f"it lacks {missing}, and begins with {list(state_dict)[:4]}. Load the state_dict() of "
            "a TokenModule over the same matrices."
        )
        return
    expected = (len(spec.indices), spec.shape[1])
    if tuple(state_dict[rows].shape) != expected:
        yield f"{rows!r} has shape {tuple(state_dict[rows].shape)}, and {expected} is needed."
    elif state_dict[ids].tolist() != list(spec.indices.ids):
        yield (
            f"{rows!r} are the rows of tokens {shown(state_dict[ids].tolist())}, but this module "
            f"trains {shown(list(spec.indices.ids))}. Make the module from init_deltas with the "
            "same ids, in the same order."
        )
