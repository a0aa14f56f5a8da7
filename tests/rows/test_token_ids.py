"""Token ids: every form of them, and every way in which they can be wrong."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import given
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from tests.helpers.models import loss_of, make, tokens
from ttfunc import combine, functional_call, init_deltas, patch, patch_mixed, stack
from ttfunc.rows.given import token_indices
from ttfunc.rows.token_ids import TokenIndices, first_of_each, found_among, id_tensor, union

CPU = torch.device("cpu")
distinct = st.lists(st.integers(0, 99), min_size=1, unique=True)


@pytest.mark.parametrize(
    "form",
    [
        list,
        tuple,
        np.array,
        torch.tensor,
        iter,
        lambda ids: torch.tensor(ids, dtype=torch.int32),
        lambda ids: np.array(ids, dtype=np.uint8),
        lambda ids: [np.int64(i) for i in ids],
        lambda ids: [torch.tensor(i) for i in ids],
        lambda ids: dict.fromkeys(ids).keys(),
    ],
)
@given(ids=distinct)
def test_every_form_of_the_ids_is_read_in_its_order(form, ids: list[int]):
    assert token_indices(form(ids), 100, "w").ids == tuple(ids)


def test_a_range_is_read():
    assert token_indices(range(3, 9, 2), 100, "w").ids == (3, 5, 7)


@pytest.mark.parametrize(
    ("idx", "error", "match"),
    [
        ([], ValueError, "no token indices for 'w'"),
        (torch.tensor([], dtype=torch.int64), ValueError, "no token indices"),
        ([3, 1, 3], ValueError, r"\[3\] for 'w' are given more than once"),
        ([3, -1], ValueError, r"negative token indices \[-1\].*write 99"),
        (
            [3, 100],
            IndexError,
            r"\[100\] are past the end of 'w', which has 100 rows.*resize_token",
        ),
        (list(range(95, 120)), IndexError, r"… 20 in all"),
        ([True], TypeError, "got the boolean True.*nonzero"),
        (torch.tensor([True, False]), TypeError, "got the boolean"),
        (torch.tensor(3), TypeError, r"one dimension, got shape \(\)"),
        (np.array([[1, 2]]), TypeError, r"one dimension, got shape \(1, 2\)"),
        ([1.0], TypeError, r"must be integers, got float: 1\.0"),
        (np.array([0.5]), TypeError, "must be integers, got float"),
        ([3, None], TypeError, "is None.*add_tokens"),
        ([[1, 2]], TypeError, "must be integers, got list"),
        (["<new>"], TypeError, r"got the text .<new>..*convert_tokens_to_ids\(\[.<new>.\]\)"),
        ("<new>", TypeError, "must be a sequence.*got str: '<new>'"),
        (7, TypeError, "must be a sequence.*got int: 7"),
        (None, TypeError, "must be a sequence.*got NoneType"),
        ({3, 7}, TypeError, "must be a sequence.*got set"),
        (torch.zeros(2, dtype=torch.int64, device="meta"), TypeError, "with values.*on meta"),
        (
            torch.ones(2, dtype=torch.int64, device="cpu").to_sparse(),
            TypeError,
            "layout torch.sparse_coo",
        ),
    ],
)
def test_what_is_no_token_index_is_refused(idx, error, match: str):
    with pytest.raises(error, match=match):
        token_indices(idx, 100, "w")


@given(ids=distinct)
def test_the_table_finds_the_row_of_each_id(ids: list[int]):
    indices = TokenIndices(tuple(ids))
    table = indices.tables(CPU)
    assert table.ids.tolist() == ids
    assert table.ids[table.row_of[:-1]].tolist() == table.ordered.tolist() == sorted(ids)
    assert [indices.row_of(token) for token in ids] == list(range(len(ids)))
    assert indices.row_of(100) is None


@given(ids=distinct, height=st.integers(1, 100))
def test_ids_that_are_the_end_of_a_matrix_are_known(ids: list[int], height: int):
    start = TokenIndices(tuple(ids)).start_of_end(height)
    ends = [first for first in range(height) if set(range(first, height)) == {*ids}]
    assert start == next(iter(ends), None)


@given(ids=distinct, start=st.integers(0, 99), count=st.integers(0, 99))
def test_ids_within_a_range_count_from_its_start(ids: list[int], start: int, count: int):
    rows, within = TokenIndices(tuple(ids)).within(start, start + count)
    assert [ids[row] - start for row in rows] == list(within.ids)
    assert rows == [row for row, token in enumerate(ids) if start <= token < start + count]


@given(ids=st.lists(st.integers(-2, 13), min_size=1, max_size=12), example=st.booleans())
def test_ids_that_are_a_tensor_have_a_column_each_and_are_found(ids: list[int], example: bool):
    size = 12  # past it are no tokens
    first = first_of_each(torch.tensor([ids] if example else ids), size)
    tensor = id_tensor(first, size)
    used = [0 <= token < size and token not in ids[:row] for row, token in enumerate(ids)]
    assert tensor.used().flatten().tolist() == used
    columns = tensor.columns.flatten().tolist()
    assert len({*columns}) == len(ids)
    assert {*columns} <= {*range(size)}
    for column, token, has in zip(columns, ids, used, strict=True):
        assert (column == token) if has else (column not in ids)
    tokens = torch.arange(-3, 15).view(1, 3, 6)
    hit, row = tensor.find(tokens, CPU)
    truth = [token in ids and 0 <= token < size for token in tokens.flatten().tolist()]
    assert hit.flatten().tolist() == truth
    assert [ids.index(token) for token in tokens[hit].tolist()] == row[hit].tolist()
    compared, other = found_among(tensor.ids.flatten(), tokens)
    assert torch.equal(compared, hit)
    assert torch.equal(other[hit], row[hit])


def test_a_device_gets_its_table_once():
    indices = TokenIndices((5, 2))
    assert indices.tables(CPU) is indices.tables(CPU)


@given(a=distinct, b=distinct)
def test_indices_compare_by_content(a: list[int], b: list[int]):
    one, other = TokenIndices(tuple(a)), TokenIndices(tuple(b))
    assert (one == other) == (a == b)
    assert one == pickle.loads(pickle.dumps(one)) == copy.deepcopy(one)  # noqa: S301
    assert hash(one) == hash(TokenIndices(tuple(a)))


@given(a=distinct, b=distinct)
def test_an_id_in_both_is_refused_and_new_ids_are_told_to_follow_on(a: list[int], b: list[int]):
    model = nn.Embedding(100, 1)
    one, other = init_deltas(model, a), init_deltas(model, b)
    if {*a}.isdisjoint(b):
        assert combine(one, other).token_indices["weight"].tolist() == a + b
        return
    match = "are in more than one of .* for 'weight': .*drop the overlap"
    with pytest.raises(ValueError, match=match):
        combine(one, other)
    new = init_deltas(model, [100], grow=True)
    with pytest.raises(ValueError, match="are in more than one of .* for 'weight': .*after=first"):
        combine(new, new)


def test_a_table_made_in_another_mode_serves_every_call():
    with torch.inference_mode(), torch.device("meta"):
        assert not TokenIndices((5, 2)).ids_on(CPU).is_inference()

    inner = TokenIndices((5, 2))
    torch.func.grad(lambda x: x * inner.ids_on(CPU).sum())(torch.tensor(1.0))
    assert inner.ids_on(CPU).numpy().tolist() == [5, 2]


def test_a_table_made_among_fake_tensors_is_real():
    indices = TokenIndices((3, 1))
    with FakeTensorMode():
        indices.tables(torch.device("cpu"))
    assert type(indices.ids_on(torch.device("cpu"))) is torch.Tensor


def test_tokens_that_lie_apart_are_found_without_a_warning():
    hit, row = TokenIndices((3, 1)).find(torch.tensor([[1, 2], [3, 1]]).T, torch.device("cpu"))
    assert hit.tolist() == [[True, True], [False, True]]
    assert row[hit].tolist() == [1, 0, 1]


def test_a_union_is_found_once_by_its_content():
    a, b, c = (TokenIndices(ids) for ids in ((5, 2), (3,), (7, 2)))
    assert union((a, b, c)).ids == (5, 2, 3, 7)
    assert union((a, b, c)) is union((a, TokenIndices((3,)), c))
    assert union((a,)) is a


def test_no_module_keeps_what_a_step_was_given():
    model = make("tied").requires_grad_(False)

    def step() -> list[weakref.ref]:
        a, b = (init_deltas(model, ids, requires_grad=True) for ids in ([7, 3], [20]))
        for _ in range(2):
            loss_of(functional_call(model, patch(a, b), (tokens(7, 20),))).backward()
        stack([a, b])
        functional_call(model, patch_mixed([a, b], [0, 1, -1]), (tokens(7, 20),))
        indices = [row.indices for p in (a, b) for row in p.specs.values()]
        return [
            weakref.ref(one) for one in [*indices, *(t for i in indices for t in i.tables(CPU))]
        ]

    left = step()
    gc.collect()
    assert [ref() for ref in left] == [None] * len(left)
