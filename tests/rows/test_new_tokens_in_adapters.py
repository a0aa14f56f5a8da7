"""New tokens of a model with an adapter of PEFT at one of its ends.

The reference is the adapter made anew on a model that was resized, with zeros where its tensors are
longer there: what an adapter learnt says nothing of a token that it has never seen.
"""

from __future__ import annotations

import copy
from functools import partial
from typing import Any

import optree
import pytest
import torch
from peft import (
    AdaLoraConfig,
    FourierFTConfig,
    IA3Config,
    LoHaConfig,
    LoraConfig,
    OFTConfig,
    PeftModel,
    VeraConfig,
)
from peft import get_peft_model as with_adapter
from torch import Tensor, nn
from torch.func import grad, vmap

from tests.helpers.llama import llama
from tests.helpers.models import D, Language, V, loss_of, make, tokens
from tests.helpers.oracle import edited, row_gradients, same_bits, snapshot
from tests.helpers.rows import random_rows
from ttfunc import (
    TokenDeltas,
    TokenModule,
    functional_call,
    init_deltas,
    load,
    merge,
    merge_checkpoint,
    patch,
    patch_mixed,
    save,
    stack,
    unmerge,
)

pytestmark = [
    pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is:FutureWarning"),
    pytest.mark.filterwarnings("ignore:.lora_bias=True. was passed:peft.utils.warning.PeftWarning"),
    pytest.mark.filterwarnings("ignore:Model has .tie_word_embeddings=True. and:UserWarning"),
]

NEW = [V, 7, V + 1]
X = tokens(7, V, V + 1, 3).clamp(min=3)
ENDS = {
    "the head": {"target_modules": ["lm_head", "q_proj"]},
    "the embedding": {"target_modules": ["embed_tokens"]},
    "both": {"target_modules": ["embed_tokens", "lm_head"]},
    "the head, with a bias": {"target_modules": ["lm_head"], "lora_bias": True},
    "the embedding, with magnitudes": {"target_modules": ["embed_tokens"], "use_dora": True},
    "rows of PEFT's own": {"target_modules": ["lm_head"], "trainable_token_indices": [4]},
}


def filled(model: PeftModel, seed: int = 5) -> PeftModel:
    """With adapters that do something, and dropout left out."""
    torch.manual_seed(seed)
    for parameter in model.parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter, std=0.3)
    return model.eval()


def longer(tensor: Tensor, like: Tensor) -> Tensor:
    made = torch.zeros_like(like)
    made[tuple(map(slice, tensor.shape))] = tensor.detach()
    return made


def resized(model: PeftModel, plain: Any, params: TokenDeltas, config: Any) -> PeftModel:
    """The adapter of a model, made anew on the plain model with two more tokens."""
    plain = copy.deepcopy(plain)
    if isinstance(plain, Language):
        for module in (plain.embed_tokens, plain.lm_head):
            module.weight = nn.Parameter(longer(module.weight, torch.empty(V + 2, D)))
        plain.lm_head.out_features = V + 2
    else:
        plain.resize_token_embeddings(V + 2, mean_resizing=False)
        assert plain.get_input_embeddings().weight.shape == (V + 2, D)
    made = with_adapter(plain, copy.deepcopy(config))
    known = dict(model.named_parameters(remove_duplicate=False))
    with torch.no_grad():
        for name, parameter in made.named_parameters(remove_duplicate=False):
            parameter.copy_(longer(known[name], parameter))
    return edited(made, params).eval()


def adapter_gradients(model: nn.Module) -> dict[str, Tensor]:
    return {n: p.grad for n, p in model.named_parameters() if p.grad is not None and "lora_" in n}


def check_gradients(ours: PeftModel, theirs: PeftModel) -> None:
    wanted, found = adapter_gradients(theirs), adapter_gradients(ours)
    assert found
    for name, gradient in found.items():
        full = wanted[name]
        torch.testing.assert_close(gradient, full[tuple(map(slice, gradient.shape))])


@pytest.mark.parametrize("tie", [True, False])
@pytest.mark.parametrize("end", ENDS)
def test_an_adapter_adds_nothing_to_new_tokens(end: str, tie: bool):
    plain, config = llama(tie=tie), LoraConfig(r=2, **ENDS[end])
    model = filled(with_adapter(copy.deepcopy(plain), config))
    params = random_rows(model, NEW, grow=True, requires_grad=True)
    assert len(params.deltas) == (1 if tie else 2)
    theirs, before = resized(model, plain, params, config), snapshot(model)
    for one in theirs.parameters():
        one.requires_grad_()
    expected = theirs(X, labels=X)
    expected.loss.backward()
    for options in ({}, {"dense": True}, {"deferred_logits": True}):
        model.zero_grad()
        weights = patch(params, **options)
        out = functional_call(model, weights, kwargs={"input_ids": X, "labels": X})
        out.loss.backward()
        torch.testing.assert_close(out.logits, expected.logits)
        torch.testing.assert_close(out.loss, expected.loss)
        for name, wanted in row_gradients(theirs, params).items():
            torch.testing.assert_close(params.deltas[name].grad, wanted)
            params.deltas[name].grad = None
        check_gradients(model, theirs)
    model.zero_grad()
    assert snapshot(model) == before
    options = {"max_new_tokens": 4, "do_sample": False, "num_beams": 2}
    said = functional_call(model, patch(params), (X,), options, method="generate")
    assert torch.equal(said, theirs.generate(X, **options))


@pytest.mark.parametrize("tie", [True, False])
def test_a_new_token_is_said(tie: bool):
    config = LoraConfig(r=2, target_modules=["lm_head"])
    model = filled(with_adapter(llama(tie=tie), config))
    params = init_deltas(model, [V], grow=True)
    states = model(X % V, output_hidden_states=True).hidden_states[-1]
    head = list(params.deltas.values())[-1]
    head.copy_(100 * states[:1, -1].sign())
    options = {"max_new_tokens": 1, "do_sample": False}
    said = functional_call(model, patch(params), (X[:1] % V,), options, method="generate")
    assert said[0, -1] == V


@pytest.mark.parametrize("tie", [True, False])
@pytest.mark.parametrize("end", ["the head", "both"])
def test_a_module_trains_both(end: str, tie: bool):
    plain, config = llama(tie=tie), LoraConfig(r=2, **ENDS[end])
    model = filled(with_adapter(copy.deepcopy(plain), config))
    params = random_rows(model, NEW, grow=True, requires_grad=True)
    theirs = resized(model, plain, params, config)
    module = TokenModule(model, params, train_base=True).train()
    again = copy.deepcopy(module)  # with parameters of its own for the adapter
    expected = theirs(X, labels=X).loss
    expected.backward()
    for one in (module, again):
        loss = one(X, labels=X).loss
        loss.backward()
        torch.testing.assert_close(loss, expected)
    check_gradients(model, theirs)
    copied = {name: p.grad for name, p in again.named_parameters() if "lora_" in name}
    for name, gradient in ((n, p.grad) for n, p in module.named_parameters() if "lora_" in n):
        torch.testing.assert_close(copied[name], gradient)


@pytest.mark.parametrize("tie", [True, False])
@pytest.mark.parametrize("end", ENDS)
def test_a_merged_state_dict_is_that_of_a_longer_model_and_goes_back(end: str, tie: bool):
    plain, config = llama(tie=tie), LoraConfig(r=2, **ENDS[end])
    model = filled(with_adapter(copy.deepcopy(plain), config))
    params, state = random_rows(model, NEW, grow=True), model.state_dict()
    merged = merge(state, params)
    assert same_bits(merged, resized(model, plain, params, config).state_dict())
    assert same_bits(unmerge(merged, params), state)


def test_adapters_that_are_switched():
    plain, config = llama(tie=False), LoraConfig(r=2, **ENDS["both"])
    model = filled(with_adapter(copy.deepcopy(plain), config))
    model.add_adapter("magnitudes", LoraConfig(r=3, target_modules=["lm_head"], use_dora=True))
    params = random_rows(model, NEW, grow=True)
    with_one = resized_alone(model, plain, params, config)(X).logits
    weights = patch(params)
    torch.testing.assert_close(functional_call(model, weights, X).logits, with_one)
    with model.disable_adapter():
        without = functional_call(model, weights, X).logits
    bare = functional_call(plain, patch(onto(plain, params)), X).logits
    torch.testing.assert_close(without, bare)
    model.set_adapter("magnitudes")
    with pytest.raises(ValueError, match=r"lora_magnitude_vector.magnitudes.weight' \(23,\), of"):
        functional_call(model, weights, X)
    model.set_adapter("default")
    torch.testing.assert_close(functional_call(model, weights, X).logits, with_one)


def resized_alone(model: PeftModel, plain: Any, params: TokenDeltas, config: Any) -> PeftModel:
    only = with_adapter(copy.deepcopy(plain), copy.deepcopy(config))
    only.load_state_dict(model.state_dict(), strict=False)
    return resized(only, plain, params, config)


def onto(model: nn.Module, params: TokenDeltas) -> TokenDeltas:
    """The same rows for the model that is in a PeftModel."""
    made = init_deltas(model, NEW, grow=True)
    for delta, start in zip(made.deltas.values(), params.deltas.values(), strict=True):
        delta.copy_(start)
    return made


def test_an_adapter_that_is_merged():
    model = filled(with_adapter(llama(tie=False), LoraConfig(r=2, **ENDS["the head"])))
    merged = copy.deepcopy(model).merge_and_unload()
    model.merge_adapter()
    params = random_rows(model, NEW, grow=True)
    rows = onto(merged, params)
    merged.resize_token_embeddings(V + 2, mean_resizing=False)
    expected = edited(merged, rows)(X).logits
    torch.testing.assert_close(functional_call(model, patch(params), X).logits, expected)


REFUSED = {
    "magnitudes": (LoraConfig(r=2, target_modules=["lm_head"], use_dora=True), "magnitude"),
    "scales": (IA3Config(target_modules=["lm_head"], feedforward_modules=[]), "ia3_l"),
    "Hadamard": (LoHaConfig(target_modules=["lm_head"], r=2), "hada_w1_a"),
    "vectors": (VeraConfig(target_modules=["lm_head"], r=2), "vera_lambda_b"),
    # Its matrix of another size would be another one, although no part of it has V numbers.
    "a spectrum": (FourierFTConfig(target_modules=["lm_head"], n_frequency=20), "fourierft_spec"),
}


@pytest.mark.parametrize("name", REFUSED)
@pytest.mark.parametrize("targets", [None, ["embed_tokens", "lm_head"]])
def test_an_adapter_with_numbers_of_its_own_for_each_token_is_refused(name: str, targets: Any):
    config, tensor = REFUSED[name]
    plain = llama(tie=False)
    model = filled(with_adapter(copy.deepcopy(plain), copy.deepcopy(config)))
    with pytest.raises(ValueError, match=rf"{tensor}.*lm_head.base_layer'.* resize the model"):
        init_deltas(model, NEW, targets=targets, grow=True)
    rows = random_rows(model, [3, 7], targets=["embed_tokens", "lm_head"])  # of tokens that it has
    assert functional_call(model, patch(rows), X % V).logits.shape[-1] == V
    # Or before the call, where it was added later.
    rows = random_rows(plain, NEW, grow=True)
    later = filled(with_adapter(plain, copy.deepcopy(config)))
    with pytest.raises(ValueError, match=tensor):
        functional_call(later, patch(rows), X)


@pytest.mark.parametrize(
    "config",
    [
        OFTConfig(target_modules=["lm_head"], oft_block_size=4),
        AdaLoraConfig(target_modules=["lm_head"], init_r=2, total_step=9),
    ],
)
def test_adapters_of_the_hidden_states_and_of_other_ranks(config: Any):
    plain = llama(tie=False)
    model = filled(with_adapter(copy.deepcopy(plain), config))
    params = random_rows(model, NEW, grow=True)
    expected = resized(model, plain, params, config)(X).logits
    torch.testing.assert_close(functional_call(model, patch(params), X).logits, expected)


def test_an_adapter_that_is_added_after_the_rows():
    plain = llama(tie=False)
    params = random_rows(plain, NEW, grow=True)
    copied = copy.deepcopy(plain)
    config = LoraConfig(r=2, **ENDS["both"])
    model = filled(with_adapter(plain, config))
    late = random_rows(model, NEW, grow=True)
    expected = resized(model, copied, late, config)(X).logits
    torch.testing.assert_close(functional_call(model, patch(params), X).logits, expected)


def test_a_model_that_names_no_head():
    plain, config = make("untied"), LoraConfig(r=2, target_modules=["lm_head"])
    model = filled(with_adapter(copy.deepcopy(plain), config))
    params, x = random_rows(model, NEW, grow=True), tokens(7, V, V + 1, 3)
    expected = resized(model, plain, params, config)(x)
    torch.testing.assert_close(functional_call(model, patch(params), x), expected)


def test_parts_that_are_given():
    model = filled(with_adapter(llama(tie=False), LoraConfig(r=2, **ENDS["the head"])))
    params = random_rows(model, NEW, grow=True)
    name = "base_model.model.lm_head.lora_B.default.weight"
    expected = functional_call(model, patch(params), X).logits
    other = torch.randn(V, 2)
    given = functional_call(model, {**patch(params), name: other}, X).logits
    model.get_submodule(name.removesuffix(".weight")).weight.data.copy_(other)
    torch.testing.assert_close(functional_call(model, patch(params), X).logits, given)
    assert given.shape == (*X.shape, V + 2)
    assert not torch.allclose(given, expected)


def test_a_whole_copy_of_an_embedding_that_other_paths_lead_to_is_refused():
    config = LoraConfig(r=2, target_modules=["body"], modules_to_save=["embed_tokens"])
    model = with_adapter(make("encoder_decoder"), config)
    with pytest.raises(ValueError, match="whole copy of 'base_model.model.embed_tokens'"):
        init_deltas(model, NEW, grow=True)


@pytest.mark.parametrize("tie", [True, False])
def test_a_whole_copy_of_the_head_is_refused(tie: bool):
    plain = llama(tie=tie)
    config = LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["lm_head"])
    model = filled(with_adapter(copy.deepcopy(plain), config))
    with pytest.raises(ValueError, match="whole copy of the head '.*lm_head' .modules_to_save"):
        init_deltas(model, NEW, grow=True)
    with pytest.raises(
        ValueError, match=r"lm_head': 23\} rows: a new token needs one at both ends"
    ):
        init_deltas(model, NEW, targets="embed_tokens", grow=True)
    rows = random_rows(model, [7, 3])  # of tokens that it has
    theirs = edited(model, rows)(X % V).logits
    torch.testing.assert_close(functional_call(model, patch(rows), X % V).logits, theirs)
    # It may be made after the rows.
    params = random_rows(plain, NEW, grow=True)
    later = filled(with_adapter(plain, config))
    match = "can never say one" if tie else "did not read the patched matrix"
    with pytest.warns(UserWarning, match=match):
        functional_call(later, patch(params), X)


def test_a_file_of_rows_beside_an_adapter_goes_into_the_folder_of_the_model(tmp_path):
    plain = llama(tie=False)
    plain.save_pretrained(tmp_path / "plain")
    model = filled(with_adapter(copy.deepcopy(plain), LoraConfig(r=2, **ENDS["both"])))
    params = random_rows(model, NEW, grow=True)
    save(params, tmp_path / "rows")
    merge_checkpoint(tmp_path / "plain", tmp_path / "rows", tmp_path / "merged")
    merged = type(plain).from_pretrained(tmp_path / "merged").eval()
    with model.disable_adapter():
        expected = functional_call(model, patch(params), X).logits
    torch.testing.assert_close(merged(X).logits, expected)
    torch.testing.assert_close(
        functional_call(plain, patch(load(tmp_path / "rows", plain)), X).logits, expected
    )


@pytest.mark.parametrize("tie", [True, False])
def test_transforms(tie: bool):
    plain = llama(tie=tie, attn_implementation="eager")
    model = filled(with_adapter(plain, LoraConfig(r=2, **ENDS["both"]))).requires_grad_(False)
    each = [random_rows(model, NEW, seed, grow=True) for seed in range(2)]

    def loss(params: TokenDeltas, dense: bool = True) -> Tensor:
        return loss_of(functional_call(model, patch(params, dense=dense), X).logits)

    wanted = [grad(loss)(params) for params in each]
    found = vmap(grad(partial(loss, dense=False)))(stack(each))
    optree.tree_map(torch.testing.assert_close, found, stack(wanted))
    compiled = torch.compile(grad(partial(loss, dense=False)), fullgraph=True, backend="aot_eager")
    optree.tree_map(torch.testing.assert_close, compiled(each[0]), wanted[0])
    mixed = functional_call(model, patch_mixed(each, [1, 0, 1]), X).logits
    for row, adapter in enumerate([1, 0, 1]):
        alone = functional_call(model, patch(each[adapter]), X[row : row + 1]).logits
        torch.testing.assert_close(mixed[row : row + 1], alone)
