"""Every behaviour of PEFT's trainable tokens, by its number, against PEFT itself: one adapter."""

from __future__ import annotations

import copy
import re

import numpy as np
import optree
import peft
import pytest
import torch
from torch import nn

import ttfunc
from tests.helpers.models import Language, loss_of
from tests.helpers.oracle import edited, same_bits
from tests.helpers.peft_reference import (
    EMBEDDING,
    HEAD,
    IDX,
    RIGHT,
    D,
    V,
    agree,
    agree_with_peft,
    far,
    filled,
    gradients,
    inputs_of,
    logits,
    peft_deltas,
    peft_of,
    quiet,
    run,
    toy,
)
from tests.helpers.rows import random_rows
from ttfunc import TokenDeltas, functional_call, init_deltas, patch

# --- What is trained, and what it does


@pytest.mark.parametrize("name", [*RIGHT, "bert"])
def test_01_rows_start_as_they_are(name: str):
    """1. The rows are copies: until they are trained, nothing changes."""
    model = toy(name)
    params, inputs = init_deltas(model, IDX), inputs_of(model, 7, 3)
    assert same_bits(params.deltas, peft_deltas(peft_of(model)))
    assert torch.equal(run(model, params, inputs), logits(model, inputs))
    torch.testing.assert_close(run(model, params, inputs, False), logits(model, inputs))
    assert far(run(model, random_rows(model, IDX), inputs), logits(model, inputs))


@pytest.mark.parametrize("name", ["llama_tied", "gemma3", "bert"])
def test_02_only_the_listed_rows_change(name: str):
    """2. The first hidden states differ at those tokens, and only there."""
    model = toy(name)
    params, inputs = random_rows(model, IDX), inputs_of(model, 7, 3, 7)
    asked = {**inputs, "output_hidden_states": True}
    first = functional_call(model, patch(params), (), asked).hidden_states[0]
    changed = (first != model(**asked).hidden_states[0]).any(-1)
    assert torch.equal(changed, torch.isin(inputs["input_ids"], torch.tensor(IDX)))
    assert changed.sum() == 3
    expected = peft_of(model, IDX, params)(**asked).hidden_states[0]
    torch.testing.assert_close(first, expected)


@pytest.mark.parametrize("lora", [False, True], ids=["standalone", "lora"])
@pytest.mark.parametrize("name", RIGHT)
def test_03_only_the_deltas_train(name: str, lora: bool):
    """3. Their gradient is PEFT's, and those rows of the gradient of full training."""
    model = toy(name)
    params = agree_with_peft(model, lora=lora)
    agree(model, params)
    assert all(parameter.grad is None for parameter in model.parameters())
    assert len(optree.tree_leaves(params)) == 1


def test_04_the_embedding_is_found():
    """4. By get_input_embeddings(), else as embed_tokens, else not."""
    named = toy("bert")
    assert list(init_deltas(named, IDX).deltas) == list(peft_deltas(peft_of(named)))
    plain = Language(tie=False)
    plain.positions = nn.Embedding(4, 8)
    assert list(agree_with_peft(filled(plain), [3]).deltas) == ["embed_tokens.weight"]

    lost = nn.ModuleDict({"left": nn.Embedding(9, 4), "right": nn.Embedding(9, 4)})
    with pytest.raises(ValueError, match="not found in the base model"):
        peft_of(lost, [3])
    with pytest.raises(ValueError, match=r"cannot tell which .* 'left', 'right'"):
        init_deltas(lost, [3])


def test_05_a_list_of_targets():
    """5. Each is the end of a name at a dot; PEFT lets one pass that matches nothing."""
    model = toy("llama_untied")
    assert len(agree_with_peft(model, targets=["embed_tokens", "lm_head"]).deltas) == 2
    assert len(peft_deltas(peft_of(model, target_modules=["embed_tokens", "nowhere"]))) == 1
    with pytest.raises(ValueError, match="'nowhere' matches no module"):
        init_deltas(model, IDX, targets=["embed_tokens", "nowhere"])
    with pytest.raises(ValueError, match="'tokens' matches no module"):
        init_deltas(model, IDX, targets=["tokens"])


def test_06_a_string_or_a_pattern():
    """6. PEFT takes a string for a regex on the full name; here a compiled pattern is one."""
    model = toy("llama_untied")
    with pytest.raises(ValueError, match="not found in the base model"):
        peft_of(model, target_modules="embed_tokens")
    for targets in ("embed_tokens", "model.embed_tokens", re.compile(r".*embed_\w+")):
        params = random_rows(model, IDX, targets=targets)
        agree(model, params, peft_of(model, IDX, params, target_modules=r".*embed_\w+"))
    with pytest.raises(ValueError, match="matches no module"):
        init_deltas(model, IDX, targets=re.compile("embed_tokens"))


def test_07_a_mapping_of_targets():
    """7. Each target has its own ids; PEFT's `emb` hits `pos_emb` as well."""
    model = toy("llama_untied")
    params = agree_with_peft(model, {"embed_tokens": [7, 3], "lm_head": [41]}, lora=True)
    ids = {name: ids.tolist() for name, ids in params.token_indices.items()}
    assert ids == {EMBEDDING: [7, 3], HEAD: [41]}
    unknown = {"embed_tokens": [7], "nowhere": [3]}
    with pytest.raises(ValueError, match="not found in the base model"):
        peft_of(model, unknown, lora=True)
    with pytest.raises(ValueError, match="'nowhere' matches no module"):
        init_deltas(model, unknown)

    layers = {"emb": nn.Embedding(9, 4), "pos_emb": nn.Embedding(9, 4), "body": nn.Linear(4, 4)}
    near = nn.ModuleDict({"text": nn.ModuleDict(layers)})
    found = peft_deltas(peft_of(near, {"emb": [3]}, lora=True))
    assert found.keys() == {"text.emb.weight", "text.pos_emb.weight"}
    assert init_deltas(near, {"emb": [3]}).deltas.keys() == {"text.emb.weight"}


def test_08_one_list_for_several_targets():
    """8. They share the ids, and each has a delta that moves on its own."""
    model, targets = toy("llama_untied"), ["embed_tokens", "lm_head"]
    both, inputs = agree_with_peft(model, targets=targets), inputs_of(model, 7, 3)
    for still in (EMBEDDING, HEAD):
        one = TokenDeltas({**both.deltas, still: both.originals[still]}, both.specs)
        agree(model, one, peft_of(model, IDX, one, target_modules=targets))
        assert far(run(model, one, inputs), run(model, both, inputs))


@pytest.mark.parametrize("target", ["lm_head", "down_proj"])
def test_09_linear_targets(target: str):
    """9. Heads and hidden Linear modules have rows too; other modules have none."""
    model, idx = toy("llama_untied"), [7, 3, 11]
    agree_with_peft(model, idx, targets=[target])
    with pytest.raises(TypeError, match="input_layernorm' is a LlamaRMSNorm"):
        init_deltas(model, idx, targets=["input_layernorm"])


# --- How the rows are made


def test_29_a_resized_vocabulary():
    """29. New rows train once the model has them, and not before."""
    model, idx = toy("llama_tied"), [7, V + 1]
    with pytest.raises(IndexError, match=rf"\[{V + 1}\] are past the end .* Resize the model"):
        init_deltas(model, idx)
    with quiet():
        model.resize_token_embeddings(V + 2)
    inputs = inputs_of(model, *idx)
    agree(model, agree_with_peft(model, idx, inputs=inputs), inputs=inputs)


@pytest.mark.parametrize("wide", [True, False], ids=["float32", "as the base"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_30_half_precision(dtype: torch.dtype, wide: bool):
    """30. float32 deltas on a half-precision base, unless they are asked to be as it is."""
    model = toy("llama_tied").to(dtype)
    params = random_rows(model, IDX, dtype=None if wide else dtype)
    wrapped = peft_of(model, IDX, params, wrap={"autocast_adapter_dtype": wide})
    gradient = gradients(model, params, inputs_of(model, 7, 3))
    for rows in (params.deltas, peft_deltas(wrapped), gradient):
        assert rows[EMBEDDING].dtype == (torch.float32 if wide else dtype)
    agree(model, params, wrapped, rtol=2e-2, atol=2e-2)


def test_31_random_rows():
    """31. PEFT draws from N(0, 1); here with the mean and spread of the matrix, and seeded."""
    model, idx = toy("llama_untied"), range(1, V)
    model.model.embed_tokens.weight.data.normal_(0.5, 0.02)
    assert 0.8 < peft_deltas(peft_of(model, idx, init_weights=False))[EMBEDDING].std() < 1.2
    params = random_rows(model, idx)
    assert 0.015 < params.deltas[EMBEDDING].std() < 0.025
    assert 0.49 < params.deltas[EMBEDDING].mean() < 0.51
    assert same_bits(params.deltas, random_rows(model, idx).deltas)
    assert not same_bits(params.deltas, random_rows(model, idx, seed=1).deltas)


def test_32_rows_on_meta():
    """32. Rows without memory take their values afterwards."""
    model = toy("llama_tied")
    full, wrapped = random_rows(model, IDX), peft_of(model, wrap={"low_cpu_mem_usage": True})
    empty = optree.tree_map(lambda delta: delta.to("meta"), init_deltas(model, IDX))
    assert peft_deltas(wrapped)[EMBEDDING].is_meta
    assert empty.deltas[EMBEDDING].is_meta
    key = "base_model.model.model.embed_tokens.trainable_tokens_delta"
    with quiet():
        state = {key: full.deltas[EMBEDDING]}
        peft.set_peft_model_state_dict(wrapped, state, low_cpu_mem_usage=True)
    agree(model, optree.tree_map(lambda _, delta: delta, empty, full), wrapped)

    skeleton = copy.deepcopy(model).to("meta")
    inputs = {"input_ids": torch.zeros(2, 6, dtype=torch.int64, device="meta")}
    found = run(skeleton, init_deltas(skeleton, IDX), inputs)
    assert found.is_meta
    assert found.shape == (2, 6, V)


@pytest.mark.parametrize("name", [*RIGHT, "bert"])
def test_33_counting(name: str):
    """33. Deltas count once, however many names they have."""
    model = toy(name).requires_grad_(False)  # as PEFT does
    found = ttfunc.summary(model, init_deltas(model, IDX))
    counts = (found.trainable_parameters, found.total_parameters)
    assert counts == peft_of(model).get_nb_trainable_parameters()
    assert found.trainable_parameters == len(IDX) * D


def test_34_duplicates():
    """34. PEFT takes them: the last wins, and each copy gets the whole gradient."""
    model = toy("llama_untied")
    wrapped, inputs = peft_of(model, [7, 7]), inputs_of(model, 7)
    (delta,) = peft_deltas(wrapped).values()
    delta.data.normal_()
    found = logits(wrapped, inputs)
    last = init_deltas(model, [7], init=delta[1:])
    torch.testing.assert_close(found, logits(edited(model, last), inputs))
    loss_of(found).backward()
    assert delta.grad[0].any()
    assert torch.equal(delta.grad[0], delta.grad[1])
    with pytest.raises(ValueError, match=r"\[7\] .* more than once"):
        init_deltas(model, [3, 7, 7])


@pytest.mark.parametrize(
    ("idx", "theirs", "error", "match"),
    [
        ([7, -1], IndexError, ValueError, r"negative token indices \[-1\]"),
        ([], RuntimeError, ValueError, "no token indices .* at least one"),
        ([1.5], RuntimeError, TypeError, "must be integers, got float: 1.5"),
    ],
    ids=["negative", "empty", "float"],
)
def test_35_bad_ids(idx, theirs, error, match):
    """35. PEFT builds, and fails at the first forward; here they do not pass."""
    model = toy("llama_untied")
    wrapped = peft_of(model, idx)
    with pytest.raises(theirs, match="index_copy_"):
        wrapped(**inputs_of(model, 7))
    with pytest.raises(error, match=match):
        init_deltas(model, idx)


def test_35_past_the_end_and_tuples():
    """35. Past the end both raise; of a tuple PEFT makes a scalar."""
    model = toy("llama_untied")
    with pytest.raises(IndexError, match="out of bounds"):
        peft_of(model, [V])
    with pytest.raises(IndexError, match=rf"\[{V}\] are past the end"):
        init_deltas(model, [V])
    assert peft_deltas(peft_of(model, (7, 3)))[EMBEDDING].shape == ()
    params = random_rows(model, (7, 3))
    agree(model, params, peft_of(model, [7, 3], params))


@pytest.mark.filterwarnings("ignore:To copy construct")  # PEFT, of a tensor
@pytest.mark.parametrize("idx", [torch.tensor([7, 3]), range(7, 2, -4), np.array([7, 3])], ids=type)
def test_36_kinds_of_sequences(idx):
    """36. Whatever holds the ids trains as a list does."""
    model = toy("llama_tied")
    params = agree_with_peft(model, idx)
    assert torch.equal(params.token_indices[EMBEDDING], torch.tensor([7, 3]))
    assert same_bits(params.deltas, random_rows(model, [7, 3]).deltas)
