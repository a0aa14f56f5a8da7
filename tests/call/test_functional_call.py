"""functional_call: the four traps of torch's own, its arguments, and what it refuses."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from tests.helpers.models import D, Language, V, make, tokens
from tests.helpers.oracle import edited, snapshot
from tests.helpers.rows import random_rows
from ttfunc import functional_call, merge, patch

NAME = "embed_tokens.weight"
X = tokens(7, 3)


def test_a_module_reached_by_two_paths_is_restored():
    model = make("encoder_decoder")
    before = snapshot(model)
    weights = patch(random_rows(model))
    expected = edited(model, random_rows(model))(X)
    torch.testing.assert_close(functional_call(model, weights, (X,)), expected)
    assert snapshot(model) == before

    corrupted = copy.deepcopy(model)  # the trap itself: torch's own leaves its patch in the model
    plain = dict(corrupted.named_parameters())[NAME]
    torch.func.functional_call(corrupted, {NAME: torch.zeros(V, D)}, (X,))
    assert corrupted.embed_tokens.weight is not plain


def test_ties_are_kept_whatever_torch_is_told():
    """Torch's own with tie_weights=False leaves the other end of a tie as it is, without a word."""
    model = make("tied")
    params = random_rows(model)
    weights, expected = patch(params), edited(model, params)(X)
    torch.testing.assert_close(functional_call(model, weights, (X,)), expected)
    apart = torch.func.functional_call(model, weights, (X,), tie_weights=False)
    assert not torch.allclose(apart, expected)
    both = dict.fromkeys(params.tied[NAME], weights[NAME])
    torch.testing.assert_close(
        torch.func.functional_call(model, both, (X,), tie_weights=False), expected
    )


def test_a_misspelt_name_is_refused():
    model = make("tied")
    weight = patch(random_rows(model))[NAME]
    match = "Language has no parameter or buffer named 'embed_token.weight'.*mean 'embed_tokens"
    with pytest.raises(KeyError, match=match):
        functional_call(model, {"embed_token.weight": weight}, (X,))
    with pytest.raises(KeyError, match="no parameter or buffer named 'a.b.c'"):
        functional_call(model, {"a.b.c": torch.zeros(1)}, (X,))


@pytest.mark.parametrize("name", [NAME, "lm_head.weight"])
@pytest.mark.parametrize("case", ["tied", "storage_tied", "encoder_decoder"])
def test_any_name_of_a_tied_weight_swaps_all_of_them(case: str, name: str):
    model = make(case)
    weight = torch.randn(V, D)
    reference = copy.deepcopy(model)
    with torch.no_grad():
        reference.embed_tokens.weight.copy_(weight)
        reference.lm_head.weight.copy_(weight)
    assert torch.equal(functional_call(model, {name: weight}, (X,)), reference(X))
    every = dict.fromkeys((NAME, "lm_head.weight"), weight)
    assert torch.equal(functional_call(model, every, (X,)), reference(X))


@pytest.mark.parametrize("weights", [None, [1], torch.zeros(2)])
def test_weights_that_are_no_mapping_are_refused(weights):
    with pytest.raises(TypeError, match="weights must be a mapping from parameter names"):
        functional_call(make("tied"), weights, (X,))


def test_a_tied_weight_given_twice_is_refused():
    model = make("tied")
    before = snapshot(model)
    two = {NAME: torch.zeros(V, D), "lm_head.weight": torch.ones(V, D)}
    with pytest.raises(
        ValueError,
        match="^'embed_tokens.weight' and 'lm_head.weight' are one tied weight of Language. Give",
    ):
        functional_call(model, two, (X,))
    every = {**model.state_dict(), **patch(random_rows(model))}
    with pytest.raises(ValueError, match="are one tied weight.*leave out one") as error:
        functional_call(model, every, (X,))
    assert "body" not in error.value.args[0]
    assert snapshot(model) == before


def test_other_weights_and_buffers_go_along():
    model = make("tied")
    model.register_buffer("shift", torch.ones(V))
    model.register_forward_hook(lambda module, _, out: out + module.shift)
    weights = {**patch(random_rows(model)), "body.bias": torch.zeros(D), "shift": torch.zeros(V)}
    reference = edited(model, random_rows(model))
    nn.init.zeros_(reference.body.bias)
    nn.init.zeros_(reference.shift)
    torch.testing.assert_close(functional_call(model, weights, (X,)), reference(X))


def test_a_patch_works_under_the_names_of_a_wrapper():
    model = make("tied")
    wrapper = nn.Sequential(nn.Identity(), model)
    weights = {f"1.{name}": weight for name, weight in patch(random_rows(model)).items()}
    expected = functional_call(model, patch(random_rows(model)), (X,))
    assert torch.equal(functional_call(wrapper, weights, X), expected)
    with pytest.raises(ValueError, match="stale patch: the parameter '1.embed_tokens.weight'"):
        functional_call(nn.Sequential(nn.Identity(), make("tied")), weights, X)
    moved(model)
    with pytest.raises(ValueError, match="stale patch: the parameter '1.embed_tokens.weight'"):
        functional_call(wrapper, weights, X)


def test_a_shared_buffer_is_swapped_under_all_its_names_and_restored():
    model = make("tied")
    model.register_buffer("a", torch.ones(V))
    model.register_buffer("b", model.a)
    model.register_forward_hook(lambda module, _, out: out + module.a + module.b)
    before = snapshot(model)
    swapped = functional_call(model, {"b": torch.zeros(V)}, (X,))
    assert snapshot(model) == before
    torch.testing.assert_close(swapped, model(X) - 2)
    with pytest.raises(ValueError, match="'a' and 'b' are one tied weight"):
        functional_call(model, {"a": torch.zeros(V), "b": torch.ones(V)}, (X,))
    assert snapshot(model) == before


def test_a_buffer_over_the_matrix_is_patched_and_merged_with_it():
    model = make("tied")
    model.register_buffer("view", model.embed_tokens.weight.data)
    model.register_forward_hook(lambda module, _, out: out + module.view[7].sum())
    expected = edited(model, random_rows(model))
    # deepcopy keeps the memory shared.
    torch.testing.assert_close(functional_call(model, patch(random_rows(model)), (X,)), expected(X))
    merged = merge(model.state_dict(), random_rows(model))
    assert merged["view"] is merged[NAME]


def test_names_and_methods_are_strings():
    model = make("tied")
    with pytest.raises(TypeError, match="names of parameters to tensors, got 3"):
        functional_call(model, {3: torch.zeros(1)}, (X,))
    for method in (None, 3, "nothing", "training"):
        with pytest.raises(AttributeError, match=f"has no method {method!r} to call"):
            functional_call(model, {}, (X,), method=method)


def test_arguments_are_passed_as_torch_passes_them():
    class Echo(Language):
        def forward(self, *args, **kwargs):
            self.lm_head(self.embed_tokens(X))
            return args, kwargs

    model = Echo()
    weights = patch(random_rows(model))
    assert functional_call(model, weights) == ((), {})
    assert functional_call(model, weights, "one") == (("one",), {})
    assert functional_call(model, weights, ["one"]) == ((["one"],), {})
    assert functional_call(model, weights, (1, 2), {"three": 3}) == ((1, 2), {"three": 3})


def test_arguments_in_the_wrong_place_are_told():
    model = make("tied")
    weights = patch(random_rows(model))
    with pytest.raises(
        TypeError, match=r"got \['x'\]: keyword arguments of the model go in kwargs="
    ):
        functional_call(model, weights, x=X)
    with pytest.raises(TypeError, match=r"got Tensor. Several positional.*\(x, y\)"):
        functional_call(model, weights, X, X)
    with pytest.raises(TypeError, match="embedding") as caught:
        functional_call(model, weights, {"x": X})
    assert "with ['x'] as the one positional argument" in caught.value.__notes__[0]
    assert "kwargs={...}" in caught.value.__notes__[0]


def test_a_mapping_may_be_the_one_argument():
    class Taking(Language):
        def forward(self, batch: dict) -> torch.Tensor:
            return super().forward(batch["x"])

    model = Taking()
    found = functional_call(model, patch(random_rows(model)), {"x": X})
    torch.testing.assert_close(found, edited(model, random_rows(model))({"x": X}))


@pytest.mark.parametrize("how", ["rows", "neither", "eval", "no_grad", "unfrozen"])
def test_rows_that_stay_while_others_train_are_told(how: str):
    model = make("tied").requires_grad_(how == "unfrozen")
    model.body.weight.requires_grad_()  # a LoRA, say
    model.train(how != "eval")
    weights = patch(random_rows(model, requires_grad=how == "rows"))
    with torch.set_grad_enabled(how != "no_grad"):
        if how != "neither":
            functional_call(model, weights, (X,))
            return
        with pytest.warns(UserWarning, match="do not require grad.*requires_grad=True") as caught:
            functional_call(model, weights, (X,))
    assert caught[0].filename == __file__


def replaced(model: nn.Module) -> None:
    model.embed_tokens.weight = nn.Parameter(torch.zeros(V, D))


def resized(model: nn.Module) -> None:
    model.embed_tokens = nn.Embedding(V + 1, D)
    model.lm_head = nn.Linear(D, V + 1)


def refilled(model: nn.Module) -> None:
    # As transformers' resize_token_embeddings does: the same Parameter with other data.
    model.embed_tokens.weight.data = torch.zeros(V + 1, D)


def cast(model: nn.Module) -> None:
    model.to(torch.bfloat16)


def moved(model: nn.Module) -> None:
    model.embed_tokens.weight.data = torch.zeros(V, D)


def untied(model: nn.Module) -> None:
    model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach().clone())


def removed(model: nn.Module) -> None:
    model.lm_head = nn.Identity()


@pytest.mark.parametrize("dense", [False, True])
@pytest.mark.parametrize(
    ("change", "match"),
    [
        (replaced, r"stale patch: the parameter 'embed_tokens.weight'.*\(23, 8\).*was replaced"),
        (resized, r"stale patch.*another one, \(24, 8\).*init_deltas on this model"),
        (refilled, r"stale patch.*another one, \(24, 8\).*was resized, cast or moved since"),
        (moved, r"stale patch.*another one, \(23, 8\).*was resized, cast or moved since"),
        (cast, r"stale patch.*in torch.bfloat16 on cpu.*Call patch again"),
        (untied, "stale patch: the parameter 'lm_head.weight'"),
        (removed, "stale patch: the parameter 'lm_head.weight'.*is not there"),
    ],
)
def test_a_stale_patch_is_refused(change, match: str, dense: bool):
    model = make("tied")
    weights = patch(random_rows(model), dense=dense)
    change(model)
    before = snapshot(model)
    with pytest.raises(ValueError, match=match):
        functional_call(model, weights, (X,))
    assert snapshot(model) == before


def test_a_patch_of_another_model_is_refused():
    model = make("tied")
    other, match = copy.deepcopy(model), "stale patch.*another model than the Language.*a deep copy"
    with pytest.raises(ValueError, match=match):
        functional_call(other, patch(random_rows(model)), (X,))


def test_a_tie_made_since_is_refused():
    model = make("untied")
    weights = patch(random_rows(model))
    model.lm_head.weight = model.embed_tokens.weight
    with pytest.raises(ValueError, match="ties 'embed_tokens.weight' to more places than"):
        functional_call(model, weights, (X,))
