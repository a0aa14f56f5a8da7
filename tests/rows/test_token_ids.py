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
from torch._subclasses.fake_tensor import FakeTensorMode

from tests.helpers.models import loss_of, make, tokens
from ttfunc import functional_call, init_deltas, patch, patch_mixed, stack
from ttfunc.rows.token_ids import TokenIndices, check_apart, gaps, token_indices, union

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
        (torch.ones(2, dtype=torch.int64).to_sparse(), TypeError, "layout torch.sparse_coo"),
    ],
)
def test_what_is_no_token_index_is_refused(idx, error, match: str):
    with pytest.raises(error, match=match):
        token_indices(idx, 100, "w")


@given(ids=distinct)
def test_the_table_finds_the_row_of_each_id(ids: list[int]):
    indices = TokenIndices(tuple(ids))
    table = indices.on(CPU)
    assert table.ids.tolist() == ids
    assert table.sorted.tolist() == sorted(ids)
    assert table.id_at.tolist() == [*sorted(ids), -1]
    assert table.ids[table.row_at[:-1]].tolist() == sorted(ids)
    assert [indices.row_of(token) for token in ids] == list(range(len(ids)))
    assert indices.row_of(100) is None


@given(ids=distinct, above=st.integers(1, 3), most=st.integers(0, 5) | st.just(200))
def test_stretches_are_all_but_the_ids(ids: list[int], above: int, most: int):
    size = max(ids) + above
    rest = sorted(set(range(size)) - set(ids))
    found = gaps(TokenIndices(tuple(ids)), size, most)
    if sum(token - 1 not in rest for token in rest) > most:
        assert found == ()
        return
    assert [i for part in found for i in range(size)[part]] == rest
    assert all(part.start < part.stop for part in found)


def test_a_device_gets_its_table_once():
    indices = TokenIndices((5, 2))
    assert indices.on(CPU) is indices.on(CPU)


@given(a=distinct, b=distinct)
def test_indices_compare_by_content(a: list[int], b: list[int]):
    one, other = TokenIndices(tuple(a)), TokenIndices(tuple(b))
    assert (one == other) == (a == b)
    assert one == pickle.loads(pickle.dumps(one)) == copy.deepcopy(one)  # noqa: S301
    assert hash(one) == hash(TokenIndices(tuple(a)))


@given(a=distinct, b=distinct)
def test_an_id_in_both_is_refused_and_new_ids_are_told_to_follow_on(a: list[int], b: list[int]):
    one, other = TokenIndices(tuple(a)), TokenIndices(tuple(b))
    both = sorted(set(a) & set(b))
    if not both:
        check_apart(one, other, "w", 0)
        return
    for height, way in ((both[0], "after=first"), (both[0] + 1, "drop the overlap")):
        with pytest.raises(ValueError, match=f"are in more than one of .* for 'w': .*{way}"):
            check_apart(one, other, "w", height)


def test_a_table_made_in_another_mode_serves_every_call():
    with torch.inference_mode(), torch.device("meta"):
        assert not TokenIndices((5, 2)).on(CPU).ids.is_inference()

    inner = TokenIndices((5, 2))
    torch.func.grad(lambda x: x * inner.on(CPU).ids.sum())(torch.tensor(1.0))
    assert inner.on(CPU).ids.numpy().tolist() == [5, 2]


def test_a_table_made_among_fake_tensors_is_real():
    indices = TokenIndices((3, 1))
    with FakeTensorMode():
        indices.on(torch.device("cpu"))
    assert type(indices.on(torch.device("cpu")).ids) is torch.Tensor


def test_tokens_that_lie_apart_are_found_without_a_warning():
    hit, row = TokenIndices((3, 1)).find(torch.tensor([[1, 2], [3, 1]]).T, torch.device("cpu"))
    assert hit.tolist() == [[True, True], [False, True]]
    assert row[hit].tolist() == [1, 0, 1]


def test_what_is_known_of_ids_is_found_once_and_lives_as_long_as_they_do():
    a, b, c = (TokenIndices(ids) for ids in ((5, 2), (3,), (7, 2)))
    assert union((a, b, c)).ids == (5, 2, 3, 7)
    assert union((a, b, c)) is union((a, TokenIndices((3,)), c))
    assert union((a,)) is a
    assert gaps(a, 9, 4) is gaps(a, 9, 4)
    whole, other = weakref.ref(union((a, b, c))), weakref.ref(union((a, c)))
    del b
    assert whole() is None
    assert other() is union((a, c))
    first = weakref.ref(a)
    del a
    assert first() is None
    assert other() is None


def test_ids_that_come_and_go_leave_nothing():
    kept = TokenIndices((0,))
    for token in range(1, 100):
        union((kept, TokenIndices((token,))))
        union((TokenIndices((token,)), kept))
    assert not kept._unions


def test_no_module_keeps_what_a_step_was_given():
    model = make("tied").requires_grad_(False)

    def step() -> list[weakref.ref]:
        a, b = (init_deltas(model, ids, requires_grad=True) for ids in ([7, 3], [20]))
        for _ in range(2):
            loss_of(functional_call(model, patch(a, b), (tokens(7, 20),))).backward()
        stack([a, b])
        functional_call(model, patch_mixed([a, b], [0, 1, -1]), (tokens(7, 20),))
        indices = [row.indices for p in (a, b) for row in p.specs.values()]
        return [weakref.ref(one) for one in [*indices, *(t for i in indices for t in i.on(CPU))]]

    left = step()
    gc.collect()
    assert [ref() for ref in left] == [None] * len(left)
