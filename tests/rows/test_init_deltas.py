"""Choosing rows: where they start, which targets they belong to, and what is refused."""

from __future__ import annotations

import re

import numpy as np
import optree
import pytest
import torch
from torch import nn

from tests.helpers.models import D, V, make
from tests.helpers.oracle import snapshot
from ttfunc import init_deltas

NAME = "embed_tokens.weight"


def test_rows_start_as_the_base_in_the_order_given():
    model = make("tied")
    params = init_deltas(model, [7, 3, 20])
    assert torch.equal(params.deltas[NAME], model.embed_tokens.weight[[7, 3, 20]])
    assert torch.equal(params.originals[NAME], model.embed_tokens.weight[[7, 3, 20]])
    assert params.token_indices[NAME].tolist() == [7, 3, 20]
    assert params.tied == {NAME: (NAME, "lm_head.weight")}
    assert not params.deltas[NAME].requires_grad
    assert params.deltas[NAME].data_ptr() != params.originals[NAME].data_ptr()
    assert repr(params) == f"TokenDeltas({NAME} = lm_head.weight: 3 of {V} rows)"


def test_rows_start_as_asked():
    model = make("tied")
    weight = model.embed_tokens.weight.detach()
    mean = init_deltas(model, [7, 3], init="mean").deltas[NAME]
    torch.testing.assert_close(mean, weight.mean(0).expand(2, D))

    rows = torch.randn(2, D)
    assert torch.equal(init_deltas(model, [7, 3], init=rows).deltas[NAME], rows)

    def pieces(base: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        assert ids.tolist() == [7, 3]
        return base[[0, 1]].mean(0).expand(2, -1)

    started = init_deltas(model, [7, 3], init=pieces).deltas[NAME]
    assert torch.equal(started, weight[[0, 1]].mean(0).expand(2, D))
    started[0] = 0  # rows of their own, though they were expanded from one
    assert not torch.equal(started[0], started[1])


def test_normal_rows_have_the_spread_of_the_matrix_and_follow_the_generator():
    model = nn.Embedding(2000, 4)
    with torch.no_grad():
        model.weight.mul_(torch.tensor([0.01, 0.1, 1, 10])).add_(torch.tensor([0.0, 1, 2, 3]))

    def drawn(seed: int) -> torch.Tensor:
        generator = torch.Generator().manual_seed(seed)
        params = init_deltas(model, range(2000), init="normal", generator=generator)
        return params.deltas["weight"]

    assert torch.equal(drawn(1), drawn(1))
    assert not torch.equal(drawn(1), drawn(2))
    torch.testing.assert_close(drawn(1).std(0), model.weight.std(0), rtol=0.1, atol=0)
    assert ((drawn(1).mean(0) - model.weight.mean(0)).abs() < 0.1 * model.weight.std(0)).all()


@pytest.mark.parametrize(
    ("base", "asked", "expected"),
    [
        (torch.float32, None, torch.float32),
        (torch.bfloat16, None, torch.float32),
        (torch.float16, None, torch.float32),
        (torch.float64, None, torch.float64),
        (torch.bfloat16, torch.bfloat16, torch.bfloat16),
    ],
)
def test_half_precision_matrices_train_in_float32(base, asked, expected):
    params = init_deltas(make("tied").to(base), [3], dtype=asked, requires_grad=True)
    assert params.deltas[NAME].dtype == expected
    assert params.originals[NAME].dtype == base
    assert params.deltas[NAME].requires_grad
    assert params.deltas[NAME].is_leaf


def test_a_model_on_the_meta_device_gives_deltas_there():
    with torch.device("meta"):
        model = nn.Embedding(V, D)
    params = init_deltas(model, [3, 1])
    assert params.deltas["weight"].is_meta
    assert optree.tree_structure(params) == optree.tree_structure(init_deltas(model, [3, 1]))


def test_each_untied_target_gets_a_leaf_and_a_tied_one_shares_it():
    untied, tied = make("untied"), make("tied")
    both = ["embed_tokens", "lm_head"]
    assert list(init_deltas(untied, [3], targets=both).deltas) == [NAME, "lm_head.weight"]
    assert list(init_deltas(tied, [3], targets=both).deltas) == [NAME]
    assert list(init_deltas(tied, [3], targets="lm_head").deltas) == [NAME]
    own = init_deltas(untied, {"embed_tokens": [1, 2], "lm_head": [3]})
    assert {n: i.tolist() for n, i in own.token_indices.items()} == {
        NAME: [1, 2],
        "lm_head.weight": [3],
    }
    # An iterator is read once, for both of them.
    drained = init_deltas(untied, iter([1, 2]), targets=re.compile("embed_tokens|lm_head"))
    assert [d.shape[0] for d in drained.deltas.values()] == [2, 2]


@pytest.mark.parametrize(
    ("idx", "kwargs", "error", "match"),
    [
        ([], {}, ValueError, "no token indices for 'embed_tokens'"),
        ([V], {}, IndexError, "past the end of 'embed_tokens'"),
        ({}, {}, ValueError, "idx is an empty mapping"),
        ({"embed_tokens": [1]}, {"targets": "lm_head"}, ValueError, "Give one of the two"),
        ({"embed_tokens": [1], "lm_head": [2]}, {}, ValueError, r"are tied.*\(1,\) and \(2,\)"),
        ({"embed_tokens": [1, 2], "lm_head": [2, 1]}, {}, ValueError, "in the same order"),
        ([1], {"targets": "nothing"}, ValueError, "'nothing' matches no module"),
        ([1], {"init": "zeros"}, ValueError, "init='zeros' is unknown.*\"normal\""),
        ([1], {"init": 0}, TypeError, "init is a int"),
        ([1], {"init": torch.zeros(2, D)}, ValueError, r"gives \(2, 8\).*\(1, 8\) is needed"),
        ([1], {"init": lambda base, ids: base}, ValueError, r"gives \(23, 8\)"),
        ([1], {"init": lambda base, ids: None}, ValueError, "gives NoneType"),
        ([1], {"init": lambda base, ids: 1j * base[ids]}, TypeError, "gives torch.complex64"),
        ([1], {"dtype": torch.int64}, TypeError, "dtype=torch.int64 cannot be trained"),
        ([1], {"dtype": "float32"}, TypeError, "dtype='float32' cannot be trained"),
        ([1], {"targets": 5}, TypeError, "must be module names, got int: 5"),
        ({5: [1]}, {}, TypeError, "must be module names, got int: 5"),
        ({None: [1]}, {}, TypeError, "must be module names, got NoneType"),
    ],
)
def test_bad_input_is_refused_and_changes_nothing(idx, kwargs, error, match: str):
    model = make("tied")
    before = snapshot(model)
    with pytest.raises(error, match=match):
        init_deltas(model, idx, **kwargs)
    assert snapshot(model) == before


def test_a_padding_row_is_trained_with_a_warning():
    with pytest.warns(UserWarning, match="token 3 is the padding_idx of 'embed_tokens'") as caught:
        init_deltas(make("padding"), [1, 3])
    assert caught[0].filename == __file__


def test_numpy_token_ids_of_a_tokenizer_are_taken():
    assert init_deltas(make("tied"), np.arange(3)).token_indices[NAME].tolist() == [0, 1, 2]


def test_what_is_no_module_is_refused():
    with pytest.raises(TypeError, match="must be a torch.nn.Module, got dict"):
        init_deltas({}, [1])


def test_an_init_that_writes_to_the_model_is_told():
    with pytest.raises(RuntimeError, match="init wrote to the matrix 'embed_tokens.weight'"):
        init_deltas(make("tied"), [1, 2], init=lambda base, ids: base.mul_(2)[ids])


def test_an_init_that_writes_to_its_ids_changes_nothing():
    params = init_deltas(make("tied"), [1, 2], init=lambda base, ids: base[ids.zero_()])
    assert params.token_indices[NAME].tolist() == [1, 2]


def test_an_iterator_serves_each_module_of_a_target_in_a_mapping():
    params = init_deltas(make("untied"), {re.compile("embed_tokens|lm_head"): iter([1, 2])})
    assert [d.shape[0] for d in params.deltas.values()] == [2, 2]
