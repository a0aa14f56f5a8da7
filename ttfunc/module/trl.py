"""What TRL's trainers do with a model, where a TokenModule must answer or refuse them.

**The fused head.** TRL's losses multiply the hidden states H, `(T, D)`, by the head's weight W,
`(V, D)`, a chunk at a time, and would give W a gradient as large as the matrix. They find both on
the model, in a call with `fused_lm_head=True`. In such a call both have k columns more:
`H' = (H, 0)` and `W' = (W, E)`, where the `(V, k)` matrix E has a 1 for each trained token. The
product `H' W'ᵀ` is still `H Wᵀ`. The last k columns of the gradient of H' are the gradient of the
trained tokens' logits, G_S, so the gradient of the rows is `G_Sᵀ H`, and W' needs none.

**Models loaded by name.** Trainers load a reference or a teacher a second time, by the name in the
config, and so without the rows; and PEFT looks for layers in a module that has none. They ask the
module for nothing that says so, and are known by the frames that ask. Where they cannot be known,
nothing is refused.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from contextvars import ContextVar
from itertools import islice, takewhile
from types import FrameType
from typing import Any, TypeGuard

import torch
from torch import Tensor, nn

from ttfunc.model.given import is_token_module
from ttfunc.model.names import innermost
from ttfunc.weight.deferred import PatchedWeight
from ttfunc.weight.lazy import Lazy, lazy
from ttfunc.weight.source import Source

_FUSED: ContextVar[Any] = ContextVar("fused", default=None)  # the module in a fused call
_LOADS = "create_model_from_path"
_NEAR = 6  # frames from a question of PEFT's to the method that it is in


# The fused head


def fused_call(module: object, kwargs: Mapping[str, Any]) -> AbstractContextManager[None]:
    """A context in which the module's head and backbone are longer, if the call asks for a loss."""
    return _fused(module) if kwargs.get("fused_lm_head") else contextlib.nullcontext()


@contextlib.contextmanager
def _fused(module: object) -> Iterator[None]:
    token = _FUSED.set(module)
    try:
        yield
    finally:
        _FUSED.reset(token)


def weight_for_loss(module: object, weight: Tensor) -> Tensor:
    """The head's weight, longer in a fused call of this module."""
    return longer_weight(weight) if _FUSED.get() is module and can_fuse(weight) else weight


def backbone_for_loss(module: Any, backbone: Any) -> Callable[..., Any] | None:
    """`base_model` in a fused call of this module, with longer states; None in any other call."""
    if _FUSED.get() is not module:
        return None
    own: Any = innermost(module.base)
    head = module._in_call().get(id(getattr(own.get_output_embeddings(), "weight", None)))
    if not can_fuse(head):
        return None

    def with_longer_states(*args: Any, **kwargs: Any) -> Any:
        out = module._call(args, kwargs, "forward", at=backbone)
        out.last_hidden_state = longer_states(out.last_hidden_state, head)
        return out

    return with_longer_states


def can_fuse(weight: object) -> TypeGuard[PatchedWeight]:
    """Whether it is a weight whose rows can get their gradient so."""
    if not (isinstance(weight, PatchedWeight) and weight.deferred):
        return False
    # What an engine owns is read where it is gathered, by slices of the weight itself.
    rows, own = weight.source.rows, weight.source.gathered is None
    return own and rows.fixed() and rows.values.requires_grad and torch.is_grad_enabled()


def longer_states(hidden: Tensor, weight: PatchedWeight) -> Tensor:
    """The `(..., D + k)` states H'. The k columns are 0, and their gradient goes to the rows."""
    rows = weight.source.rows.values
    wide = torch.promote_types(hidden.dtype, torch.float32)
    with torch.autocast(hidden.device.type, enabled=False):
        # H (R - R)ᵀ, in which one R is a constant: its value is 0, and its gradient G_Sᵀ H.
        zero = (rows - rows.detach()).to(hidden.device, wide)
        columns = hidden.detach().to(wide) @ zero.T
    return torch.cat([hidden, columns.to(hidden.dtype)], dim=-1)


def longer_weight(weight: PatchedWeight) -> Lazy:
    """The constant `(V, D + k)` weight W', of which a slice is made when it is read."""
    source = weight.source
    shape = (len(weight), source.base.shape[1] + len(source.rows.values))
    # The loss reads it again in its backward, when the rows may have been written to.
    rows = source.rows.map(lambda values: values.detach().clone())
    source = source._replace(rows=rows)
    piece = functools.partial(_longer_piece, source)
    return lazy(source.base, shape, lambda: piece(0, shape[0]), piece)


def _longer_piece(source: Source, start: int, stop: int) -> Tensor:
    """The rows of W' from `start` to `stop`."""
    source.reads.product = True  # also late: the rows are a copy of their own
    base, values = source.base, source.rows.values
    indices: Any = source.rows.ids
    width, known = base.shape[1], min(stop, len(base))
    here = [row for row, token in enumerate(indices.ids) if start <= token < stop]
    at = torch.tensor([indices.ids[row] - start for row in here], device=base.device)
    with torch.no_grad():
        # In one piece: it may be half of the matrix, and is made at each read.
        made = base.new_empty(stop - start, width + len(values))
        made[: max(0, known - start), :width] = base[start:known]
        made[:, width:] = 0
        if here:
            made[at, :width] = values[here].to(base.device, base.dtype)
            made[at, torch.tensor(here, device=base.device) + width] = 1
    return made


def check_multiplies(head: Any) -> None:
    """Raise ValueError for a head that does more than multiply by its weight."""
    if "base_layer" in getattr(head, "_modules", {}):
        raise ValueError(
            f"the head of the model is a {type(head).__module__}.{type(head).__name__}: code that "
            "takes its weight (as TRL's trainers do) would leave the adapter on it untrained. "
            "Leave the head out of the adapter's target_modules."
        )


# Models loaded by name


def check_reference(base: nn.Module) -> None:
    """Raise ValueError if a trainer, in its `__init__`, has loaded the model a second time.

    To be called by what the trainer's `__init__` calls of the module.
    """
    trainer, model = next(_callers()).f_locals.get("self"), innermost(base)
    name = _second_model(trainer, model)
    if name is None:
        return
    way = f"{name}=copy.deepcopy(module).eval()"
    if name not in inspect.signature(type(trainer)).parameters:
        way = (
            "it beta=0.0, so that it loads none, and then write: trainer.beta, "
            f"trainer.{name} = {getattr(trainer, 'beta', None)}, copy.deepcopy(module).eval()"
        )
    raise ValueError(
        f"{type(trainer).__name__} has loaded its {name} by the name of the model, "
        f"{_name(model)!r}, and so without the rows of this TokenModule: that is not the "
        f"model as it was at the start, and it lacks new tokens. Give {way}. That copy keeps the "
        "rows of the start, over the same base."
    )


def _second_model(trainer: Any, model: nn.Module) -> str | None:
    """The attribute in which a trainer has another model of that name, which it was not given."""
    inits = takewhile(lambda frame: frame.f_locals.get("self") is trainer, _callers())
    given = {id(value) for frame in inits for value in frame.f_locals.values()}
    name: str
    for name, one in getattr(trainer, "__dict__", {}).items():
        if not isinstance(one, nn.Module) or is_token_module(one) or id(one) in given:
            continue
        same = type(one).__name__ == type(model).__name__ and _name(one) == _name(model)
        if same and one is not model and _name(one):
            return name
    return None


def check_asking(base: nn.Module, name: str) -> None:
    """Raise if the code that asks for this attribute is about to go on without the rows.

    PEFT asks for `peft_config` before it puts its layers into a model (TypeError). TRL's trainers
    of self-distillation ask for `dtype` before they load a teacher (ValueError), and for nothing
    after.
    """
    method = {"peft_config": "__init__", "dtype": "_setup_teacher_model"}.get(name)
    if method is None:
        return
    for frame in islice(_callers(), _NEAR):
        # The name comes first: `f_locals` copies all variables of a frame.
        if frame.f_code.co_name != method:
            continue
        asking = type(frame.f_locals.get("self"))
        if name == "peft_config" and asking.__module__.startswith("peft."):
            raise TypeError(
                "PEFT puts its layers into a model, and a TokenModule has its model beside it. "
                "Make the adapter first, and leave out peft_config=: TokenModule("
                "peft.get_peft_model(module.base, peft_config), module.params(), train_base=True)."
            )
        if name == "dtype" and _LOADS in frame.f_code.co_names:
            raise ValueError(
                f"{asking.__name__} would load its teacher_model by the name of the model, "
                f"{_name(innermost(base))!r}, and so without the rows of this TokenModule. Give it "
                "teacher_model_kind='live', and then, for a teacher with the rows of the start: "
                "trainer.teacher_model = copy.deepcopy(module).eval()."
            )


def _callers() -> Iterator[FrameType]:
    """The frames of the code outside this package that is calling, the nearest first."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        if not frame.f_globals.get("__name__", "").startswith("ttfunc."):
            yield frame
        frame = frame.f_back


def _name(model: nn.Module) -> str:
    return getattr(getattr(model, "config", None), "_name_or_path", "") or ""
