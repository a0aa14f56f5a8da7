"""From parameters to the weights of a call."""

from __future__ import annotations

import optree
import pytest
import torch

from tests.helpers.llama import llama
from tests.helpers.models import D, V, make
from tests.helpers.rows import random_rows
from ttfunc import PatchedWeight, combine, functional_call, init_deltas, patch

NAME = "embed_tokens.weight"


@pytest.mark.parametrize("dense", [False, True])
@pytest.mark.parametrize(
    ("case", "names"),
    [
        ("untied", [NAME]),
        ("tied", [NAME]),
        ("encoder_decoder", [NAME]),
        # torch's functional_call does not see this tie, so both Parameters are named.
        ("storage_tied", [NAME, "lm_head.weight"]),
    ],
)
def test_there_is_one_name_for_each_parameter(case: str, names: list[str], dense: bool):
    weights = patch(init_deltas(make(case), [7, 3]), dense=dense)
    assert list(weights) == names
    assert len({id(weight) for weight in weights.values()}) == 1
    assert all(type(weight) is PatchedWeight for weight in weights.values())
    assert weights[NAME].shape == (V, D)


@pytest.mark.parametrize("dense", [False, True])
def test_the_weight_is_the_matrix_with_the_rows(dense: bool):
    model = make("tied")
    params = random_rows(model, [7, 3])
    expected = model.embed_tokens.weight.detach().clone()
    for row, token in enumerate([7, 3]):
        expected[token] = params.deltas[NAME][row]
    assert torch.equal(patch(params, dense=dense)[NAME] + 0, expected)


def test_several_parameters_are_patched_together():
    model = make("tied")
    a, b = init_deltas(model, [7], init="mean"), random_rows(model, [3])
    together = patch(combine(a, b))[NAME] + 0
    assert torch.equal(patch(a, b)[NAME] + 0, together)
    assert torch.equal(patch(b, a)[NAME] + 0, together)
    with pytest.raises(ValueError, match=r"\[7\] are in more than one"):
        patch(a, b, a)


def test_a_matrix_with_a_maximal_norm_is_copied():
    assert not patch(init_deltas(make("max_norm"), [3]))[NAME].deferred
    assert patch(init_deltas(make("tied"), [3]))[NAME].deferred


def test_a_delta_of_another_shape_is_refused():
    params = init_deltas(make("tied"), [7, 3])
    stacked = optree.tree_map(lambda rows: torch.stack([rows, rows]), params)
    with pytest.raises(ValueError, match=r"shape \(2, 2, 8\), and \(2, 8\) is needed.*torch.vmap"):
        patch(stacked)


def test_parameters_of_a_resized_model_are_refused():
    model = llama(layers=1)
    params = init_deltas(model, [7, 3])
    model.resize_token_embeddings(V + 2, mean_resizing=False)
    with pytest.raises(ValueError, match=r"stale parameters.*\(23, 8\).*has \(25, 8\) now"):
        patch(params)


def test_the_weight_follows_the_model_when_it_is_cast():
    model = make("tied")
    params = random_rows(model, [7, 3])
    model.to(torch.bfloat16)
    x = torch.tensor([[7, 3, 1]])
    assert patch(params)[NAME].dtype == torch.bfloat16
    deferred = functional_call(model, patch(params), (x,))
    torch.testing.assert_close(deferred, functional_call(model, patch(params, dense=True), (x,)))
    (gradient,) = optree.tree_leaves(
        torch.func.grad(lambda p: functional_call(model, patch(p), (x,)).float().sum())(params)
    )
    assert gradient.dtype == torch.float32


def test_a_patch_costs_no_memory_of_the_matrix():
    with torch.device("meta"):
        model = torch.nn.Embedding(10**9, 4096)  # 16 TB, were it copied
    weight = patch(init_deltas(model, [3, 10**9 - 1]))["weight"]
    assert weight.shape == (10**9, 4096)
    assert weight[torch.tensor([[3, 4]], device="meta")].shape == (1, 2, 4096)


@pytest.mark.parametrize("dense", [False, True])
def test_the_gradient_goes_to_the_rows_alone(dense: bool):
    model = make("tied")  # whose parameters all require grad
    params = init_deltas(model, [7, 3], requires_grad=True)
    weight = patch(params, dense=dense)[NAME]
    (weight[torch.tensor([7, 1])].sum() + (weight @ torch.ones(D)).sum()).backward()
    assert params.deltas[NAME].grad.tolist() == [[2.0] * D, [1.0] * D]
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize(
    "part",
    [
        lambda model: model.double(),
        lambda model: setattr(model.lm_head.weight, "data", torch.zeros(V, D)),
    ],
)
@pytest.mark.parametrize("dense", [False, True])
def test_a_tie_that_came_apart_is_refused(part, dense: bool):
    model = make("storage_tied")
    params = init_deltas(model, [7, 3])
    part(model)
    with pytest.raises(ValueError, match=r"stale parameters: \['lm_head.weight'\] shared the mem"):
        patch(params, dense=dense)


@pytest.mark.parametrize("leaf", [None, 3, torch.zeros(2, D, dtype=torch.int64)])
def test_a_leaf_that_is_no_float_tensor_is_refused(leaf):
    params = optree.tree_map(lambda _: leaf, init_deltas(make("tied"), [7, 3]))
    with pytest.raises(TypeError, match="a floating-point tensor is needed"):
        patch(params)
