"""What a model says of a matrix is kept with its rows, and tells the model from another one."""

from __future__ import annotations

import json
import pickle
import warnings
from dataclasses import replace
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import BartConfig, BartForConditionalGeneration

from tests.helpers.llama import llama
from tests.helpers.models import D, V, make
from tests.helpers.rows import random_rows
from ttfunc import (
    combine,
    functional_call,
    init_deltas,
    load,
    merge,
    merge_checkpoint,
    patch,
    save,
)
from ttfunc.disk.rows_file import read
from ttfunc.model.origin import Origin

NAME = "model.embed_tokens.weight"
NEW = [V, V + 1]


def other_weights() -> nn.Module:
    model = llama()
    for parameter in model.parameters():
        parameter.mul_(1.01)
    return model


def known(origin: Origin) -> tuple[Any, ...]:
    sample = origin.sample and (origin.sample.rows, origin.sample.numbers.tolist())
    return replace(origin, sample=None).__dict__ | {"sample": sample}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float64"])
def test_a_file_keeps_all_of_it(dtype: str, tmp_path):
    params = random_rows(llama(dtype=dtype), NEW, grow=True)
    origin = params.specs[NAME].origin
    assert (origin.model, origin.kind, origin.sizes) == (
        "LlamaForCausalLM",
        "llama",
        {"vocab_size": V},
    )
    params.specs[NAME] = replace(params.specs[NAME], origin=replace(origin, saved_as={NAME: "a"}))
    save(params, tmp_path / "rows")
    found = read(tmp_path / "rows").specs[NAME].origin
    assert known(found) == known(params.specs[NAME].origin)
    assert found.sample.numbers.dtype == origin.sample.numbers.dtype
    pickled = pickle.loads(pickle.dumps(params.specs[NAME]))  # noqa: S301
    assert known(pickled.origin) == known(found)


def test_it_is_no_part_of_the_content(tmp_path):
    a, b = (random_rows(model, [7]) for model in (llama(), other_weights()))
    a, b = a.specs[NAME], replace(b.specs[NAME], originals=a.specs[NAME].originals)
    assert known(a.origin) != known(b.origin)
    assert (a, hash(a)) == (b, hash(b))


def test_rows_that_are_joined_keep_what_either_knows():
    model = llama()
    old, new = random_rows(model, [7]), random_rows(model, NEW, grow=True)
    assert old.specs[NAME].origin.sizes is None
    for both in (combine(old, new), combine(new, old)):
        origin = both.specs[NAME].origin
        assert (origin.sizes, origin.biases) == ({"vocab_size": V}, ())
        assert origin.sample is not None


def test_no_folder_of_this_machine_is_in_a_file(tmp_path):
    llama().save_pretrained(tmp_path / "secret" / "small")
    model = type(llama()).from_pretrained(tmp_path / "secret" / "small").requires_grad_(False)
    save(init_deltas(model, [7]), tmp_path / "rows")
    with safe_open(tmp_path / "rows", "pt") as file:
        own = file.metadata()["ttfunc"]
    assert json.loads(own)["origins"][0]["model"] == "LlamaForCausalLM small"
    assert "secret" not in own


def test_another_model_of_the_same_shape_is_told_of(tmp_path):
    params = random_rows(llama(), NEW, grow=True)
    save(params, tmp_path / "new")
    with pytest.warns(UserWarning, match=r"has other rows than .* on \(LlamaForCausalLM\)"):
        load(tmp_path / "new", other_weights())
    save(random_rows(llama(), [7]), tmp_path / "old")
    with pytest.warns(UserWarning, match=r"the rows of tokens \[7\] .* are not those") as told:
        load(tmp_path / "old", other_weights())
    assert len(told) == 1  # said once


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float64"])
def test_the_same_model_in_another_dtype_is_the_same(dtype: str, tmp_path):
    params = random_rows(llama(), NEW, grow=True)
    save(params, tmp_path / "rows")
    load(tmp_path / "rows", llama().to(getattr(torch, dtype)))
    save(random_rows(llama().to(getattr(torch, dtype)), NEW, grow=True), tmp_path / "there")
    load(tmp_path / "there", llama())


def test_a_model_with_other_rows_merged_into_it_is_the_same(tmp_path):
    model = llama()
    save(random_rows(model, NEW, grow=True), tmp_path / "rows")
    model.load_state_dict(merge(model.state_dict(), random_rows(model, range(3, 9))))
    load(tmp_path / "rows", model)


def test_a_taller_matrix_is_the_same(tmp_path):
    model = llama()
    params = random_rows(model, NEW, grow=True)
    save(params, tmp_path / "rows")
    model.resize_token_embeddings(V + 2, mean_resizing=False)
    taller = load(tmp_path / "rows", model.requires_grad_(False))
    assert taller.specs[NAME].grown == 0


def test_a_skeleton_on_meta_keeps_what_the_file_knows(tmp_path):
    save(random_rows(llama(), [7]), tmp_path / "rows")
    with torch.device("meta"):
        skeleton = make("tied")
    assert init_deltas(skeleton, [7]).specs["embed_tokens.weight"].origin.sample is None
    meta = llama().to("meta")
    meta.tie_weights()
    loaded = load(tmp_path / "rows", meta)
    assert known(loaded.specs[NAME].origin) == known(read(tmp_path / "rows").specs[NAME].origin)


def test_a_file_of_an_earlier_version_is_loaded(tmp_path):
    params = random_rows(llama(), NEW, grow=True)
    save(params, tmp_path / "rows")
    with safe_open(tmp_path / "rows", "pt") as file:
        own = json.loads(file.metadata()["ttfunc"])
    del own["origins"]
    tensors = load_file(tmp_path / "rows")
    save_file(tensors, tmp_path / "earlier", {"ttfunc": json.dumps(own)})
    assert known(read(tmp_path / "earlier").specs[NAME].origin) == known(Origin())
    loaded = load(tmp_path / "earlier", llama())
    assert loaded.specs[NAME].origin.sizes == {"vocab_size": V}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load(tmp_path / "earlier", llama())


@pytest.mark.parametrize(
    "wrong",
    [
        [],
        {},
        [1],
        [{"model": 1}],
        [{"kind": []}],
        [{"sizes": {"a": "b"}}],
        [{"sizes": {"a": -1}}],
        [{"biases": "abc"}],
        [{"shared": [1]}],
        [{"saved_as": {"a": 1}}],
        [{"sample": {"rows": [1], "numbers": [], "dtype": "F32"}}],
        [{"sample": {"rows": [-1], "numbers": [0.5], "dtype": "F32"}}],
        [{"sample": {"rows": [1], "numbers": ["a"], "dtype": "F32"}}],
        [{"sample": {"rows": [1], "numbers": [0.5], "dtype": "I64"}}],
    ],
)
def test_what_no_version_writes_is_refused(wrong: object, tmp_path):
    save(random_rows(llama(), [7]), tmp_path / "rows")
    with safe_open(tmp_path / "rows", "pt") as file:
        own = json.loads(file.metadata()["ttfunc"])
    own["origins"] = wrong
    save_file(load_file(tmp_path / "rows"), tmp_path / "wrong", {"ttfunc": json.dumps(own)})
    with pytest.raises(ValueError, match=r"wrong' cannot be loaded: .*say of the model"):
        read(tmp_path / "wrong")


def test_a_matrix_with_numbers_that_are_none_is_saved(tmp_path):
    model = nn.Embedding(40, 4).requires_grad_(False)
    model.weight.fill_(float("nan"))
    save(init_deltas(model, [3]), tmp_path / "rows")
    assert read(tmp_path / "rows").specs["weight"].origin.sample is None


class Wrapped(nn.Module):
    """A model beside others, which are no part of its folder."""

    def __init__(self, tie: bool) -> None:
        super().__init__()
        self.policy, self.reference = llama(tie=tie), llama(tie=tie)
        self.score = nn.Linear(D, V)


@pytest.mark.parametrize("idx", [[5], NEW])
@pytest.mark.parametrize("tie", [True, False])
def test_what_is_beside_the_model_of_a_folder_is_none_of_it(tie: bool, idx: list[int], tmp_path):
    model = Wrapped(tie)
    model.policy.save_pretrained(tmp_path / "a")
    heads = [] if tie else ["policy.lm_head"]
    targets = ["policy.model.embed_tokens", *heads]
    params = random_rows(model, idx, targets=targets, grow=True)
    names = {name: name.removeprefix("policy.") for name in params.specs}
    merge_checkpoint(tmp_path / "a", params, tmp_path / "b", names=names)
    loaded = type(model.policy).from_pretrained(tmp_path / "b")
    x = torch.tensor([[1, *idx, 3]])
    weights = {n.removeprefix("policy."): one for n, one in patch(params).items()}
    expected = functional_call(model.policy, weights, x).logits
    torch.testing.assert_close(loaded(x).logits, expected)


def test_rows_of_a_model_without_the_head_s_bias_lengthen_that_of_one_with_it(tmp_path):
    config = BartConfig(
        vocab_size=V, d_model=D, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2,
        decoder_attention_heads=2, encoder_ffn_dim=16, decoder_ffn_dim=16,
    )  # fmt: skip
    model = BartForConditionalGeneration(config).eval()
    model.save_pretrained(tmp_path / "a")
    params = random_rows(model.model, NEW, grow=True)
    names = {n: f"model.{n}" for n in params.tied["shared.weight"]}
    assert merge(model.state_dict(), params, names=names)["final_logits_bias"].shape == (1, V + 2)
    names = {"shared.weight": "model.shared.weight"}
    merge_checkpoint(tmp_path / "a", params, tmp_path / "b", names=names)
    loaded = BartForConditionalGeneration.from_pretrained(tmp_path / "b")
    assert loaded.final_logits_bias.shape == (1, V + 2)
