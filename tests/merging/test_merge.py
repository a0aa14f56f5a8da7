"""merge and unmerge, beside the laws: what they keep, and what they refuse."""

from __future__ import annotations

import collections
from types import MappingProxyType

import hypothesis.strategies as st
import numpy as np
import optree
import pytest
import torch
from hypothesis import given, settings
from torch import nn

from tests.helpers.llama import llama
from tests.helpers.models import D, V, make, tokens
from tests.helpers.oracle import same_bits
from tests.helpers.rows import random_rows
from ttfunc import functional_call, init_deltas, merge, patch, save, unmerge
from ttfunc.disk.rows_file import read

NAME = "embed_tokens.weight"


def test_the_rows_are_written_under_every_name():
    model = make("storage_tied")
    params, state = random_rows(model), model.state_dict()
    merged = merge(state, params)
    assert type(merged) is type(state) is collections.OrderedDict
    assert merged._metadata == state._metadata
    for name in (NAME, "lm_head.weight"):
        for row, token in enumerate([7, 3]):
            assert torch.equal(merged[name][token], params.deltas[NAME][row])
    assert merged[NAME] is merged["lm_head.weight"]
    assert merged["body.weight"] is state["body.weight"]


def test_a_file_that_keeps_one_name_of_a_tied_matrix_is_enough():
    model = make("tied")
    state = {n: t for n, t in model.state_dict().items() if n != "lm_head.weight"}
    merged = merge(state, random_rows(model))
    assert merged.keys() == state.keys()
    assert same_bits(unmerge(merged, random_rows(model)), state)


def test_copies_of_a_tied_matrix_are_each_written():
    model = make("tied")
    params = random_rows(model)
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    merged = merge(state, params)
    assert torch.equal(merged[NAME], merged["lm_head.weight"])
    assert merged[NAME] is not merged["lm_head.weight"]


def test_a_name_that_the_rows_do_not_know_follows_its_tensor():
    """A second way to the model, as a wrapper has that keeps a compiled one beside it."""
    model = make("untied")
    own = model.state_dict()
    state = {f"{way}.{name}": one for way in ("model", "compiled") for name, one in own.items()}
    merged = merge(state, random_rows(model), names={NAME: f"model.{NAME}"})
    assert merged[f"compiled.{NAME}"] is merged[f"model.{NAME}"]
    assert not torch.equal(merged[f"model.{NAME}"], model.embed_tokens.weight)
    assert merged["model.lm_head.weight"] is state["compiled.lm_head.weight"]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_the_rows_are_cast_to_the_dtype_of_the_state_dict(dtype: torch.dtype):
    model = make("tied")
    params = random_rows(model)
    merged = merge({n: t.to(dtype) for n, t in model.state_dict().items()}, params)
    assert merged[NAME].dtype == dtype
    assert torch.equal(merged[NAME][[7, 3]], params.deltas[NAME].to(dtype))


def test_a_merge_is_differentiable_by_the_rows():
    model, x = make("tied"), tokens(7, 3)
    params, state = random_rows(model), model.state_dict()

    def merged_loss(p):
        return torch.func.functional_call(model, merge(state, p), (x,)).pow(2).sum()

    found = torch.func.grad(merged_loss)(params).deltas[NAME]
    expected = torch.func.grad(lambda p: functional_call(model, patch(p), (x,)).pow(2).sum())(
        params
    )
    torch.testing.assert_close(found, expected.deltas[NAME], rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("write", [merge, unmerge])
def test_a_state_dict_that_does_not_fit_is_refused(write):
    model = make("tied")
    params = random_rows(model)
    prefixed = {f"model.{name}": tensor for name, tensor in model.state_dict().items()}
    with pytest.raises(KeyError, match="none of the names.*It begins with .'model.embed_tokens"):
        write(prefixed, params)
    state = model.state_dict()
    state["lm_head.weight"] = torch.zeros(V + 1, D)
    with pytest.raises(ValueError, match=r"'lm_head.weight'.*\(24, 8\).*made for \(23, 8\)"):
        write(state, params)
    assert torch.equal(state[NAME], model.embed_tokens.weight)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_rows_that_are_not_finite_are_refused_when_asked(bad: float):
    model = make("tied")
    params = random_rows(model)
    params.deltas[NAME][1, 2] = bad
    state = model.state_dict()
    with pytest.raises(ValueError, match=r"rows of tokens \[3\].*not finite in torch.float32"):
        merge(state, params, check_finite=True)
    assert not merge(state, params)[NAME].isfinite().all()
    assert state[NAME].isfinite().all()


def test_a_row_that_overflows_the_state_dict_is_not_finite():
    model = make("tied").half()
    params = optree.tree_map(lambda rows: rows + 1e5, random_rows(model))
    assert params.deltas[NAME].isfinite().all()
    with pytest.raises(ValueError, match=r"tokens \[7, 3\].*not finite in torch.float16"):
        merge(model.state_dict(), params, check_finite=True)


def test_a_merged_model_saves_and_loads(tmp_path):
    model = llama(layers=1)
    params, x = random_rows(model, requires_grad=True), tokens(7, 3)
    expected = functional_call(model, patch(params, dense=True), (x,)).logits
    with torch.no_grad():
        model.save_pretrained(tmp_path, state_dict=merge(model.state_dict(), params))
    loaded = type(model).from_pretrained(tmp_path)
    assert torch.equal(loaded(x).logits, expected)


def test_extra_state_that_is_no_tensor_goes_along():
    model = make("tied")
    state = {**model.state_dict(), "_extra_state": {"a": 1}}
    assert merge(state, random_rows(model))["_extra_state"] == {"a": 1}


def test_every_alias_must_be_finite():
    model = make("tied")
    params = optree.tree_map(lambda rows: rows + 1e6, random_rows(model))
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    state["lm_head.weight"] = state["lm_head.weight"].half()
    with pytest.raises(ValueError, match="not finite in torch.float16"):
        merge(state, params, check_finite=True)


def test_adapters_of_differently_tied_models_are_both_written_one_after_the_other():
    """Into two tensors; one would take the rows of the second adapter at both ends."""
    a = random_rows(make("tied"), [1])
    b = random_rows(make("untied", 1), [2], targets="lm_head")
    merged = merge(merge(apart(make("tied"), None), a), b)
    for name in (NAME, "lm_head.weight"):
        assert torch.equal(merged[name][1], a.deltas[NAME][0])
    assert torch.equal(merged["lm_head.weight"][2], b.deltas["lm_head.weight"][0])


@pytest.mark.parametrize("write", [merge, unmerge])
@pytest.mark.parametrize(
    ("state", "match"),
    [
        ([1], "a state dict is needed, got list"),
        ({NAME: np.zeros((V, D))}, "'embed_tokens.weight' in the state dict is ndarray"),
        ({NAME: torch.zeros(V, D, dtype=torch.int8)}, "is torch.int8.*Merge before quantising"),
    ],
)
def test_what_holds_no_rows_is_refused(write, state, match: str):
    with pytest.raises(TypeError, match=match):
        write(state, random_rows(make("tied")))


def test_any_mapping_is_merged_into_a_dict():
    state = make("tied").state_dict()
    params = random_rows(make("tied"))
    assert merge(MappingProxyType(state), params)[NAME].equal(merge(state, params)[NAME])


def test_stacked_rows_are_refused():
    params = optree.tree_map(lambda t: torch.stack([t, t]), random_rows(make("tied")))
    with pytest.raises(ValueError, match=r"shape \(2, 2, 8\), and \(2, 8\) is needed"):
        merge(make("tied").state_dict(), params)


@pytest.mark.parametrize(
    ("original", "state"),
    [("bfloat16", "float32"), ("bfloat16", "float16"), ("float16", "bfloat16"),
     ("float32", "float64"), ("float8_e4m3fn", "bfloat16"), ("float8_e4m3fn", "float8_e5m2")],
)  # fmt: skip
def test_a_wider_state_dict_is_merged_but_not_unmerged(original: str, state: str):
    params = random_rows(make("tied").to(getattr(torch, original)))
    wide = make("tied").to(getattr(torch, state)).state_dict()
    merged = merge(wide, params)
    with pytest.raises(ValueError, match=f"is in torch.{state}.*taken in torch.{original}"):
        unmerge(merged, params)


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_floats_of_eight_bits(dtype: torch.dtype):
    state = {name: tensor.to(dtype) for name, tensor in make("tied").state_dict().items()}
    params = random_rows(make("tied"))
    merged = merge(state, params, check_finite=True)
    assert same_bits(merged, edited_state(state, params))
    # Back to the rounding of the float32 rows, which is what was there.
    assert same_bits(unmerge(merged, params), state)


def edited_state(state, params):
    copied = {name: tensor.clone() for name, tensor in state.items()}
    for name, delta in params.deltas.items():
        for alias in params.tied[name]:
            for row, token in enumerate(params.token_indices[name].tolist()):
                copied[alias][token] = delta[row].to(copied[alias].dtype)
    return copied


# --- Tied names with other rows


def apart(model, change: str | None) -> dict[str, torch.Tensor]:
    """The state dict without identities; the rows under one name are others."""
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    if change:
        state[change][7] += 1
    return state


@pytest.mark.parametrize("change", [NAME, "lm_head.weight"])
def test_tied_names_that_hold_other_rows_are_warned_of(change: str):
    params, state = random_rows(make("tied")), apart(make("tied"), change)
    kept = ({NAME, "lm_head.weight"} - {change}).pop()
    with pytest.warns(
        UserWarning, match=rf"\['{change}'\] are not .* those in \['{kept}'\] are"
    ) as w:
        merged = merge(state, params)
    assert w[0].filename == __file__
    assert same_bits({NAME: merged[NAME]}, {NAME: merged["lm_head.weight"]})
    assert not same_bits(unmerge(merged, params), state)  # which is why


@pytest.mark.parametrize(
    "state",
    [
        lambda model: apart(model, None),
        lambda model: {n: t.half() for n, t in apart(model, None).items()},
        lambda model: {**apart(model, None), NAME: model.state_dict()[NAME].bfloat16()},
        lambda model: {n: t + 1 for n, t in apart(model, None).items()},
        lambda model: merge(apart(model, None), random_rows(model)),
        lambda model: {n: t.to("meta") for n, t in apart(model, None).items()},
        lambda model: {**apart(model, NAME), NAME: model.state_dict()[NAME].to("meta")},
        lambda model: apart(model, "body.weight"),
    ],
    ids=["same", "half", "one half", "another base", "merged", "meta", "one meta", "another"],
)
def test_what_is_no_reason_to_warn(state):
    model = make("tied")
    merge(state(model), random_rows(model))  # a warning would be an error


@pytest.mark.parametrize("case", ["tied", "untied"])
def test_tokens_that_another_adapter_has_written_are_warned_of(case: str):
    model = make(case)
    a, b = random_rows(model, [7, 3]), random_rows(model, [5, 7, 4], seed=1)
    once = merge(model.state_dict(), a)
    with pytest.warns(UserWarning, match=r"rows of tokens \[7\] in \['embed_tok.* merged before"):
        twice = merge(once, b)
    assert torch.equal(twice[NAME][[5, 7, 4]], b.deltas[NAME])
    assert not same_bits(unmerge(twice, b), once)  # which is why
    apart = random_rows(model, [5, 4], seed=1)
    assert same_bits(unmerge(merge(once, apart), apart), once)  # a warning would be an error
    params = init_deltas(model, [7, 3], targets="embed_tokens")  # of which one is trained
    params.deltas[NAME][0] += 1
    once = merge(model.state_dict(), params)
    assert same_bits(merge(once, params), once)


def test_rows_elsewhere_in_a_tied_matrix_may_differ():
    state = apart(make("tied"), None)
    state[NAME][8] += 1
    assert same_bits(
        unmerge(merge(state, random_rows(make("tied"))), random_rows(make("tied"))), state
    )


def test_transforms_and_traces_are_not_warned_in():
    """Where values can be had, they are compared; a state dict of a transform is not."""
    params, state = random_rows(make("tied")), apart(make("tied"), NAME)

    def loss(state):
        return merge(state, params)[NAME].sum()

    torch.func.grad(loss)(state)
    torch.func.vmap(loss)({name: torch.stack([t, t]) for name, t in state.items()})
    with torch._subclasses.FakeTensorMode(allow_non_fake_inputs=True) as mode:
        loss({name: mode.from_tensor(tensor) for name, tensor in state.items()})

    def of_rows(p):
        return merge(state, p)[NAME].sum()

    with pytest.warns(UserWarning, match="are not the originals"):
        torch.func.grad(of_rows)(params)


# What is as long as the vocabulary, beside the matrix


class Biased(nn.Module):
    """An untied model with one bias of the logits above both of its matrices, as BART's."""

    def __init__(self, height: int) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(height, D)
        self.lm_head = nn.Linear(D, height, bias=False)
        self.register_buffer("final_logits_bias", torch.randn(1, height))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.lm_head(self.embed_tokens(x)) + self.final_logits_bias


def test_a_bias_that_two_matrices_have_in_common_gets_longer_once(tmp_path):
    model, resized = Biased(V), Biased(V + 2)
    params = random_rows(model, [V, V + 1], grow=True)
    assert len(params.specs) == 2
    merged = merge(model.state_dict(), params)
    resized.load_state_dict(merged)
    x = tokens(V, V + 1)
    torch.testing.assert_close(resized(x), functional_call(model, patch(params), x))
    assert same_bits(unmerge(merged, params), model.state_dict())
    save(params, tmp_path / "rows")  # as well without the model
    assert same_bits(merge(model.state_dict(), read(tmp_path / "rows")), merged)


PLACES = st.sampled_from(["", "lm_head", "embed_tokens", "body"])
BUFFERS = st.dictionaries(
    st.tuples(PLACES, st.sampled_from(["bias", "final_logits_bias", "other"])),
    st.sampled_from([(V,), (V + 2,), (1, V), (1, V + 2), (3,)]),
)


@given(tie=st.booleans(), buffers=BUFFERS)
@settings(max_examples=40)
def test_every_entry_of_a_state_dict_is_given_back(tie: bool, buffers):
    model = make("tied" if tie else "untied")
    for (place, name), shape in buffers.items():
        module = model.get_submodule(place)
        if name not in module._parameters or module._parameters[name] is None:
            module._parameters.pop(name, None)
            module.register_buffer(name, torch.randn(shape))
    params = random_rows(model, [V, 7, V + 1], grow=True)
    state = model.state_dict()
    merged = merge(state, params)
    changed = {name for name in state if merged[name] is not state[name]}
    matrices = {name for spec in params.specs.values() for name in spec.names}
    assert all(name.endswith("bias") and state[name].shape[-1] == V for name in changed - matrices)
    assert same_bits(unmerge(merged, params), state)
