"""Rows with their ids as a tensor: against the copy, with repeated, unused and foreign ids."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from ttfunc.weight.any_rows import AnyRows, places
from ttfunc.weight.source import Reads

V, D = 12, 5
# -1 is not used; V and V + 1 are no tokens; what is there twice counts once.
IDS = st.lists(st.integers(-1, V + 1), min_size=1, max_size=V)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def in_place(base: Tensor, rows: Tensor, ids: list[int]) -> Tensor:
    """The matrix, row by row."""
    matrix = list(base)
    for row, token in reversed(list(enumerate(ids))):
        if 0 <= token < len(base):
            matrix[token] = rows[row]
    return torch.stack(matrix)


@given(IDS)
def test_places_are_distinct_and_those_of_the_ids(ids: list[int]):
    used, place = places(torch.tensor(ids), V)
    assert len(set(place.tolist())) == len(ids)
    assert 0 <= place.min() <= place.max() < V
    for row, token in enumerate(ids):
        counts = 0 <= token < V and token not in ids[:row]
        assert used[row] == counts
        assert place[row] == token if counts else place[row] not in ids


@settings(deadline=None)
@given(IDS, st.booleans(), st.integers(0, 3))
def test_reads_and_their_gradients_are_those_of_the_copy(ids: list[int], bias: bool, seed: int):
    base, rows = normal(V, D, seed=seed), normal(len(ids), D, seed=seed + 1).requires_grad_()
    hidden = normal(2, 3, D, seed=seed + 2).requires_grad_()
    offset = normal(V, seed=seed + 3).requires_grad_() if bias else None
    tokens = torch.arange(V).view(3, 4)
    patch, matrix = AnyRows(rows, torch.tensor(ids)), in_place(base, rows, ids)
    inputs = [one for one in (rows, hidden, offset) if one is not None]
    for found, expected in (
        (patch.lookup(tokens, base), F.embedding(tokens, matrix)),
        (patch.product(hidden, base, offset), F.linear(hidden, matrix, offset)),
        (patch.materialise(base), matrix),
        (patch.piece(base, 2, 7), matrix[2:7]),
    ):
        torch.testing.assert_close(found, expected)
        weight = normal(*found.shape, seed=9)
        gradients = [
            torch.autograd.grad((out * weight).sum(), inputs, allow_unused=True, retain_graph=True)
            if out.requires_grad
            else [None] * len(inputs)
            for out in (found, expected)
        ]
        for one, other in zip(*gradients, strict=True):
            like = torch.zeros(()) if one is other is None else (other if one is None else one)
            nothing = torch.zeros_like(like)
            torch.testing.assert_close(
                nothing if one is None else one, nothing if other is None else other
            )


@settings(deadline=None)
@given(st.lists(st.lists(st.integers(-1, V - 1), min_size=3, max_size=3), min_size=1, max_size=4))
def test_each_example_reads_its_own(each: list[list[int]]):
    base, rows = normal(V, D), normal(len(each), 3, D, seed=1)
    hidden, bias = normal(len(each), 2, D, seed=2), normal(V, seed=3)
    tokens = torch.arange(V).expand(len(each), V)
    patch = AnyRows(rows, torch.tensor(each))
    matrices = [in_place(base, own, ids) for own, ids in zip(rows, each, strict=True)]
    looked_up = torch.stack([F.embedding(tokens[0], matrix) for matrix in matrices])
    logits = torch.stack([F.linear(h, m, bias) for h, m in zip(hidden, matrices, strict=True)])
    torch.testing.assert_close(patch.lookup(tokens, base), looked_up)
    torch.testing.assert_close(patch.product(hidden, base, bias), logits)


def test_columns_of_unused_rows_have_the_bits_that_they_had():
    base, hidden = torch.randn(V, D), torch.randn(4, D)
    patch = AnyRows(torch.full((3, D), torch.nan), torch.full((3,), -1))
    assert torch.equal(patch.product(hidden, base), F.linear(hidden, base))
    assert torch.equal(patch.lookup(torch.arange(V), base), base)


def test_the_row_of_padding_gets_no_gradient_from_a_lookup():
    base, rows = normal(V, D), normal(2, D, seed=1).requires_grad_()
    patch = AnyRows(rows, torch.tensor([4, 5]))
    patch.lookup(torch.tensor([4, 5]), base, padding_idx=4).sum().backward()
    assert rows.grad[0].eq(0).all()
    assert rows.grad[1].eq(1).all()


def test_forward_mode():
    base, hidden = normal(V, D), normal(4, D, seed=2)
    rows, tangent, ids = normal(3, D, seed=1), normal(3, D, seed=3), [7, -1, 2]
    found, expected = (
        torch.func.jvp(lambda r, f=f: f(r), (rows,), (tangent,))
        for f in (
            lambda r: AnyRows(r, torch.tensor(ids)).product(hidden, base),
            lambda r: F.linear(hidden, in_place(base, r, ids)),
        )
    )
    torch.testing.assert_close(found, expected)


def test_half_precision_bases_and_autocast():
    base, rows = torch.randn(V, D).bfloat16(), torch.randn(2, D)
    patch = AnyRows(rows, torch.tensor([4, -1]))
    assert patch.product(torch.randn(3, D).bfloat16(), base).dtype == torch.bfloat16
    with torch.autocast("cpu", torch.bfloat16):
        assert patch.product(torch.randn(3, D), base.float()).dtype == torch.bfloat16


def test_what_bypasses_the_weight_is_given_its_gradient():
    base, ids = normal(V, D), torch.tensor([4, -1])
    rows = normal(2, D, seed=1).requires_grad_()
    placeholder = AnyRows(rows, ids).placeholder(base, Reads())
    assert placeholder.isnan().all()
    weight = normal(V, D, seed=2)
    placeholder.backward(weight)
    torch.testing.assert_close(rows.grad, torch.stack([weight[4], torch.zeros_like(weight[4])]))


def test_several_adapters_are_no_single_matrix():
    patch = AnyRows(torch.randn(2, 1, D), torch.tensor([[4], [5]]))
    with pytest.raises(RuntimeError, match="cannot be mixed"):
        patch.materialise(torch.randn(V, D))
    with pytest.raises(ValueError, match=r"for 2 examples was given a batch of shape \(3, 4\)"):
        patch.lookup(torch.zeros(3, 4, dtype=torch.int64), torch.randn(V, D))


@pytest.mark.parametrize("unused", [torch.nan, torch.inf, 1e38])
def test_what_an_unused_row_holds_reaches_no_gradient(unused: float):
    base, hidden = normal(V, D), normal(4, D, seed=2).requires_grad_()
    rows = normal(4, D, seed=1).requires_grad_()
    with torch.no_grad():
        rows[1], rows[3] = unused, unused
    ids = torch.tensor([7, -1, 2, 7])  # the last is there twice, and past
    logits = AnyRows(rows, ids).product(hidden, base)
    of_hidden, of_rows = torch.autograd.grad(logits.square().sum(), (hidden, rows))
    clean = torch.where(torch.isfinite(rows) & (rows < 1e30), rows, 0).detach().requires_grad_()
    expected = F.linear(hidden, in_place(base, clean[[0, 2]], [7, 2]))
    truth = torch.autograd.grad(expected.square().sum(), (hidden, clean))
    torch.testing.assert_close(of_hidden, truth[0])
    torch.testing.assert_close(of_rows, truth[1])


def test_a_slice_of_the_matrix_makes_no_copy_of_all_of_it():
    base, rows = normal(V, D), normal(2, D, seed=1)
    patch = AnyRows(rows, torch.tensor([4, 2]))
    assert torch.equal(patch.piece(base, 1, 5), patch.materialise(base)[1:5])
    with pytest.raises(RuntimeError, match="cannot be mixed"):
        AnyRows(rows[None], torch.tensor([[4, 2]])).piece(base, 1, 5)
