"""What a value refers to, and the same value with others in their place."""

from __future__ import annotations

import functools
import sys
import types
import weakref
from collections import OrderedDict, deque

import pytest
import torch
from torch import nn

from ttfunc.model.references import (
    global_references,
    references,
    substitute_attributes,
    substituted,
)

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
    "set": ({A}, lambda v: next(iter(v))),
    "frozenset": (frozenset([A]), lambda v: next(iter(v))),
    "deque": (deque([A]), lambda v: v[0]),
    "dict": ({"a": 1, "b": A}, lambda v: v["b"]),
    "ordered": (OrderedDict(b=A), lambda v: v["b"]),
    "nested": ([{"a": (A,)}], lambda v: v[0]["a"][0]),
    "weak": (weakref.ref(A), lambda v: v()),
    "proxy": (weakref.proxy(A), lambda v: v.forward.__self__),
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

    assert list(global_references(closure(function))) == [A]
    assert list(global_references(functools.partial(function))) == [A]
    assert list(global_references([3])) == []
    assert list(references(function)) == []


def test_a_proxy_among_the_globals_counts_as_what_it_is_for():
    namespace = {"parent": weakref.proxy(A)}
    exec("def function(x):\n    return parent(x)", namespace)  # noqa: S102
    assert list(global_references(namespace["function"])) == [A]


def test_a_proxy_of_a_function_is_told_of_and_left():
    function = closure(A)
    value = weakref.proxy(function)
    assert A in list(references(value))
    assert substituted(value, OTHERS) is value


def test_a_proxy_of_what_is_gone_refers_to_nothing():
    gone = weakref.proxy(nn.Linear(1, 1))
    value = [gone, A]
    assert [one for one in references(value) if one is not None] == [A]
    assert substituted(value, OTHERS)[1] is B
    holder = Holder(gone)
    substitute_attributes(holder, OTHERS)
    assert holder.held is gone
