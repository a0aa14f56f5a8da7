"""A module whose parameters are the trained rows, for tools that want an `nn.Module`."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any, NoReturn, Self

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from ttfunc.call.functional_call import call_copy
from ttfunc.call.known_paths import model_at_call
from ttfunc.call.patch import check_current, patch
from ttfunc.call.swaps import swaps_of
from ttfunc.model.given import refuse_token_module
from ttfunc.model.names import innermost
from ttfunc.module.attributes import Sizes, attribute_of
from ttfunc.module.classes import subclass_like, viewed
from ttfunc.module.state import (
    as_parameter,
    check_trainable,
    check_trained,
    faults,
    modes_after,
    trainable,
)
from ttfunc.module.trl import fused_call
from ttfunc.own_names import OwnNames
from ttfunc.rows.deltas import RowSpec, TokenDeltas
from ttfunc.rows.renaming import key

# What is set on a TokenModule stays there, but for what the model's own code reads on the model.
_READ_BY_BASE = frozenset({"config", "generation_config", "loss_function"})


class TokenModule(nn.Module, metaclass=OwnNames):
    """A frozen model with trained rows, as a module whose only parameters are these rows.

    >>> model = torch.nn.Embedding(100, 8).requires_grad_(False)
    >>> params = ttfunc.init_deltas(model, [3, 7])
    >>> module = ttfunc.TokenModule(model, params)
    >>> [(name, tuple(p.shape)) for name, p in module.named_parameters()]
    [('deltas/weight', (2, 8))]
    >>> module(torch.tensor([3])).shape
    torch.Size([1, 8])

    `parameters()` are the leaves of `params`, one `(k, D)` leaf for each matrix, so training the
    module trains `params`. `state_dict()` also has the `(k,)` int64 token ids. An optimizer, DDP
    and a checkpoint see kilobytes. Float32 rows stay float32 over a half-precision model.

    The model is the attribute `base`, not a submodule. The module calls it by `functional_call`,
    and never changes its weights. `to`, `train`, `eval` and the switches of gradient checkpointing
    act on the model too. A deep copy has its own parameters and training modes over the same
    `base`, which it neither moves nor switches.

    Other attributes are the model's, with the rows in them (of a PeftModel, those of the model in
    it). Its methods run with the rows, and `get_output_embeddings().weight` is the patched weight.
    With new tokens, `config.vocab_size`, `num_embeddings` and `out_features` are what a call uses.
    What you set on the module stays on it; only `config`, `generation_config` and `loss_function`
    go to the model, whose code reads them there. The class takes the name and the signature of the
    model's class, because transformers' Trainer looks at them.

    `save_pretrained` saves the merged model (of a PeftModel, with its adapter merged), and
    `merge_and_unload` returns it. A method that would write to the model's weights is refused.

    Args:
        model: the model that `params` were made from. It is frozen, unless `train_base`.
        params: with `(k, D)` deltas that are leaves. They become `nn.Parameter`s that require grad.
        train_base: also train what requires grad in the model, such as a LoRA. These parameters,
            and no others of the model, are parameters of the module and in its state dict.

    Raises:
        ValueError: a model that is not frozen; deltas that have another shape or are not leaves;
            stale parameters; with `train_base`, a token matrix that itself requires grad.
        TypeError: `model` is not a module, or is wrapped in DDP or by torch.compile; `params` is
            not a TokenDeltas.
        RuntimeError: parameters that belong to no model; at a call, other parameters of the model
            require grad than when the module was made.
    """

    base: nn.Module
    _rows: dict[str, RowSpec]
    _modes: dict[nn.Module, bool] | None  # the modes of the base's modules, in a copy of this one
    _trained: dict[str, nn.Parameter]  # the base's own parameters that train, by their names in it
    _sizes: Sizes
    # Trainer trains a quantised model if it has an adapter, and so asks. The rows are one.
    _hf_peft_config_loaded = True
    _is_token_module = True  # see `is_token_module`

    def __init__(self, model: nn.Module, params: TokenDeltas, *, train_base: bool = False) -> None:
        super().__init__()
        refuse_token_module(model, "TokenModule(module.base, params)")
        if not isinstance(model, nn.Module):
            raise TypeError(
                f"model must be a torch.nn.Module, got {type(model).__name__}. The order is "
                "TokenModule(model, params)."
            )
        if isinstance(model, DistributedDataParallel) or "_orig_mod" in model._modules:
            raise TypeError(
                f"model is a {type(model).__name__}, whose wrapper would not see the rows. Wrap "
                "the TokenModule of the model in it, and not the model in the TokenModule."
            )
        check_current(params)
        free = trainable(model)
        check_trainable(model, free, params, train_base)
        # Not by nn.Module's own __setattr__, which would make the model a submodule.
        self.__dict__.update(base=model, _rows=dict(params.specs), training=model.training)
        self.__dict__.update(_trained=free, _sizes=Sizes(params.specs), _modes=None)
        for name, delta in params.deltas.items():
            self.register_parameter(key("deltas", name), as_parameter(delta, name))
        for name, parameter in free.items():
            self.register_parameter(key("base", name), parameter)
        self.__class__ = subclass_like(type(innermost(model)), type(self))

    def params(self) -> TokenDeltas:
        """Return the rows for `patch`, `merge` and `save`; their leaves are this module's own."""
        deltas = {name: getattr(self, key("deltas", name)) for name in self._rows}
        return TokenDeltas(deltas, dict(self._rows))

    def _replaced(self) -> dict[str, Tensor]:
        """The module's parameters that are not the base's own: in a copy, or in torch's call."""
        beside = {name: getattr(self, key("base", name)) for name in self._trained}
        return {name: one for name, one in beside.items() if one is not self._trained[name]}

    def _weights(self) -> dict[str, Tensor]:
        """The weights that a call puts into the base."""
        # In training nothing but the loss reads the logits.
        return {**patch(self.params(), deferred_logits=self.training), **self._replaced()}

    def _in_call(self) -> dict[int, Tensor]:
        """The weights of a call, by the identity of the tensors of the base that they stand for."""
        swaps = swaps_of(self.base, self._weights(), model_at_call(self.base))
        return {key: one for swap in swaps for key, one in swap.replacements().items()}

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """`forward`, which a tool may have set."""
        with fused_call(self, kwargs):
            return super().__call__(*args, **kwargs)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Call the model, with the rows in it."""
        return self._call(args, kwargs, "forward")

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """Call the model's `generate`, with the rows in it."""
        return self._call(args, kwargs, "generate")

    def train(self, mode: bool = True) -> Self:
        """Set the training mode of this module, and of the model when it is next called."""
        if self._modes is None:
            self.base.train(mode)
        else:  # in a copy: the base belongs to the original
            self._modes = modes_after(self.base, mode)
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

    def _call(self, args: Any, kwargs: Any, method: Any, at: nn.Module | None = None) -> Any:
        """Call a method of the model, or of its module `at`, with the rows in it.

        `method` is a name, or a function of the module.
        """
        if torch.is_grad_enabled():
            check_trained(self.base, self._trained)
        modes = {m: mode for m, mode in (self._modes or {}).items() if m.training is not mode}
        return call_copy(self.base, self._weights(), args, kwargs, method, modes, at)

    def __setattr__(self, name: str, value: Any) -> None:
        base = self.__dict__.get("base")
        if name in _READ_BY_BASE and base is not None and hasattr(innermost(base), name):
            setattr(innermost(base), name, viewed(value))
        else:
            super().__setattr__(name, value)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if "base" not in self.__dict__:
                raise
        return attribute_of(self, name)

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        # Not as buffers: code that averages buffers would average the indices.
        for name, ids in self.params().token_indices.items():
            destination[prefix + key("token_indices", name)] = ids

    def _load_from_state_dict(
        self, state_dict: Mapping[str, Any], prefix: str, local_metadata: Any, *rest: Any
    ) -> None:
        *_, errors = rest  # after `strict`, and the missing and the unexpected keys
        # Also with strict=False: Trainer always loads so, and would go on with untrained rows.
        trained = [key("base", name) for name in self._trained]
        if found := [*faults(self._rows, trained, state_dict, prefix)]:
            errors += found
            return  # before anything is written
        ids = {prefix + key("token_indices", name) for name in self._rows}
        state_dict = {name: value for name, value in state_dict.items() if name not in ids}
        # The rows stay the same leaves of the parameters, whatever the caller asks for.
        local_metadata = {**local_metadata, "assign_to_params_buffers": False}
        super()._load_from_state_dict(state_dict, prefix, local_metadata, *rest)

    def __copy__(self) -> TokenModule:
        copied = type(self).__new__(type(self))
        vars(copied).update(vars(self))  # as of any module: what it holds is shared
        return copied

    def __deepcopy__(self, memo: dict[int, Any]) -> TokenModule:
        copied = memo[id(self)] = type(self).__new__(type(self))
        modes = self._modes or {module: module.training for module in self.base.modules()}
        # Not by the memo: what else holds the base and is copied with this module copies the base.
        shared = {name: vars(self)[name] for name in ("base", "_rows", "_trained", "_sizes")}
        own = {name: one for name, one in vars(self).items() if name not in (*shared, "_modes")}
        vars(copied).update(copy.deepcopy(own, memo), **shared, _modes=dict(modes))
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

    def __dir__(self) -> list[str]:
        return sorted({*super().__dir__(), *object.__dir__(self)})  # type: ignore

    def __repr__(self) -> str:
        return f"TokenModule({type(self.base).__name__}, {self.params()})"
