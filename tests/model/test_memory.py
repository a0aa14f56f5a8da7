"""Which tensors are one."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from tests.helpers.models import D, V
from tests.helpers.unusual import UNUSUAL
from ttfunc.model.memory import memory_of, overlaps, same_memory


@pytest.mark.parametrize("kind", [*UNUSUAL, "lazy", "lazy buffer"])
def test_what_has_no_strided_memory_is_itself_alone(kind: str):
    makers = UNUSUAL | {"lazy": nn.UninitializedParameter, "lazy buffer": nn.UninitializedBuffer}
    one, other, matrix = makers[kind](), makers[kind](), torch.ones(V, D)
    assert same_memory(one, one)
    for a, b in ((one, other), (one, matrix), (matrix, one)):
        assert not same_memory(a, b)
        assert not overlaps(a, b)


def test_views_of_one_memory_are_one_or_overlap():
    matrix = torch.ones(V, D)
    assert same_memory(matrix, matrix.detach())
    assert same_memory(matrix, nn.Parameter(matrix))
    assert not same_memory(matrix, matrix.clone())
    for other in (matrix.T, matrix[1:], matrix.view(-1), matrix.view(torch.int32)):
        assert not same_memory(matrix, other)
        assert overlaps(matrix, other)
    flat = torch.ones(2 * V * D)
    halves = flat[: V * D].view(V, D), flat[V * D :].view(V, D)
    assert not overlaps(*halves)
    assert not same_memory(*halves)
    assert not overlaps(matrix[:0], matrix)


def test_what_a_transform_wraps_is_itself_alone():
    def f(x: torch.Tensor) -> torch.Tensor:
        assert memory_of(x) == (id(x),)
        assert not overlaps(x, torch.ones(V))
        return x.sum()

    torch.func.grad(f)(torch.ones(V))
