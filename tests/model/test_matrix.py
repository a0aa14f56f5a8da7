"""Every name and place of a token matrix in a model."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from tests.helpers.models import CORPUS, D, V, make, tokens
from tests.helpers.unusual import UNUSUAL
from ttfunc import functional_call, init_deltas, merge, patch, unmerge
from ttfunc.model.matrix import count_places, matrices_of, matrix_of, names_apart


@pytest.mark.parametrize(
    ("case", "names", "slots", "distinct"),
    [
        ("untied", ["embed_tokens.weight"], 1, 1),
        ("tied", ["embed_tokens.weight", "lm_head.weight"], 2, 1),
        ("storage_tied", ["embed_tokens.weight", "lm_head.weight"], 2, 2),
        (
            "encoder_decoder",
            [
                "embed_tokens.weight",
                "lm_head.weight",
                "shared.weight",
                "encoder.embed_tokens.weight",
            ],
            2,
            1,
        ),
    ],
)
def test_all_places_of_a_matrix_are_found(case: str, names: list[str], slots: int, distinct: int):
    model = make(case)
    matrix = matrix_of(model, model.embed_tokens.weight)
    assert list(matrix.names) == names
    assert set(names) == {n for n in model.state_dict() if n in names}
    assert len(matrix.slots) == slots
    assert count_places(model, matrix.distinct.values()) == slots
    assert len(matrix.distinct) == distinct
    assert matrix.tensor is model.embed_tokens.weight


def test_ties_are_found_on_the_meta_device():
    with torch.device("meta"):
        model = CORPUS["storage_tied"]()
        other = CORPUS["untied"]()
    assert len(matrix_of(model, model.embed_tokens.weight).names) == 2
    assert len(matrix_of(other, other.embed_tokens.weight).names) == 1


def test_another_view_of_the_matrix_is_refused():
    model = make("untied")
    model.part = nn.Module()
    model.part.weight = nn.Parameter(model.embed_tokens.weight.data[2:])
    with pytest.raises(ValueError, match=r"'part.weight' \(21, 8\) is another view of the matrix"):
        matrix_of(model, model.embed_tokens.weight)


def test_neighbours_in_one_flat_storage_are_not_tied():
    flat = torch.randn(2 * V * D)
    model = make("untied")
    model.embed_tokens.weight = nn.Parameter(flat[: V * D].view(V, D))
    model.lm_head.weight = nn.Parameter(flat[V * D :].view(V, D))
    assert matrix_of(model, model.embed_tokens.weight).names == ("embed_tokens.weight",)


def test_a_buffer_over_the_same_memory_is_a_place_too():
    model = make("untied")
    model.register_buffer("kept", model.embed_tokens.weight.data)
    model.register_buffer("unkept", model.embed_tokens.weight.data, persistent=False)
    matrix = matrix_of(model, model.embed_tokens.weight)
    assert sorted(matrix.names) == ["embed_tokens.weight", "kept"]
    assert {name for name, _ in matrix.slots} == {"embed_tokens.weight", "kept", "unkept"}
    assert count_places(model, matrix.distinct.values()) == 3


@pytest.mark.parametrize("kind", UNUSUAL)
def test_what_has_no_strided_memory_may_be_anywhere_in_the_model(kind: str):
    model = make("tied")
    model.unusual = nn.Module()
    model.unusual.register_buffer("kept", UNUSUAL[kind]())
    matrix = matrix_of(model, model.embed_tokens.weight)
    assert matrix.names == ("embed_tokens.weight", "lm_head.weight")
    params = init_deltas(model, [7], init="mean")
    before = {**model.state_dict(), "unusual.kept": model.unusual.kept}
    merged = merge(before, params)
    assert merged["unusual.kept"] is model.unusual.kept
    assert torch.equal(unmerge(merged, params)["lm_head.weight"], model.lm_head.weight)
    assert type(functional_call(model, patch(params), (tokens(7),))) is torch.Tensor


def test_several_are_found_in_one_search():
    model = make("untied")
    tensors = [model.lm_head.weight, model.embed_tokens.weight, model.lm_head.weight]
    head, embedding, again = matrices_of(model, tensors)
    assert head is again
    assert (head.names, embedding.names) == (("lm_head.weight",), ("embed_tokens.weight",))
    alone = [matrix_of(model, tensor) for tensor in tensors[:2]]
    for one, other in zip(alone, (head, embedding), strict=True):
        assert (one.names, one.slots) == (other.names, other.slots)


def test_a_module_that_has_two_names_is_one_place():
    model = make("tied")
    model.again = model.lm_head
    assert count_places(model, [model.embed_tokens.weight]) == 2


def test_the_names_of_what_may_be_tied_elsewhere():
    """Other matrices of the shape, in the state dict: not what is tied here already."""
    model = make("untied")
    matrix = matrix_of(model, model.lm_head.weight)
    assert names_apart(model, matrix) == ("embed_tokens.weight",)
    model.register_buffer("kept", torch.zeros(V, D))
    model.register_buffer("passing", torch.zeros(V, D), persistent=False)
    model.other = nn.LazyLinear(V)
    assert names_apart(model, matrix) == ("kept", "embed_tokens.weight")
    tied = make("tied")
    assert names_apart(tied, matrix_of(tied, tied.lm_head.weight)) == ()
