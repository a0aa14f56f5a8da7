"""Adapters side by side, against a loop over them."""

from __future__ import annotations

import pickle

import optree
import pytest
import torch
from torch.func import grad, vmap
from torch.utils.flop_counter import FlopCounterMode

from tests.helpers.models import CORPUS, D, V, loss_of, make, tokens
from tests.helpers.oracle import edited
from tests.helpers.rows import adapters, random_rows
from ttfunc import TokenDeltas, combine, functional_call, init_deltas, merge, patch, stack

NAME, HEAD = "embed_tokens.weight", "lm_head.weight"
X = tokens(7, 3, 20, 5)
# torch batches no write to an unbatched tensor (max_norm), and no Function without a rule for it.
BATCHED = sorted(CORPUS.keys() - {"max_norm", "function"})


@pytest.mark.parametrize("case", BATCHED)
@pytest.mark.parametrize("ids", [[[7, 3]] * 3, [[7, 3], [3, 20, 5], [5]]], ids=["same", "other"])
def test_one_call_is_a_call_of_each(case: str, ids: list[list[int]]):
    model = make(case).requires_grad_(False)
    each = adapters(model, *ids)
    found = vmap(lambda p: functional_call(model, patch(p), (X,)))(stack(each))
    assert found.shape == (3, *X.shape, V)
    for one, params in zip(found, each, strict=True):
        torch.testing.assert_close(one, edited(model, params)(X))


def test_gradients_are_those_of_each():
    model = make("tied").requires_grad_(False)
    each = adapters(model, [7, 3], [3, 20])
    stacked = stack(each)
    assert stacked.token_indices[NAME].tolist() == [7, 3, 20]

    def loss(p: TokenDeltas) -> torch.Tensor:
        return loss_of(functional_call(model, patch(p), (X,)))

    found = vmap(grad(loss))(stacked).deltas[NAME]
    for row, params in enumerate(each):
        own = grad(loss)(params).deltas[NAME]
        places = [[7, 3, 20].index(i) for i in params.token_indices[NAME].tolist()]
        torch.testing.assert_close(found[row, places], own)


def test_an_adapter_comes_out_as_it_went_in_with_the_rows_of_the_model_for_the_rest():
    model = make("untied")
    a = init_deltas(model, {"embed_tokens": [5, 1], "lm_head": [2]}, init="mean")
    b = init_deltas(model, [3], dtype=torch.float64, init="mean")
    stacked = stack([a, b])
    assert stacked.token_indices[NAME].tolist() == [5, 1, 3]
    assert {name: leaf.shape for name, leaf in stacked.deltas.items()} == {
        NAME: (2, 3, D),
        HEAD: (2, 1, D),
    }
    first, second = (optree.tree_map(lambda t, i=i: t[i], stacked) for i in range(2))
    original = model.embed_tokens.weight
    assert torch.equal(first.deltas[NAME].float(), torch.cat([a.deltas[NAME], original[[3]]]))
    assert torch.equal(second.deltas[NAME][:2].float(), original[[5, 1]])
    assert torch.equal(second.deltas[NAME][2], b.deltas[NAME][0])
    assert torch.equal(second.deltas[HEAD], stacked.originals[HEAD])
    # The first is a's rows and the originals: merged, it is a merged.
    state = model.state_dict()
    for name, tensor in merge(state, first).items():
        assert torch.equal(tensor, merge(state, a)[name])


def test_the_model_was_trained_since_the_adapters_were_made():
    model = make("untied").requires_grad_(False)
    each = [
        random_rows(model, {"embed_tokens": [7, 3], "lm_head": [2]}),
        random_rows(model, {"embed_tokens": [3, 20, 5]}),
        random_rows(model, {"embed_tokens": [5], "lm_head": [9, 2]}),
    ]
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3)
    found = vmap(lambda p: functional_call(model, patch(p), (X,)))(stack(each))
    for one, params in zip(found, each, strict=True):
        torch.testing.assert_close(one, edited(model, params)(X))
    # Without the model, what is known of its rows are the originals.
    loaded = pickle.loads(pickle.dumps(each))  # noqa: S301
    assert torch.equal(stack(loaded).deltas[NAME][1, 0], each[0].originals[NAME][0])


def test_new_tokens_side_by_side_with_other_old_ones():
    model = make("biased").requires_grad_(False)
    each = adapters(model, [V + 1, 7, V, 3], [3, V, V + 1, 20, 5], [V, V + 1], grow=True)
    with torch.no_grad():
        model.embed_tokens.weight.mul_(3)
    x = torch.cat([X, torch.tensor([[V, 7, V + 1, 20, 3, 5]])])
    found = vmap(lambda p: functional_call(model, patch(p), (x,)))(stack(each))
    for one, params in zip(found, each, strict=True):
        torch.testing.assert_close(one, functional_call(model, patch(params), (x,)))


def test_narrow_adapters_do_not_round_the_rows_of_the_model():
    model = make("tied").requires_grad_(False)
    each = adapters(model, [7], [3], dtype=torch.bfloat16)
    found = vmap(lambda p: functional_call(model, patch(p), (X,)))(stack(each))
    for one, params in zip(found, each, strict=True):
        torch.testing.assert_close(one, edited(model, params)(X))
    assert stack([each[0], each[0]]).deltas[NAME].dtype == torch.bfloat16


def test_members_share_the_base_product_where_their_hidden_states_are_one():
    model = make("untied").requires_grad_(False)
    each = [random_rows(model, [7, 3], targets="lm_head") for _ in range(8)]

    def operations(call) -> int:
        with FlopCounterMode(display=False) as counter:
            call()
        return counter.get_total_flops()

    alone = operations(lambda: model(X))
    rows = 2 * X.numel() * D * 2  # a product of each hidden state with two rows
    together = operations(
        lambda: vmap(lambda p: functional_call(model, patch(p), (X,)))(stack(each))
    )
    assert together == alone + 8 * rows


def test_leaves_are_differentiable_by_those_of_the_adapters():
    each = [
        optree.tree_map(lambda t: t.requires_grad_(), p) for p in adapters(make("tied"), [1], [2])
    ]
    stack(each).deltas[NAME].sum().backward()
    for params in each:
        assert torch.equal(params.deltas[NAME].grad, torch.ones(1, D))


def test_what_does_not_stack_is_refused():
    model = make("tied")
    a, b = adapters(model, [1], [2])
    with pytest.raises(ValueError, match="no adapters"):
        stack([])
    with pytest.raises(TypeError, match="got int where the parameters"):
        stack([a, 3])
    with pytest.raises(ValueError, match=r"shape \(2, 1, 8\), and \(1, 8\) is needed"):
        stack([stack([a, a]), b])
    with pytest.raises(ValueError, match="were made from different models"):
        stack([a, *adapters(make("tied"), [2])])
    with pytest.raises(ValueError, match="were made from different models"):
        stack([a, init_deltas(make("untied"), [2], targets="lm_head")])
    with torch.no_grad():
        model.embed_tokens.weight[1] += 1
    with pytest.raises(ValueError, match="their originals of one token differ"):
        stack([a, init_deltas(model, [1, 4])])
    assert combine(stack([a, a]), stack([b, b])).deltas[NAME].shape == (2, 2, D)


def test_adapters_from_before_and_after_a_cast_stack():
    model = make("tied")
    before = init_deltas(model, [7], init="mean")
    model.to(torch.bfloat16)
    stacked = stack([before, init_deltas(model, [3], init="mean")])
    assert stacked.originals[NAME].dtype == torch.float32
    assert torch.equal(stacked.originals[NAME][0], before.originals[NAME][0])


def test_originals_stacked_inside_a_transform_outlive_it():
    model = make("tied")
    a, b = adapters(model, [1], [2])
    kept = []

    def loss(p: TokenDeltas) -> torch.Tensor:
        kept.append(stack([p, b]))
        return kept[0].deltas[NAME].sum()

    grad(loss)(a)
    assert kept[0].originals[NAME].equal(model.embed_tokens.weight[[1, 2]])


def test_adapters_in_float16_stack_under_bfloat16_autocast():
    model = make("tied").half()
    each = [init_deltas(model, [i], dtype=torch.float16) for i in (7, 3)]
    expected = stack(each)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(stack(each).deltas[NAME], expected.deltas[NAME])


@pytest.mark.parametrize("given", [None, 3])
def test_what_is_no_list_of_adapters_is_refused(given):
    with pytest.raises(TypeError, match="a list of TokenDeltas is needed, got"):
        stack(given)
    with pytest.raises(TypeError, match=r"got TokenDeltas. For one adapter give \[params\]"):
        stack(init_deltas(make("tied"), [1]))
