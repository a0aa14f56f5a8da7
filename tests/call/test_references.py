"""What a value refers to, and the same value with others in their place."""

from __future__ import annotations

import functools
import sys
import types
import weakref
from collections import OrderedDict, defaultdict, deque, namedtuple

import pytest
import torch
from torch import nn

from ttfunc.call.references import global_references, references, restored, substituted

A, B = nn.Linear(1, 1), nn.Linear(2, 2)
OTHERS = {id(A): B}


class Holder:
    def __init__(self, held: object) -> None:
        self.held = held


def method(self, more: int = 1):
    return self, more


def closure(held, *more):
    def function(given=None, *, named=more):
        return held, given, named

    return function


def recursive(held):
    def function(depth: int):
        return held if depth == 0 else function(depth - 1)

    return function


# Each holds A in some way, beside a function that finds what is in its place.
HELD = {
    "itself": (A, lambda v: v),
    "list": ([1, A], lambda v: v[1]),
    "tuple": ((A, "x"), lambda v: v[0]),
    "dict": ({"a": 1, "b": A}, lambda v: v["b"]),
    "nested": ([{"a": (A,)}], lambda v: v[0]["a"][0]),
    "weak": (weakref.ref(A), lambda v: v()),
    "method": (types.MethodType(method, A), lambda v: v(2)[0]),
    "partial": (functools.partial(method, A, more=3), lambda v: v()[0]),
    "partial of a method": (functools.partial(types.MethodType(method, A)), lambda v: v()[0]),
    "named in a partial": (functools.partial(dict, x=A), lambda v: v()["x"]),
    "closure": (closure(A), lambda v: v()[0]),
    "default": (functools.partial(closure(None, A)), lambda v: v()[2][0]),
    "closure of a closure": (closure(closure(A)), lambda v: v()[0]()[0]),
    "recursion": (recursive(A), lambda v: v(3)),
}


@pytest.mark.parametrize("case", HELD)
def test_each_is_found_and_made_anew_with_another_in_its_place(case: str):
    value, inside = HELD[case]
    assert any(one is A for one in references(value))
    found = substituted(value, OTHERS)
    assert inside(found) is B
    assert inside(value) is A
    assert type(found) is type(value)


@pytest.mark.parametrize("case", HELD)
def test_what_refers_to_none_of_them_is_itself(case: str):
    value, _ = HELD[case]
    assert substituted(value, {id(B): A}) is value


@pytest.mark.parametrize("value", [None, 3, "x", b"", 1.5, nn.Linear, sys, len, torch.float32])
def test_plain_values_refer_to_no_module(value: object):
    assert not any(isinstance(one, (nn.Module, torch.Tensor)) for one in references(value))
    assert substituted(value, OTHERS) is value


def test_an_object_of_another_class_is_told_of_and_left():
    holder = Holder(A)
    assert list(references([holder])) == [holder]
    assert substituted([holder], OTHERS)[0] is holder


def test_a_closure_shares_its_other_cells_and_keeps_what_it_is():
    count = 0

    def function(given: int, /, more: int = 2, *, named: int = 3):
        """Its text."""
        nonlocal count
        count += 1
        return A_cell, given + more + named

    A_cell = A
    function.note = "noted"
    found = substituted(function, OTHERS)
    assert found(1) == (B, 6)
    assert count == 1
    assert (found.note, found.__name__, found.__module__) == ("noted", "function", __name__)
    assert function(1) == (A, 6)
    assert count == 2


def test_what_refers_to_itself_ends():
    value: list = [A]
    value.append(value)
    assert list(references(value)) == [A]
    found = substituted(value, OTHERS)
    assert found[0] is B


def test_an_empty_cell_is_nothing():
    def outer():
        def function():
            return later

        yield function
        later = 1
        yield function

    function = next(outer())
    assert list(references(function)) == []
    assert substituted(function, OTHERS) is function


def test_modules_among_the_globals_of_a_function_are_told_of():
    def function(x):
        return A(x)

    assert A in global_references(closure(function))
    assert A in global_references(functools.partial(function))
    assert list(global_references([3])) == []
    assert list(references(function)) == []


def test_an_attribute_that_a_function_reads_is_no_global():
    def function(holder):
        return holder.A

    assert A not in global_references(function)


Pair = namedtuple("Pair", "a b")


class Slotted:
    __slots__ = ("held",)

    def __init__(self, held: object) -> None:
        self.held = held


def in_a_module(held: object) -> nn.Module:
    made = nn.Identity()
    made.cache = {"held": held}
    return made


# What cannot be followed, but is restored when a call has left something in it.
OTHER = {
    "set": (lambda held: {held}, lambda v: next(iter(v))),
    "deque": (lambda held: deque([held], 3), lambda v: v[0]),
    "ordered": (lambda held: OrderedDict(b=held), lambda v: v["b"]),
    "default dict": (lambda held: defaultdict(list, b=[held]), lambda v: v["b"][0]),
    "named tuple": (lambda held: Pair(1, held), lambda v: v.b),
    "tuples in a list": (lambda held: [(held,)], lambda v: v[0][0]),
    "object": (lambda held: Holder(Holder(held)), lambda v: v.held.held),
    "slots": (lambda held: Slotted(held), lambda v: v.held),
    "module": (in_a_module, lambda v: v.cache["held"]),
    "method of an object": (lambda held: types.MethodType(method, held), lambda v: v(2)[0]),
}


@pytest.mark.parametrize("case", sorted(HELD.keys() | OTHER.keys()))
def test_what_a_call_has_left_is_restored_in_objects_of_any_class(case: str):
    made, inside = OTHER[case] if case in OTHER else (lambda _: HELD[case][0], HELD[case][1])
    value = made(A)
    found = restored(value, lambda one: B if one is A else one, {})
    assert inside(found) is B
    assert type(found) is type(value)
    fixed = (tuple, types.FunctionType, types.MethodType, functools.partial, weakref.ref)
    assert isinstance(value, fixed) or value is found or value is A
    if case in HELD:  # shared with the other tests
        restored(value, lambda one: A if one is B else one, {})


def test_what_is_restored_may_hold_itself():
    value: list = [A]
    value.append((value, {"a": value}))
    assert restored(value, lambda one: B if one is A else one, {}) is value
    assert value[0] is B
    assert value[1][0] is value
