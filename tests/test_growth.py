"""New tokens: a matrix with more rows than the model has, which stays as it is.

The reference is a copy of the model whose matrices, and the biases of its logits, are longer.
"""

from __future__ import annotations

import copy
from typing import Any

import optree
import peft
import pytest
import torch
import transformers
from torch import nn
from torch.func import grad, jvp, vmap

from tests.helpers.llama import llama
from tests.helpers.models import CORPUS, D, V, loss_of, make, tokens
from tests.helpers.oracle import edited, row_gradients, same_bits, snapshot
from tests.helpers.rows import random_rows
from ttfunc import (
    TokenDeltas,
    TokenModule,
    combine,
    functional_call,
    init_deltas,
    load,
    load_peft,
    merge,
    patch,
    patch_mixed,
    save,
    save_peft,
    stack,
    unmerge,
)

NEW = [V, 7, V + 1]
X = tokens(7, V, V + 1, 3)
NAME = "embed_tokens.weight"


def grown(model: nn.Module, idx: object = tuple(NEW), seed: int = 0, **options: Any) -> TokenDeltas:
    return random_rows(model, list(idx), seed, grow=True, **options)


def lengthened(model: nn.Module, params: TokenDeltas, height: int = V) -> nn.Module:
    """A copy with the new rows at the end of each matrix, and zeros at the end of its biases."""
    model = copy.deepcopy(model)
    made: dict[int, nn.Parameter] = {}
    for module in model.modules():
        for name, held in list(module._parameters.items()):
            if held is not None and len(held) == height:
                longer = torch.cat([held, torch.zeros(2, *held.shape[1:])])
                made.setdefault(id(held), nn.Parameter(longer.detach()))
                module._parameters[name] = made[id(held)]
    return edited(model, params)


@pytest.mark.parametrize("dense", [False, True])
@pytest.mark.parametrize("case", CORPUS)
def test_a_call_with_new_tokens_is_that_of_a_longer_model(case: str, dense: bool):
    model = make(case)
    params = grown(model, requires_grad=True)
    reference, before = lengthened(model, params), snapshot(model)
    expected = reference(X)
    loss_of(expected).backward()
    for _ in range(2):
        logits = functional_call(model, patch(params, dense=dense), X)
        assert logits.shape == (*X.shape, V + 2)
        torch.testing.assert_close(logits, expected)
    found = torch.autograd.grad(loss_of(logits), list(params.deltas.values()))
    wanted = row_gradients(reference, params)
    for gradient, name in zip(found, params.deltas, strict=True):
        torch.testing.assert_close(gradient, wanted[name])
    assert snapshot(model) == before


@pytest.mark.parametrize("case", ["tied", "untied", "biased", "masked", "storage_tied"])
def test_a_merged_state_dict_is_that_of_a_longer_model_and_goes_back(case: str):
    model = make(case)
    params, state = grown(model), model.state_dict()
    merged = merge(state, params)
    assert same_bits(merged, lengthened(model, params).state_dict())
    assert same_bits(unmerge(merged, params), state)
    assert merge(unmerge(merged, params), params).keys() == state.keys()


@pytest.mark.parametrize("case", ["tied", "untied", "biased"])
def test_transforms(case: str):
    model = make(case).requires_grad_(False)
    first, second = grown(model), grown(model, seed=1)

    def loss(params: TokenDeltas) -> torch.Tensor:
        return loss_of(functional_call(model, patch(params), X))

    def dense(params: TokenDeltas) -> torch.Tensor:
        return loss_of(functional_call(model, patch(params, dense=True), X))

    def close(a: Any, b: Any) -> None:
        optree.tree_map(torch.testing.assert_close, a, b)

    close(grad(loss)(first), grad(dense)(first))
    close(jvp(loss, (first,), (second,)), jvp(dense, (first,), (second,)))
    both = stack([first, second])
    close(vmap(grad(loss))(both), stack([grad(loss)(first), grad(loss)(second)]))
    close(jvp(grad(loss), (first,), (second,)), jvp(grad(dense), (first,), (second,)))
    compiled = torch.compile(grad(loss), fullgraph=True, backend="aot_eager")
    close(compiled(first), grad(dense)(first))


@pytest.mark.parametrize("case", ["tied", "biased"])
def test_examples_with_new_rows_of_their_own(case: str):
    model = make(case).requires_grad_(False)
    each = [grown(model, seed=seed) for seed in range(2)]
    mixed = functional_call(model, patch_mixed(each, [1, 0, 1]), X)
    for row, adapter in enumerate([1, 0, 1]):
        alone = functional_call(model, patch(each[adapter]), X[row : row + 1])
        torch.testing.assert_close(mixed[row : row + 1], alone)
    with pytest.raises(
        ValueError, match="2 new tokens .* which the plain model .-1. does not have"
    ):
        patch_mixed(each, [-1, 0, 1])
    with pytest.raises(ValueError, match=r"have \[2, 1\] new tokens .* the same new ids"):
        patch_mixed([each[0], grown(model, [V])], [0, 1, 1])
    with pytest.raises(ValueError, match=r"have \[2, 0\] new tokens .* the same new ids"):
        stack([each[0], random_rows(model)])


@pytest.mark.parametrize("tie", [True, False])
def test_a_llama_is_that_which_was_resized(tie: bool):
    model = llama(tie=tie)
    x = X.clamp(min=3)  # no padding
    params = init_deltas(model, NEW, grow=True, init="normal", requires_grad=True)
    assert len(params.deltas) == (1 if tie else 2)  # both ends grow
    resized = copy.deepcopy(model)
    resized.resize_token_embeddings(V + 2, mean_resizing=False)
    resized = edited(resized, params)
    config = model.config.to_dict()
    ours = functional_call(model, patch(params), x, {"labels": x})
    theirs = resized(x, labels=x)
    torch.testing.assert_close(ours.logits, theirs.logits)
    torch.testing.assert_close(ours.loss, theirs.loss)
    torch.testing.assert_close(TokenModule(model, params)(x, labels=x).loss, theirs.loss)
    options = {"max_new_tokens": 4, "do_sample": False, "num_beams": 2}
    made = functional_call(model, patch(params), (x,), options, method="generate")
    assert torch.equal(made, resized.generate(x, **options))
    assert model.config.to_dict() == config
    assert same_bits(merge(model.state_dict(), params), resized.state_dict())


def test_a_bias_of_new_tokens_may_be_given():
    model = make("biased")
    params = grown(model)
    reference = lengthened(model, params)
    bias = torch.cat([model.lm_head.bias.detach(), torch.tensor([0.5, -2.0])])
    reference.lm_head.bias.data.copy_(bias)
    logits = functional_call(model, {**patch(params), "lm_head.bias": bias}, X)
    torch.testing.assert_close(logits, reference(X))
    with pytest.raises(ValueError, match=r"'lm_head.bias' has shape \(26,\), but .* \(23,\)"):
        functional_call(model, {**patch(params), "lm_head.bias": torch.zeros(26)}, X)


def test_a_file_of_new_rows(tmp_path):
    model = make("tied")
    params, path = grown(model), tmp_path / "rows"
    save(params, path)
    loaded = load(path, model)
    assert loaded.specs == params.specs
    assert same_bits(loaded.deltas, params.deltas)
    torch.testing.assert_close(
        functional_call(model, patch(loaded), X), functional_call(model, patch(params), X)
    )
    # A model that was resized meanwhile has these tokens: they are replaced.
    resized = lengthened(model, grown(model, [V, V + 1], seed=5))
    again = load(path, resized)
    assert again.specs[NAME].grown == 0
    state = resized.state_dict()
    assert same_bits(unmerge(merge(state, again), again), state)
    torch.testing.assert_close(
        functional_call(resized, patch(again), X), functional_call(model, patch(params), X)
    )


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")  # PEFT asks for it
def test_a_peft_adapter_of_new_tokens_is_for_a_model_that_was_resized(tmp_path):
    model = llama()
    params = random_rows(model, NEW, grow=True)
    save_peft(params, tmp_path / "adapter")
    resized = copy.deepcopy(model)
    resized.resize_token_embeddings(V + 2, mean_resizing=False)
    expected = functional_call(model, patch(params), X).logits
    loaded = load_peft(tmp_path / "adapter", resized)
    torch.testing.assert_close(functional_call(resized, patch(loaded), X).logits, expected)
    theirs = peft.PeftModel.from_pretrained(resized, tmp_path / "adapter").eval()
    torch.testing.assert_close(theirs(X).logits, expected)
    with pytest.raises(ValueError, match=r"\[23, 24\] are past the end"):
        load_peft(tmp_path / "adapter", model)


def test_one_tensor_for_a_matrix_that_grows_and_one_that_does_not_is_refused():
    """Two tensors take both."""
    model = make("untied")
    state = model.state_dict()
    state["lm_head.weight"] = state[NAME]
    params = combine(
        random_rows(model, NEW, targets="embed_tokens", grow=True),
        random_rows(model, [3], targets="lm_head"),
    )
    with pytest.raises(ValueError, match=r"one tensor.*was another matrix when the rows were made"):
        merge(state, params)
    merged = merge(model.state_dict(), params)
    assert torch.equal(merged[NAME][NEW], params.deltas[NAME])
    assert torch.equal(merged["lm_head.weight"][3], params.deltas["lm_head.weight"][0])


def test_where_new_rows_start():
    model = make("tied")
    mean = model.embed_tokens.weight.detach().mean(0)
    rows = init_deltas(model, NEW, grow=True).deltas[NAME]
    torch.testing.assert_close(rows, torch.stack([mean, model.embed_tokens.weight[7], mean]))
    for init in ("mean", "normal", torch.ones(3, D), lambda base, ids: base[ids % V]):
        params = init_deltas(model, NEW, grow=True, init=init)
        assert params.deltas[NAME].shape == (3, D)
        assert params.originals[NAME][[0, 2]].count_nonzero() == 0


def test_new_ids_that_cannot_be():
    model = make("tied")
    with pytest.raises(IndexError, match=r"\[23\] are past the end.*grow=True"):
        init_deltas(model, [V])
    with pytest.raises(IndexError, match=r"\[24\].*leave out 23.*Give all ids from 23 on"):
        init_deltas(model, [7, V + 1], grow=True)
    with pytest.raises(IndexError, match=r"\[23, 25\].*leave out 24"):
        init_deltas(model, [V, V + 2], grow=True)
    with pytest.raises(IndexError, match="leave out 23"):
        init_deltas(model, [2**62], grow=True)
    a, b = grown(model), grown(model, [V])
    with pytest.raises(ValueError, match=r"\[23\] are in more than one"):
        combine(a, b)
    with pytest.raises(IndexError, match="out of range"):  # torch's, of a token that nobody has
        functional_call(model, patch(a), tokens(V + 2))


@pytest.mark.parametrize("case", ["tied", "untied", "biased"])
def test_new_tokens_that_follow_on_earlier_ones(case, tmp_path):
    model = make(case)
    first, state = grown(model), model.state_dict()
    then = random_rows(model, [V + 3, 5, V + 2], 1, grow=first)
    both, x = combine(first, then), tokens(7, V, V + 3, V + 1, 5, V + 2)
    expected = functional_call(lengthened(lengthened(model, first), then, V + 2), {}, x)
    for weights in (patch(first, then), patch(then, first), patch(both), patch(both, dense=True)):
        torch.testing.assert_close(functional_call(model, weights, x), expected)

    merged = merge(merge(state, first), then)
    assert same_bits(merged, merge(state, both))
    assert same_bits(unmerge(merged, then), merge(state, first))
    assert same_bits(unmerge(unmerge(merged, then), first), state)
    assert same_bits(unmerge(merged, both), state)

    save(then, tmp_path / "then.safetensors")
    loaded = load(tmp_path / "then.safetensors", model)
    torch.testing.assert_close(functional_call(model, patch(first, loaded), x), expected)
    taller = lengthened(model, first)  # that was merged in the meantime
    again = load(tmp_path / "then.safetensors", taller)
    assert [spec.follows for spec in again.specs.values()] == [0] * len(first.specs)
    torch.testing.assert_close(functional_call(taller, patch(again), x), expected)


def test_new_tokens_that_follow_on_earlier_ones_are_nothing_without_them():
    model = make("tied")
    first = grown(model)
    then = random_rows(model, [V + 2], grow=first)
    match = r"leave out token 23.*combine\(first, these\), or patch\(first, these\)"
    for use in (
        lambda: patch(then),
        lambda: patch_mixed([then], [0]),
        lambda: vmap(lambda params: patch(params)[NAME].sum())(stack([then])),
        lambda: TokenModule(model.requires_grad_(False), then),
    ):
        with pytest.raises(ValueError, match=match):
            use()
    with pytest.raises(ValueError, match=r"shape \(23, 8\), and the parameters were made for \(25"):
        merge(model.state_dict(), then)
    between = random_rows(model, [V + 3], grow=combine(first, then))
    apart = combine(then, random_rows(model, [V + 4], grow=between))
    with pytest.raises(ValueError, match="leave out token 26"):
        merge(merge(model.state_dict(), first), apart)
    with pytest.raises(ValueError, match=r"have \['1 after 2', 2\] new tokens"):
        stack([then, first])
    with pytest.raises(IndexError, match=r"\[24\] .* are of the parameters .* from 25"):
        init_deltas(model, [V + 1, V + 2], grow=first)
    with pytest.raises(IndexError, match=r"\[26\].* leave out 25"):
        init_deltas(model, [V + 3], grow=first)
    with pytest.raises(TypeError, match="grow is a list: give True"):
        init_deltas(model, [V], grow=[V])  # type: ignore[arg-type]


def test_no_new_ids_grow_nothing():
    params = init_deltas(llama(tie=False), iter([7, 3]), grow=True)
    assert {name: spec.grown for name, spec in params.specs.items()} == {f"model.{NAME}": 0}
    both = init_deltas(llama(tie=False), iter([7, V]), grow=True)
    assert [spec.grown for spec in both.specs.values()] == [1, 1]


def test_a_compiled_model():
    model = make("tied").requires_grad_(False)
    params, compiled = grown(model), torch.compile(model, backend="eager")
    weights = {f"_orig_mod.{name}": weight for name, weight in patch(params).items()}
    expected = lengthened(model, params)(X)
    torch.testing.assert_close(functional_call(compiled, weights, X), expected)


def test_one_end_of_an_untied_model_is_refused():
    model = llama(tie=False)
    match = r"would have \{'model.embed_tokens': 25, 'lm_head': 23\} rows.*targets=\['model.embed"
    with pytest.raises(ValueError, match=match):
        init_deltas(model, [V, V + 1], targets="embed_tokens", grow=True)
    with pytest.raises(ValueError, match=r"\{'model.embed_tokens': 24, 'lm_head': 25\}"):
        init_deltas(model, {"embed_tokens": [V], "lm_head": [V, V + 1]}, grow=True)


def test_a_model_that_bounds_its_vocabulary_elsewhere_is_told_of():
    class Bounded(CORPUS["tied"]):  # type: ignore[misc]
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x) * torch.ones(V)

    model = Bounded()
    with pytest.raises(RuntimeError, match="must match the size") as caught:
        functional_call(model, patch(grown(model)), X)
    assert "bounds its vocabulary elsewhere" in caught.value.__notes__[0]


def test_a_config_is_one_in_all_modules_of_the_call():
    config = transformers.LlamaConfig(vocab_size=V)
    seen = []

    class Inner(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.config = config
            self.embed_tokens = nn.Embedding(V, D)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            seen.append(self.config)
            return self.embed_tokens(x)

    model = nn.Sequential(Inner())
    model.config, model.forward = config, lambda x: nn.Sequential.forward(model, x)
    params = random_rows(model, NEW, grow=True)
    functional_call(model, patch(params), X)
    assert seen[0] is not config
    assert (seen[0].vocab_size, config.vocab_size) == (V + 2, V)
    assert seen[0].hidden_size == config.hidden_size
