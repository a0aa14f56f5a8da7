"""Each matrix starts from values of its own."""

from __future__ import annotations

import re

import pytest
import torch

from tests.helpers.llama import llama
from tests.helpers.models import D, V, make
from ttfunc import init_deltas

NAME, HEAD = "embed_tokens.weight", "lm_head.weight"
BOTH = ["embed_tokens", "lm_head"]


def test_a_mapping_gives_each_matrix_its_own_rows():
    model, rows = make("untied"), torch.randn(2, D)
    for idx, options in (([V, 3], {"grow": True}), ([7, 3], {"targets": BOTH})):
        init = {"lm_head": rows, "embed_tokens": lambda base, ids: base[[0, 1]]}
        params = init_deltas(model, idx, init=init, **options)
        assert torch.equal(params.deltas[HEAD], rows)
        assert torch.equal(params.deltas[NAME], model.embed_tokens.weight[[0, 1]])
    params = init_deltas(
        model,
        {"embed_tokens": [1], "lm_head": [3, 4]},
        init={
            "embed_tokens": "mean",
            "lm_head": "base",
        },
    )
    torch.testing.assert_close(params.deltas[NAME][0], model.embed_tokens.weight.mean(0))
    assert torch.equal(params.deltas[HEAD], model.lm_head.weight[[3, 4]])
    pattern = {re.compile("embed.*|lm_head"): "mean"}
    torch.testing.assert_close(
        init_deltas(model, [3], targets=BOTH, init=pattern).deltas[HEAD][0],
        model.lm_head.weight.mean(0),
    )


def test_a_tied_matrix_is_one_under_any_of_its_names():
    model, rows = make("tied"), torch.randn(1, D)
    for target in BOTH:
        assert torch.equal(init_deltas(model, [3], init={target: rows}).deltas[NAME], rows)
    with pytest.raises(ValueError, match="entry for 'lm_head', of which it has an entry already"):
        init_deltas(model, [3], init=dict.fromkeys(BOTH, rows))


def test_one_tensor_is_not_the_rows_of_two_matrices():
    rows = torch.randn(1, D)
    match = r"init is one tensor, .*2 matrices .*init=\{'model.embed_tokens': ..., 'lm_head': ...\}"
    with pytest.raises(ValueError, match=match):
        init_deltas(llama(tie=False), [V], grow=True, init=rows)
    with pytest.raises(ValueError, match="init is one tensor"):
        init_deltas(make("untied"), [3], targets=BOTH, init=rows)
    same = init_deltas(make("untied"), [3], targets=BOTH, init=lambda base, ids: rows)
    assert torch.equal(same.deltas[NAME], same.deltas[HEAD])  # where the same is meant
    assert torch.equal(
        init_deltas(llama(), [V], grow=True, init=rows).deltas[f"model.{NAME}"], rows
    )


@pytest.mark.parametrize(
    ("init", "match"),
    [
        ({"embed_tokens": "mean"}, r"none for \['lm_head.weight'\]"),
        ({"embed_tokens": "mean", "lm_head": "mean", "body": "mean"}, "'body', of which no rows"),
        ({"embed_tokens": "mean", "head": "mean"}, "'head' matches no module"),
        ({"embed_tokens": "mean", "lm_head": "zeros"}, "init='zeros' is unknown"),
        ({}, r"none for \['embed_tokens.weight', 'lm_head.weight'\]"),
    ],
)
def test_mappings_that_do_not_fit_are_refused(init: dict, match: str):
    with pytest.raises(ValueError, match=match):
        init_deltas(make("untied"), [3], targets=BOTH, init=init)
