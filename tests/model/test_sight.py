"""What a module was like: any change that may lead elsewhere is seen, and a number is not one."""

from __future__ import annotations

import types
from collections.abc import Callable
from typing import Any

import pytest
from torch import nn

from ttfunc.model.sight import Sight


def module() -> Any:
    made = nn.Linear(2, 2)
    made.steps, made.notes, made.pair = 0, ["a"], (1, 2)
    return made


def rename(one: Any) -> None:
    notes = one.notes
    del one.notes
    one.comments = notes


CHANGES: dict[str, Callable[[Any], object]] = {
    "a list grows": lambda one: one.notes.append("b"),
    "a list is another": lambda one: setattr(one, "notes", ["a"]),
    "a number becomes a module": lambda one: vars(one).update(steps=nn.Identity()),
    "an attribute more": lambda one: setattr(one, "more", []),
    "another name": rename,
}


def test_a_number_and_a_mode_are_no_change():
    one = module()
    sight = Sight.of(vars(one), ())
    one.steps += 1000
    one.eval()
    assert sight.holds(vars(one))
    assert sight.watched == {"pair"}  # what is in a tuple may change


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_what_may_lead_elsewhere_is_a_change_and_watched(change: Callable[[Any], object]):
    one = module()
    before = Sight.of(vars(one), ("pair",))
    change(one)
    assert not before.holds(vars(one))
    after = before.renewed(vars(one))
    assert after.holds(vars(one))
    assert after.watched > before.watched
    assert after.callables == before.callables


def test_a_function_is_told_from_the_rest():
    one = module()
    before = Sight.of(vars(one), ())
    one.forward = types.MethodType(lambda self, x: x, one)
    assert before.renewed(vars(one)).callables.keys() == {"forward"}
