"""A module whose parameters are the trained rows, for tools that want an `nn.Module`."""

from __future__ import annotations

import copy
import functools
import inspect
from collections.abc import Iterator, Mapping
from reprlib import repr as shown
from typing import Any, NoReturn, Self

import torch
from torch import Tensor, nn

from ttfunc.call import functional_call
from ttfunc.deltas import TokenDeltas, TokenRows
from ttfunc.patch import patch
from ttfunc.turns import turn

CHECKPOINTING = {
    f"{what}_checkpointing_{do}"
    for what in ("activation", "gradient")
    for do in ("enable", "disable")
}


class TokenModule(nn.Module):
    """A frozen model with trained rows, as a module that has these rows alone.

    `parameters()` are copies of the deltas, a `(k, D)` one for each matrix; the `(k,)` int64 token
    indices are buffers beside them. So an optimizer, DDP and `state_dict` see kilobytes. The model
    is in `base`, and no submodule. It is called by `functional_call`, and its weights never change;
    `to`, `train`, `eval` and the switches of gradient checkpointing act on it too; float32 rows
    stay so over a half-precision base.

    Other attributes that are plain data (`config`, `device`) are read from the model; its methods,
    submodules and tensors are not, because they know nothing of the rows. The class takes the name
    and the signature of the model's, which transformers' Trainer goes by. A deep copy has rows of
    its own over the same base, which it does not move.

    Args:
        model: frozen, and the one that `params` were made from.
        params: with `(k, D)` deltas. They are copied, and not changed by training.

    Raises:
        ValueError: a model that is not frozen, deltas of another shape, stale parameters.
        TypeError: no module, or no TokenDeltas.
        RuntimeError: parameters that belong to no model.
    """

    base: nn.Module
    _copied: bool

    def __init__(self, model: nn.Module, params: TokenDeltas) -> None:
        super().__init__()
        if not isinstance(model, nn.Module):
            raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}.")
        patch(params)  # raises what a call would
        if free := [name for name, p in model.named_parameters() if p.requires_grad]:
            raise ValueError(
                f"{len(free)} parameters of {type(model).__name__} require grad ({free[0]!r}, …): "
                "backward would fill their gradients, and no optimizer that is given this module "
                "would see them. Freeze the model first: model.requires_grad_(False)."
            )
        # Past nn.Module's own __setattr__, which would make it a submodule.
        self.__dict__.update(base=model, _rows=dict(params.rows), training=model.training)
        self._copied = False
        for name in params.rows:
            delta = params.deltas[name].detach().clone(memory_format=torch.contiguous_format)
            self.register_parameter(_key("deltas", name), nn.Parameter(delta))
            self.register_buffer(_key("token_indices", name), params.token_indices[name])
        # They are constant: DDP need not send them at each step.
        self._ddp_params_and_buffers_to_ignore = [name for name, _ in self.named_buffers()]
        self.__class__ = _like(type(model), type(self))  # type: ignore[arg-type]

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
        if not self._copied:
            self.base.train(mode)
        return super().train(mode)

    def _apply(self, fn: Any, recurse: bool = True) -> Self:
        if not self._copied:  # the base is the original's
            with turn():
                self.base._apply(fn, recurse)

        def keep_wide(tensor: Tensor) -> Tensor:
            # Small updates vanish in half precision, whatever the base is in.
            moved: Tensor = fn(tensor)
            narrowed = moved.is_floating_point() and moved.itemsize < tensor.itemsize
            return tensor.to(moved.device) if narrowed else moved

        super()._apply(keep_wide, recurse)  # type: ignore[no-untyped-call]
        return self

    def _call(self, args: Any, kwargs: Any, method: str) -> Any:
        with turn():
            if self.base.training is not self.training:  # a copy of this module may have set it
                self.base.train(self.training)
            weights = patch(self.params())
            return functional_call(self.base, weights, args, kwargs, method=method)

    def __setattr__(self, name: str, value: Any) -> None:
        base = self.__dict__.get("base")
        known = base is not None and not name.startswith("_") and name in vars(base)
        if known and name not in self.__dict__:  # as generation_config, which generate reads there
            setattr(base, name, value)
        else:
            super().__setattr__(name, value)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            # What a tool has noted about the model in private does not hold for this module.
            if name.startswith("_") or "base" not in self.__dict__:
                raise
        value = getattr(self.base, name)
        if name in CHECKPOINTING or not (
            inspect.isroutine(value) or isinstance(value, (nn.Module, Tensor))
        ):
            return value
        raise AttributeError(
            f"{name!r} of the {type(self.base).__name__} in a TokenModule knows nothing of the "
            f"trained rows. module.base.{name} is the plain model's. functional_call(module.base, "
            "patch(module.params()), ..., method=...) runs a method with the rows, and "
            "ttfunc.save(module.params(), path) keeps them."
        )

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
        # Even where it is not strict: Trainer never is, and would go on with untrained rows.
        faults = [
            fault
            for name, row in self._rows.items()
            for fault in _faults(name, row, state_dict, prefix)
        ]
        if faults:
            error_msgs += faults
            return  # before anything is written
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )

    def __deepcopy__(self, memo: dict[int, Any]) -> TokenModule:
        copied = type(self).__new__(type(self))
        memo |= {id(self): copied, id(self.base): self.base}
        copied.__dict__.update(copy.deepcopy(self.__dict__, memo), _copied=True)
        return copied

    def __getstate__(self) -> NoReturn:
        raise TypeError(
            "a TokenModule is not pickled, since its base would be too. Save module.state_dict(), "
            "or ttfunc.save(module.params(), path), and make it anew on the model."
        )

    def _replicate_for_data_parallel(self) -> NoReturn:
        raise RuntimeError(
            "nn.DataParallel does not copy the base of a TokenModule to its devices. Start a "
            "process for each device (torchrun), or show it one (CUDA_VISIBLE_DEVICES=0)."
        )

    def __repr__(self) -> str:
        return f"TokenModule({type(self.base).__name__}, {self.params()})"


def _key(part: str, name: str) -> str:
    """A parameter's name must have no dot."""
    return f"{part}/{name.replace('.', '/')}"


@functools.cache  # so that modules over one model have one class
def _like(model_class: type[nn.Module], module_class: type[TokenModule]) -> type[TokenModule]:
    """A subclass that Trainer takes for the model's class.

    By the name it shifts the labels; by the signature of `forward`, of the class and of the
    instance, it chooses columns, finds the labels and passes `num_items_in_batch`.
    """

    def forward(self: TokenModule, *args: Any, **kwargs: Any) -> Any:
        return module_class.forward(self, *args, **kwargs)

    # Not functools.wraps, whose __wrapped__ accelerate would unwrap and call instead.
    forward.__signature__ = inspect.signature(model_class.forward)  # type: ignore[attr-defined]
    space = {"forward": forward, "__module__": __name__, "__doc__": module_class.__doc__}
    return type(model_class.__name__, (module_class,), space)


def _faults(name: str, row: TokenRows, state_dict: Mapping[str, Any], prefix: str) -> Iterator[str]:
    """What keeps the entries of a state dict from being the rows of these tokens."""
    rows, ids = (prefix + _key(part, name) for part in ("deltas", "token_indices"))
    if missing := [key for key in (rows, ids) if not isinstance(state_dict.get(key), Tensor)]:
        yield (
            f"it lacks {missing}, and has {list(state_dict)[:4]}. Load what state_dict() of a "
            "TokenModule over the same matrices gave."
        )
        return
    expected = (len(row.indices), row.shape[1])
    if tuple(state_dict[rows].shape) != expected:
        yield f"{rows!r} has shape {tuple(state_dict[rows].shape)}, and {expected} is needed."
    elif state_dict[ids].tolist() != list(row.indices.ids):
        yield (
            f"{rows!r} are the rows of tokens {shown(state_dict[ids].tolist())}, and this module "
            f"trains {shown(list(row.indices.ids))}: make it from init_deltas with the same "
            "ids, in the same order."
        )
