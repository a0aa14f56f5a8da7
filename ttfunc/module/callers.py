"""Tools that would go on without the rows of a TokenModule, known by the frame that asks it.

They ask for nothing that says so: TRL's trainers load a second model by the name in the config, and
PEFT looks for layers in a module that has none. Where they cannot be known, nothing is refused.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Iterator
from types import FrameType
from typing import Any

from torch import nn

from ttfunc.model.given import is_token_module
from ttfunc.model.names import innermost

_NEAR = 6  # frames: from a question of PEFT's to the method that it is in


def check_reference(base: nn.Module) -> None:
    """Raise ValueError where a trainer, in its `__init__`, has loaded the model a second time.

    To be called by what the trainer calls of the module, two frames below it.
    """
    frame = sys._getframe(2)
    trainer = frame.f_locals.get("self")
    made = "" if trainer is None else _second_model(trainer, frame, innermost(base))
    if not made:
        return
    takes = made in inspect.signature(type(trainer)).parameters
    way = f"{made}=copy.deepcopy(module).eval()"
    if not takes:
        beta = getattr(trainer, "beta", None)
        way = (
            "it beta=0.0, so that it loads none, and then write: trainer.beta, "
            f"trainer.{made} = {beta}, copy.deepcopy(module).eval()"
        )
    raise ValueError(
        f"{type(trainer).__name__} has loaded its {made} by the name of the model, "
        f"{_name(innermost(base))!r}, and so without the rows of this TokenModule: that is not the "
        f"model as it was at the start, and it lacks new tokens. Give {way}. That copy keeps the "
        "rows of the start, over the same base."
    )


def _second_model(trainer: Any, frame: FrameType, model: nn.Module) -> str:
    """Under which attribute a trainer has another model of the name that it was not given."""
    given: set[int] = set()
    own: FrameType | None = frame
    while own is not None and own.f_locals.get("self") is trainer:  # also of a subclass
        given.update(map(id, own.f_locals.values()))
        own = own.f_back
    name: str
    for name, one in getattr(trainer, "__dict__", {}).items():
        if not isinstance(one, nn.Module) or is_token_module(one) or id(one) in given:
            continue
        same = type(one).__name__ == type(model).__name__ and _name(one) == _name(model)
        if same and one is not model and _name(one):
            return name
    return ""


def _name(model: nn.Module) -> str:
    return getattr(getattr(model, "config", None), "_name_or_path", "") or ""


def check_teacher(base: nn.Module) -> None:
    """Raise ValueError where a method of a trainer is about to load the model a second time.

    TRL's trainers of self-distillation ask for the dtype before they do, and for nothing after.
    """
    for frame in _asking():
        names = frame.f_code.co_names
        if frame.f_code.co_name == "_setup_teacher_model" and "create_model_from_path" in names:
            raise ValueError(
                f"{type(frame.f_locals.get('self')).__name__} would load its teacher_model by the "
                f"name of the model, {_name(innermost(base))!r}, and so without the rows of this "
                "TokenModule. Give it teacher_model_kind='live', and then, for a teacher with the "
                "rows of the start: trainer.teacher_model = copy.deepcopy(module).eval()."
            )


def _asking() -> Iterator[FrameType]:
    """The frames that an attribute is asked from, the nearest first."""
    frame: FrameType | None = sys._getframe(2)
    for _ in range(_NEAR):
        if frame is None:
            return
        yield frame
        frame = frame.f_back


def check_adapter() -> None:
    """Raise TypeError where PEFT is about to put its layers into a TokenModule."""
    for frame in _asking():
        asking = type(frame.f_locals.get("self")).__module__.partition(".")[0]
        if asking == "peft" and frame.f_code.co_name == "__init__":
            raise TypeError(
                "PEFT puts its layers into a model, and a TokenModule has its model beside it. "
                "Make the adapter first, and leave out peft_config=: TokenModule("
                "peft.get_peft_model(module.base, peft_config), module.params(), train_base=True)."
            )
