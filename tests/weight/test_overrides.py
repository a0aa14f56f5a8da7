"""What torch functions do to a matrix, each answer against torch itself."""

from __future__ import annotations

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given
from torch import Tensor

from ttfunc.weight.overrides import (
    ANSWERED_BY_BASE,
    ANSWERED_BY_PLACEHOLDER,
    einsum_as_product,
    transposes,
    written_by,
)

SIZES = {"b": 2, "l": 3, "h": 4, "v": 7, "d": 5}


@given(st.permutations("bld"), st.permutations("blv"), st.sampled_from(["vd", "dv"]), st.booleans())
def test_an_einsum_is_a_product_between_permutations(hidden, out, matrix, first: bool):
    hidden, out = "".join(hidden), "".join(out)
    terms = (matrix, hidden) if first else (hidden, matrix)
    equation = f"{','.join(terms)} -> {out}"
    before, after = einsum_as_product(equation, 0 if first else 1, transposed=matrix == "dv")

    h = torch.randn([SIZES[letter] for letter in hidden])
    w = torch.randn([SIZES[letter] for letter in matrix])
    product = torch.einsum(before, h) @ (w if matrix == "dv" else w.T)
    torch.testing.assert_close(
        torch.einsum(after, product), torch.einsum(equation, *((w, h) if first else (h, w)))
    )


def test_an_ellipsis_goes_along():
    assert einsum_as_product("...d,vd->...v", 1, False) == ("...d->...d", "...v->...v")


@pytest.mark.parametrize(
    "equation",
    [
        "bld,vd",  # no output, which torch would sort by letter
        "bld,vd->bl",  # summed over the tokens
        "bld,vd->bv",  # summed over a dimension of the batch
        "bld,vd->blvd",  # nothing contracted
        "bvd,vd->bv",  # the tokens in both
        "bbd,vd->bv",  # a diagonal
        "bld,vv->blv",
        "bld,v->blv",
        "bld,vd,d->blv",
    ],
)
def test_what_is_more_than_a_product_is_none(equation: str):
    assert einsum_as_product(equation, 1, False) is None


@pytest.mark.parametrize("dim0", range(-2, 2))
@pytest.mark.parametrize("dim1", range(-2, 2))
def test_two_dimensions_of_a_matrix_turn_it_or_not(dim0: int, dim1: int):
    turned = torch.empty(2, 3).transpose(dim0, dim1).shape == (3, 2)
    assert transposes(dim0, dim1) == turned


def test_a_dimension_that_a_matrix_has_not_turns_nothing():
    assert not transposes(0, 3)


@pytest.mark.parametrize(
    ("func", "args", "kwargs", "written"),
    [
        (Tensor.mul_, ("w", 2), {}, ["w"]),
        (torch.nn.init.normal_, (), {"tensor": "w"}, ["w"]),
        (Tensor.__setitem__, ("w", 0, 1), {}, ["w"]),
        (Tensor.data.__set__, ("w", "x"), {}, ["w"]),
        (Tensor.data_ptr, ("w",), {}, ["w"]),
        (torch.add, ("x", 1), {"out": "w"}, ["w"]),
        (torch.sort, ("x",), {"out": ("v", "w")}, ["v", "w"]),
        (torch.add, ("w", 1), {}, []),
        (Tensor.__add__, ("w", 1), {}, []),
        (Tensor.shape.__get__, ("w",), {}, []),
    ],
)
def test_what_a_function_writes_to(func, args, kwargs, written: list[str]):
    assert [x for x in written_by(func, args, kwargs) if x is not None] == written


def test_every_question_is_one_that_torch_dispatches():
    # torch's list leaves stride out, though it is dispatched too.
    overridable = {*torch.overrides.get_testing_overrides(), Tensor.stride}
    assert overridable >= ANSWERED_BY_BASE | ANSWERED_BY_PLACEHOLDER
