"""Every behaviour of PEFT's trainable tokens, by its number, against PEFT itself.

Where PEFT gives a wrong answer, the reference is a copy of the model with the rows written in.
"""

from __future__ import annotations

import contextlib
import copy
import gc
import re
import warnings
import weakref

import numpy as np
import optree
import peft
import pytest
import torch
import transformers
from torch import Tensor, nn

import ttfunc
from tests.models import ByReading, ByTranspose, Language, StorageTied, loss_of, tokens
from tests.oracle import bits, edited, row_gradients, same_bits
from ttfunc import TokenDeltas, functional_call, init_deltas, merge, patch, unmerge

V, D = 60, 16
IDX = [7, 3, 41]  # in no order; the last one is in no input
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"

# Each configuration takes from these what it knows.
SIZES = {
    **dict.fromkeys(["hidden_size", "d_model"], D),
    **dict.fromkeys(["num_hidden_layers", "num_layers", "encoder_layers", "decoder_layers"], 1),
    **dict.fromkeys(["num_attention_heads", "num_key_value_heads", "num_heads"], 2),
    **dict.fromkeys(["encoder_attention_heads", "decoder_attention_heads"], 2),
    **dict.fromkeys(["head_dim", "d_kv"], D // 2),
    **dict.fromkeys(["intermediate_size", "d_ff", "encoder_ffn_dim", "decoder_ffn_dim"], 32),
    **{"vocab_size": V, "max_position_embeddings": 32, "attn_implementation": "eager"},
    **dict.fromkeys(["pad_token_id", "decoder_start_token_id"], 0),
}
CLASSES = {
    "llama_tied": ("LlamaForCausalLM", True),
    "llama_untied": ("LlamaForCausalLM", False),
    "t5": ("T5ForConditionalGeneration", True),
    "bart": ("BartForConditionalGeneration", True),
    "bart_untied": ("BartForConditionalGeneration", False),
    "marian": ("MarianMTModel", True),
    "gemma3": ("Gemma3ForCausalLM", True),
    "bert": ("BertForMaskedLM", True),
}
RIGHT = ["llama_tied", "llama_untied", "t5", "bart", "gemma3"]  # PEFT's logits are


def filled(model: nn.Module) -> nn.Module:
    """The model with no zero in it, a bias least of all, to hide a mistake behind."""
    generator = torch.Generator().manual_seed(0)
    biases = [b for n, b in model.named_buffers() if n == "final_logits_bias"]
    with torch.no_grad():
        for tensor in [*model.parameters(), *biases]:
            tensor.normal_(std=0.3, generator=generator)
    return model.eval()


def toy(name: str) -> nn.Module:
    model, tie = CLASSES[name]
    model = getattr(transformers, model)
    return filled(model(model.config_class(**SIZES, tie_word_embeddings=tie)))


def inputs_of(model: nn.Module, *hits: int) -> dict[str, Tensor]:
    """Token ids that hold `hits`, and none of the others that are trained."""
    if not hasattr(model, "config"):
        return {"x": tokens(*hits)}
    x = torch.randint(42, V, (2, 6), generator=torch.Generator().manual_seed(1))
    x[0, : len(hits)] = torch.tensor(hits, dtype=torch.int64)
    pair = {"decoder_input_ids": x.flip(1)} if model.config.is_encoder_decoder else {}
    return {"input_ids": x, **pair}


def learnt(model: nn.Module, idx=IDX, seed: int = 0, **options) -> TokenDeltas:
    """Rows that differ from the base."""
    generator = torch.Generator().manual_seed(seed)
    return init_deltas(model, idx, init="normal", generator=generator, **options)


def logits(model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    out = model(**inputs)
    return out if isinstance(out, Tensor) else out.logits


def run(model: nn.Module, params: TokenDeltas, inputs: dict, dense: bool = True) -> Tensor:
    out = functional_call(model, patch(params, dense=dense), (), inputs)
    return out if isinstance(out, Tensor) else out.logits


def gradients(model: nn.Module, params: TokenDeltas, inputs: dict, dense: bool = False):
    return torch.func.grad(lambda p: loss_of(run(model, p, inputs, dense)))(params).deltas


# --- PEFT


@contextlib.contextmanager
def quiet():
    """PEFT and transformers warn of what they do."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def config_of(idx, lora: bool = False, **options) -> peft.PeftConfig:
    if not lora:
        return peft.TrainableTokensConfig(token_indices=idx, **options)
    # B of a fresh LoRA is zero: its rows alone have an effect.
    modules = r"(.*\.)?(v_proj|v|value|body)"
    return peft.LoraConfig(target_modules=modules, trainable_token_indices=idx)


def peft_of(model: nn.Module, idx=IDX, params=None, *, wrap=None, **options) -> peft.PeftModel:
    """PEFT around a copy of the model, with the rows of `params` if they are given."""
    with quiet():
        config = config_of(idx, **options)
        wrapped = peft.get_peft_model(copy.deepcopy(model), config, **(wrap or {}))
    if params is not None:
        fill(wrapped, params)
    return wrapped.train(model.training)


def add(wrapped: peft.PeftModel, adapter: str, params: TokenDeltas, lora: bool = False) -> None:
    """One more adapter, with the rows of `params`."""
    (idx,) = params.token_indices.values()
    with quiet():
        wrapped.add_adapter(adapter, config_of(idx.tolist(), lora))
    fill(wrapped, params, adapter)


def peft_deltas(wrapped: peft.PeftModel, adapter: str = "default") -> dict[str, nn.Parameter]:
    """PEFT's rows, under the name that their matrix has in the plain model."""
    tail = rf"(\.token_adapter)?\.trainable_tokens_delta\.{adapter}$"
    return {
        re.sub(tail, ".weight", name.removeprefix("base_model.model.")): parameter
        for name, parameter in wrapped.named_parameters()
        if re.search(tail, name)
    }


def fill(wrapped: peft.PeftModel, params: TokenDeltas, adapter: str = "default") -> None:
    found = peft_deltas(wrapped, adapter)
    assert found.keys() == params.deltas.keys()
    for name, delta in params.deltas.items():
        found[name].data.copy_(delta)


def weights_of(wrapped: peft.PeftModel) -> dict[str, Tensor]:
    """The weights beneath PEFT's layers under their plain names, each name of a tied one."""
    return {
        re.sub(r"^base_model\.model\.|\.base_layer", "", name): tensor.detach()
        for name, tensor in wrapped.named_parameters(remove_duplicate=False)
        if "trainable_tokens_" not in name
    }


# --- Comparisons


def agree(model, params, reference=None, inputs=None, rtol=1e-4, atol=1e-5) -> None:
    """Logits and gradients of the rows are the reference's, and both depend on the rows.

    The reference is PEFT's model, or by default a copy of the model with the rows written in.
    """
    inputs = inputs_of(model, 7, 3) if inputs is None else inputs
    reference = edited(model, params) if reference is None else reference
    expected = logits(reference, inputs)
    assert far(expected, logits(copy.deepcopy(model), inputs))
    loss_of(expected).backward()
    if isinstance(reference, peft.PeftModel):
        gradient = {name: delta.grad for name, delta in peft_deltas(reference).items()}
    else:
        gradient = row_gradients(reference, params)
    assert all(grad.abs().sum() > 0 for grad in gradient.values())
    for dense in (False, True):
        found, its_gradient = (f(model, params, inputs, dense) for f in (run, gradients))
        torch.testing.assert_close(found, expected.detach(), rtol=rtol, atol=atol)
        torch.testing.assert_close(its_gradient, gradient, rtol=rtol, atol=atol)


def agree_with_peft(model, idx=IDX, *, lora=False, targets=None, inputs=None) -> TokenDeltas:
    """The same for new rows, and PEFT made for the same ids and targets. Returns the rows."""
    params = learnt(model, idx, targets=targets)
    options = {} if targets is None else {"target_modules": targets}
    agree(model, params, peft_of(model, idx, params, lora=lora, **options), inputs)
    return params


def far(a: Tensor, b: Tensor) -> bool:
    return not torch.allclose(a, b, rtol=1e-2, atol=1e-2)


def peft_is_wrong(model, params, idx=IDX, **options) -> peft.PeftModel:
    """PEFT's logits are not those of the model with the rows written in, and ttfunc's are."""
    wrapped, inputs = peft_of(model, idx, params, **options), inputs_of(model, 7, 3)
    assert far(logits(wrapped, inputs), logits(edited(model, params), inputs))
    agree(model, params)
    return wrapped


# --- What is trained, and what it does


@pytest.mark.parametrize("name", [*RIGHT, "bert"])
def test_01_rows_start_as_they_are(name: str):
    """1. The rows are copies: until they are trained, nothing changes."""
    model = toy(name)
    params, inputs = init_deltas(model, IDX), inputs_of(model, 7, 3)
    assert same_bits(params.deltas, peft_deltas(peft_of(model)))
    assert torch.equal(run(model, params, inputs), logits(model, inputs))
    torch.testing.assert_close(run(model, params, inputs, False), logits(model, inputs))
    assert far(run(model, learnt(model), inputs), logits(model, inputs))


@pytest.mark.parametrize("name", ["llama_tied", "gemma3", "bert"])
def test_02_only_the_listed_rows_change(name: str):
    """2. The first hidden states differ at those tokens, and only there."""
    model = toy(name)
    params, inputs = learnt(model), inputs_of(model, 7, 3, 7)
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
        params = learnt(model, targets=targets)
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
        one = TokenDeltas({**both.deltas, still: both.originals[still]}, both.rows)
        agree(model, one, peft_of(model, IDX, one, target_modules=targets))
        assert far(run(model, one, inputs), run(model, both, inputs))


@pytest.mark.parametrize("target", ["lm_head", "down_proj"])
def test_09_linear_targets(target: str):
    """9. Heads and hidden Linear modules have rows too; other modules have none."""
    model, idx = toy("llama_untied"), [7, 3, 11]
    agree_with_peft(model, idx, targets=[target])
    with pytest.raises(TypeError, match="input_layernorm' is a LlamaRMSNorm"):
        init_deltas(model, idx, targets=["input_layernorm"])


# --- Ties


@pytest.mark.parametrize("name", ["llama_tied", "gemma3"])
def test_10_a_tied_head_follows(name: str):
    """10. Without the tokens in the input, their logits change, and no others."""
    model = toy(name)
    inputs = inputs_of(model)
    params = agree_with_peft(model, inputs=inputs)
    assert params.tied == {EMBEDDING: (EMBEDDING, HEAD)}
    changed = run(model, params, inputs) != logits(model, inputs)
    assert changed.flatten(0, 1).any(0).nonzero().ravel().tolist() == sorted(IDX)


def test_11_an_untied_head_stays():
    """11. Without the tokens in the input, nothing changes."""
    model = toy("llama_untied")
    params, inputs = agree_with_peft(model), inputs_of(model)
    assert list(patch(params)) == [EMBEDDING]
    for found in (run(model, params, inputs), logits(peft_of(model, IDX, params), inputs)):
        assert torch.equal(found, logits(model, inputs))


@pytest.mark.parametrize(("name", "prefix"), [("t5", ""), ("bart", "model.")])
def test_12_encoder_decoders(name: str, prefix: str):
    """12. All four names follow: the shared embedding, encoder, decoder and head."""
    model = toy(name)
    places = ("shared.weight", "encoder.embed_tokens.weight", "decoder.embed_tokens.weight")
    names = (*(prefix + place for place in places), HEAD)
    params = agree_with_peft(model)
    assert params.tied == {names[0]: names}
    merged = merge(model.state_dict(), params)
    assert all(torch.equal(merged[alias][IDX], params.deltas[names[0]]) for alias in names)


def test_13_a_mapping_over_a_tie():
    """13. Equal ids are one tied delta; PEFT unties different ones."""
    model = toy("llama_tied")
    assert len(agree_with_peft(model, {"embed_tokens": IDX, "lm_head": IDX}, lora=True).deltas) == 1
    different = {"embed_tokens": [7, 3], "lm_head": [41]}
    assert len(peft_deltas(peft_of(model, different, lora=True))) == 2
    with pytest.raises(ValueError, match=r"'lm_head' are tied .* \(7, 3\) and \(41,\)"):
        init_deltas(model, different)


class Towers(nn.Module):
    """Two models of one kind in one."""

    def __init__(self) -> None:
        super().__init__()
        self.text, self.speech = Language(tie=False), Language(tie=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.text(x) + self.speech(x.flip(1))


@pytest.mark.parametrize("tower", ["text", "speech"])
def test_14_full_paths_tell_towers_apart(tower: str):
    """14. A path reaches one tower, a suffix both."""
    model, path = filled(Towers()), f"{tower}.embed_tokens"
    assert list(agree_with_peft(model, [7, 3], targets=[path]).deltas) == [f"{path}.weight"]
    assert len(agree_with_peft(model, [7, 3], targets=["embed_tokens"]).deltas) == 2


def test_15_scaled_embeddings():
    """15. The embedding's own scale applies to the trained rows: 1e4 of them, or nothing."""
    model = toy("gemma3")
    model.model.embed_tokens.embed_scale.fill_(1e4)
    agree(model, agree_with_peft(model))
    inputs, params = inputs_of(model, 7, 3), learnt(model)
    assert run(model, params, inputs).any()
    model.model.embed_tokens.embed_scale.fill_(0.0)
    for found in (run(model, params, inputs, False), logits(peft_of(model, IDX, params), inputs)):
        assert not found.any()


@pytest.mark.parametrize("name", ["llama_untied", "llama_tied"])
def test_16_the_padding_row(name: str):
    """16. It gets no gradient from the input; through a tied head it does."""
    model = toy(name)
    inputs = inputs_of(model, 7, 0)
    with pytest.warns(UserWarning, match="token 0 is the padding_idx"):
        params = agree_with_peft(model, [7, 0], inputs=inputs)
    gradient = gradients(model, params, inputs)[EMBEDDING]
    assert gradient.any(1).tolist() == [True, name == "llama_tied"]


@pytest.mark.parametrize("option", [{"max_norm": 0.5}, {"scale_grad_by_freq": True}])
def test_17_options_of_the_embedding(option: dict):
    """17. Rows are renormed, gradients are divided by frequency."""
    model, plain = filled(Language(tie=False, **option)), filled(Language(tie=False))
    assert same_bits(plain.state_dict(), model.state_dict())
    inputs = {"x": tokens(7, 7, 3)}
    params = agree_with_peft(model, [7, 3], inputs=inputs)
    found = gradients(model, params, inputs)["embed_tokens.weight"]
    without = gradients(plain, learnt(plain, [7, 3]), inputs)["embed_tokens.weight"]
    assert not torch.allclose(found, without)
    tied = filled(Language(**option))
    agree(tied, learnt(tied, [7, 3]), inputs=inputs)


def test_17_sparse_gradients_raise():
    """17. A sparse gradient does not go through the copy of the rows."""
    model = filled(Language(tie=False, sparse=True))
    inputs = {"x": tokens(3)}
    with pytest.raises(RuntimeError, match="unsupported for Sparse"):
        loss_of(logits(peft_of(model, [3]), inputs)).backward()
    with pytest.raises(RuntimeError, match="unsupported for Sparse"):
        gradients(model, init_deltas(model, [3]), inputs)


# --- Several adapters: a and b are disjoint, c overlaps a


def adapters(lora: bool = False):
    """A model, three adapters for it, PEFT with the three, and inputs that hold their tokens."""
    model = toy("llama_untied")
    a, b, c = (learnt(model, idx, seed) for seed, idx in enumerate([[7, 3], [41], [3, 50]]))
    wrapped = peft_of(model, [7, 3], a, lora=lora)
    add(wrapped, "b", b, lora)
    add(wrapped, "c", c, lora)
    return model, (a, b, c), wrapped, inputs_of(model, 7, 3, 41, 50)


def test_18_several_adapters():
    """18. Each is a tree of its own, over the same token or not."""
    model, params, wrapped, inputs = adapters()
    found = [run(model, each, inputs) for each in params]
    for i, adapter in enumerate(["default", "b", "c"]):
        wrapped.set_adapter(adapter)
        torch.testing.assert_close(found[i], logits(wrapped, inputs))
        assert far(found[i], found[i - 1])


def test_19_several_active():
    """19. Disjoint rows compose; an overlap raises."""
    model, (a, b, c), wrapped, inputs = adapters()
    wrapped.base_model.set_adapter(["default", "b"])
    expected = logits(wrapped, inputs)
    for weights in (patch(a, b), patch(b, a), patch(ttfunc.combine(a, b))):
        found = functional_call(model, weights, (), inputs).logits
        torch.testing.assert_close(found, expected)
    assert all(far(run(model, one, inputs), expected) for one in (a, b))
    wrapped.base_model.set_adapter(["default", "c"])
    with pytest.raises(ValueError, match="already defined"):
        wrapped(**inputs)
    with pytest.raises(ValueError, match=r"\[3\] are in more than one"):
        patch(a, c)


def test_19_several_active_in_lora():
    """19. In a LoRA adapter even disjoint ones raise; here they are the same rows."""
    model, (a, b, _), wrapped, inputs = adapters(lora=True)
    with pytest.raises(ValueError, match="Only one adapter can be set at a time"):
        wrapped.base_model.set_adapter(["default", "b"])
    agree(model, ttfunc.combine(a, b), inputs=inputs)


def test_20_merging_several():
    """20. Disjoint rows merge together or in turn; an overlap raises."""
    model, (a, b, c), wrapped, _ = adapters()
    state = model.state_dict()
    wrapped.merge_adapter(["default", "b"])
    for merged in (merge(state, a, b), merge(merge(state, b), a)):
        assert same_bits(merged, weights_of(wrapped))
        assert not same_bits(merged, state)
        assert same_bits(unmerge(merged, b, a), state)
    with quiet(), pytest.raises(ValueError, match="already defined"):
        wrapped.merge_adapter(["c"])
    with pytest.raises(ValueError, match=r"\[3\] are in more than one"):
        merge(state, a, b, c)


def test_20_merging_an_overlap_in_turn():
    """20. A state dict does not tell what is merged in it: the later row stands."""
    model, (a, _, c), _, _ = adapters()
    merged = merge(merge(model.state_dict(), a), c)
    assert same_bits(merged, edited(edited(model, a), c).state_dict())
    assert same_bits(unmerge(unmerge(merged, c), a), model.state_dict())


def test_22_disabling():
    """22. The model itself is the base, at any time; PEFT's disabling unmerges for good."""
    model, (a, b, _), wrapped, inputs = adapters()
    plain, both = logits(model, inputs), logits(edited(model, ttfunc.combine(a, b)), inputs)
    wrapped.merge_adapter(["default", "b"])
    torch.testing.assert_close(logits(wrapped, inputs), both)
    with wrapped.disable_adapter():
        assert torch.equal(logits(wrapped, inputs), plain)
    torch.testing.assert_close(logits(wrapped, inputs), logits(edited(model, a), inputs))

    weights = patch(a, b)
    for _ in range(2):
        found = functional_call(model, weights, (), inputs).logits
        torch.testing.assert_close(found, both)
        assert torch.equal(logits(model, inputs), plain)
    assert far(both, plain)


def test_23_deleting_an_adapter():
    """23. `del`: the model keeps nothing of the rows, and the other adapters go on."""
    model, (a, b, _), wrapped, inputs = adapters()
    functional_call(model, patch(a, b), (), inputs)
    rows = weakref.ref(a.deltas[EMBEDDING])
    assert rows() is not None
    with quiet():
        wrapped.delete_adapter("default")
    del a, _
    gc.collect()
    assert rows() is None
    assert wrapped.active_adapter == "b"
    torch.testing.assert_close(run(model, b, inputs), logits(wrapped, inputs))


# --- Merging


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", [*RIGHT, "bert"])
def test_24_merge_and_unmerge_are_exact(name: str, dtype: torch.dtype):
    """24. Bit for bit PEFT's weights and back, under every name."""
    model = toy(name).to(dtype)
    params, state = learnt(model), model.state_dict()
    wrapped = peft_of(model, IDX, params)
    wrapped.merge_adapter()
    merged, expected = merge(state, params), weights_of(wrapped)
    (names,) = params.tied.values()
    assert expected.keys() >= set(names)
    for alias in state.keys() & expected.keys():
        assert bits(merged[alias]) == bits(expected[alias])
        assert (bits(merged[alias]) != bits(state[alias])) == (alias in names)
    assert same_bits(unmerge(merged, params), state)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_25_rows_that_are_not_finite(bad: float):
    """25. A checked merge refuses them, an unchecked one writes them."""
    model = toy("llama_tied")
    params, state = learnt(model), model.state_dict()
    params.deltas[EMBEDDING][1, 2] = bad
    wrapped = peft_of(model, IDX, params)
    with pytest.raises(ValueError, match="NaNs detected"):
        wrapped.merge_adapter(safe_merge=True)
    with pytest.raises(ValueError, match=r"rows of tokens \[3\] .* are not finite"):
        merge(state, params, check_finite=True)
    wrapped.merge_adapter()
    assert bits(merge(state, params)[HEAD]) == bits(weights_of(wrapped)[HEAD])
    assert not weights_of(wrapped)[HEAD].isfinite().all()


def test_25_merging_twice():
    """25. PEFT warns that there is nothing to do; here the second time changes nothing."""
    model = toy("llama_tied")
    params, state = learnt(model), model.state_dict()
    wrapped, once = peft_of(model, IDX, params), merge(state, params)
    wrapped.merge_adapter()
    with pytest.warns(UserWarning, match="already merged"):
        wrapped.merge_adapter()
    assert same_bits(merge(once, params), once)
    assert bits(once[HEAD]) == bits(weights_of(wrapped)[HEAD]) != bits(state[HEAD])
    wrapped.unmerge_adapter()
    with pytest.warns(UserWarning, match="Already unmerged"):
        wrapped.unmerge_adapter()
    assert same_bits(unmerge(unmerge(once, params), params), state)


def test_26_unmerge_writes_the_stored_originals():
    """26. What came later is overwritten in the trained rows, and kept in the others."""
    model = toy("llama_untied")
    params = learnt(model)
    wrapped, later = peft_of(model, IDX, params), merge(model.state_dict(), params)
    wrapped.merge_adapter()
    for matrix in (weights_of(wrapped)[EMBEDDING], later[EMBEDDING]):
        matrix[[7, 8]] = 5.0
    wrapped.unmerge_adapter()
    found = unmerge(later, params)[EMBEDDING]
    assert torch.equal(found, weights_of(wrapped)[EMBEDDING])
    assert torch.equal(found[7], model.state_dict()[EMBEDDING][7])
    assert (found[8] == 5.0).all()


@pytest.mark.parametrize("name", [*RIGHT, "bert"])
def test_27_a_merged_checkpoint(name: str, tmp_path):
    """27. It has PEFT's bytes, keeps the ties, and answers the same when it is loaded again."""
    model = toy(name)
    params, inputs = learnt(model), inputs_of(model, 7, 3)
    merged = merge(model.state_dict(), params)
    assert same_bits(merged, peft_of(model, IDX, params).merge_and_unload().state_dict())
    model.save_pretrained(tmp_path, state_dict=merged)
    loaded = type(model).from_pretrained(tmp_path, attn_implementation="eager").eval()
    assert init_deltas(loaded, IDX).tied == params.tied
    assert torch.equal(logits(loaded, inputs), run(model, params, inputs))
    assert far(logits(loaded, inputs), logits(model, inputs))


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
    params = learnt(model, dtype=None if wide else dtype)
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
    params = learnt(model, idx)
    assert 0.015 < params.deltas[EMBEDDING].std() < 0.025
    assert 0.49 < params.deltas[EMBEDDING].mean() < 0.51
    assert same_bits(params.deltas, learnt(model, idx).deltas)
    assert not same_bits(params.deltas, learnt(model, idx, seed=1).deltas)


def test_32_rows_on_meta():
    """32. Rows without memory take their values afterwards."""
    model = toy("llama_tied")
    full, wrapped = learnt(model), peft_of(model, wrap={"low_cpu_mem_usage": True})
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
    model = toy(name)
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
    params = learnt(model, (7, 3))
    agree(model, params, peft_of(model, [7, 3], params))


@pytest.mark.filterwarnings("ignore:To copy construct")  # PEFT, of a tensor
@pytest.mark.parametrize("idx", [torch.tensor([7, 3]), range(7, 2, -4), np.array([7, 3])], ids=type)
def test_36_kinds_of_sequences(idx):
    """36. Whatever holds the ids trains as a list does."""
    model = toy("llama_tied")
    params = agree_with_peft(model, idx)
    assert torch.equal(params.token_indices[EMBEDDING], torch.tensor([7, 3]))
    assert same_bits(params.deltas, learnt(model, [7, 3]).deltas)


# --- At work


@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_37_weight_decay(decay: float):
    """37. AdamW's decay moves a row that is in no batch towards 0, step for step as in PEFT."""
    model = toy("llama_untied")
    params, inputs = init_deltas(model, IDX, requires_grad=True), inputs_of(model, 7, 3)
    wrapped = peft_of(model)
    delta, theirs = params.deltas[EMBEDDING], peft_deltas(wrapped)[EMBEDDING]
    start = delta.detach().clone()
    optimizer = torch.optim.AdamW([delta, theirs], 0.01, weight_decay=decay)
    for _ in range(3):
        optimizer.zero_grad()
        loss_of(run(model, params, inputs, dense=False)).backward()
        loss_of(logits(wrapped, inputs)).backward()
        optimizer.step()
    torch.testing.assert_close(delta, theirs.detach(), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(delta[2], start[2] * (1 - 0.01 * decay) ** 3)
    assert torch.equal(delta[2], start[2]) == (decay == 0)
    assert (delta[:2] - start[:2]).abs().min() > 1e-3


@pytest.mark.parametrize("name", ["llama_tied", "t5"])
def test_38_generate(name: str):
    """38. Other methods of the model read the rows as well."""
    model = toy(name)
    params, x = learnt(model), inputs_of(model, 7, 3)["input_ids"]
    options = {"max_new_tokens": 5, "do_sample": False}
    options |= {"output_logits": True, "return_dict_in_generate": True}
    expected = peft_of(model, IDX, params).generate(input_ids=x, **options)
    found = functional_call(model, patch(params), (x,), options, method="generate")
    assert torch.equal(found.sequences, expected.sequences)
    torch.testing.assert_close(found.logits, expected.logits)
    assert far(found.logits[0], model.generate(x, **options).logits[0])


def test_38_gradient_checkpointing():
    """38. Blocks that are run again in backward give the same gradient."""
    model = toy("llama_tied").train()
    params, inputs, runs = learnt(model, requires_grad=True), inputs_of(model, 7, 3), []
    wrapped, expected = peft_of(model, IDX, params), gradients(model, params, inputs)[EMBEDDING]
    model.model.layers[0].mlp.register_forward_pre_hook(lambda *_: runs.append(1))
    with quiet():
        for each in (model, wrapped):
            each.gradient_checkpointing_enable({"use_reentrant": False})
    loss_of(run(model, params, inputs, dense=False)).backward()
    loss_of(logits(wrapped, inputs)).backward()
    assert len(runs) == 2
    torch.testing.assert_close(params.deltas[EMBEDDING].grad, expected)
    torch.testing.assert_close(peft_deltas(wrapped)[EMBEDDING].grad, expected)


def test_38_compile():
    """38. A compiled call is one graph, with the same results."""
    model = toy("llama_tied")
    params, inputs = learnt(model), {**inputs_of(model, 7, 3), "use_cache": False}
    call = torch.compile(run, backend="aot_eager", fullgraph=True)
    expected = logits(peft_of(model, IDX, params), inputs)
    torch.testing.assert_close(call(model, params, inputs, False), expected)
    assert far(call(model, init_deltas(model, IDX), inputs, False), expected)


def test_38_deepcopy():
    """38. A copy of the rows is apart from them; for a copy of the model rows are made anew."""
    model = toy("llama_tied")
    params, inputs = learnt(model), inputs_of(model, 7, 3)
    expected = logits(copy.deepcopy(peft_of(model, IDX, params)), inputs)
    rows, other = copy.deepcopy(params), copy.deepcopy(model)
    params.deltas[EMBEDDING].zero_()
    torch.testing.assert_close(run(model, rows, inputs), expected)
    assert far(run(model, params, inputs), expected)
    with pytest.raises(ValueError, match="stale patch"):
        run(other, rows, inputs)
    torch.testing.assert_close(run(other, learnt(other), inputs), expected)


def test_38_resizing_and_tying_afterwards():
    """38. PEFT's model cannot be resized or tied any more; the plain one can."""
    model = toy("llama_tied")
    params, inputs = learnt(model), inputs_of(model, 7, 3)
    with pytest.raises(TypeError, match="not an instance of"):
        peft_of(model).resize_token_embeddings(V + 4)
    with pytest.raises(KeyError, match="already exists"):
        peft_of(model).tie_weights()
    before = run(model, params, inputs)
    model.tie_weights()
    assert torch.equal(run(model, params, inputs), before)
    with quiet():
        model.resize_token_embeddings(V + 4)
    again = init_deltas(model, IDX, init=params.deltas[EMBEDDING])
    torch.testing.assert_close(run(model, again, inputs)[..., :V], before)
    with pytest.raises(ValueError, match=r"has shape \(64, 16\).* made for \(60, 16\)"):
        merge(model.state_dict(), params)


# --- Where PEFT's answers are wrong


@pytest.mark.parametrize("lora", [False, True], ids=["standalone", "lora"])
def test_a_tied_head_keeps_its_bias(lora: bool):
    """PEFT's logits lack exactly the bias."""
    model = toy("bert")
    params, inputs = learnt(model), inputs_of(model, 7, 3)
    theirs = logits(peft_is_wrong(model, params, lora=lora), inputs)
    bias = model.cls.predictions.bias
    torch.testing.assert_close(run(model, params, inputs), theirs + bias)


@pytest.mark.parametrize("name", ["llama_tied", "bart"])
def test_a_second_adapter_on_a_tied_model(name: str):
    """PEFT's every forward raises."""
    model = toy(name)
    first, second = learnt(model, [7, 3], 1), learnt(model, [3, 41], 2)
    wrapped = peft_of(model, [7, 3], first)
    add(wrapped, "second", second)
    with pytest.raises(ValueError, match="unknown layer type"):
        wrapped(**inputs_of(model, 7))
    agree(model, first)
    agree(model, second)


def test_one_adapter_on_a_marian():
    """PEFT's every forward raises."""
    model = toy("marian")
    with pytest.raises(ValueError, match="unknown layer type"):
        peft_of(model)(**inputs_of(model, 7))
    agree(model, learnt(model))


@pytest.mark.parametrize("targets", [["lm_head"], ["embed_tokens", "lm_head"]])
def test_a_tied_head_among_the_targets(targets: list[str]):
    """With both, PEFT's every forward raises; with the head alone, merging changes its logits."""
    model = toy("llama_tied")
    params, inputs = learnt(model, targets=targets), inputs_of(model, 7, 3)
    assert params.tied == {EMBEDDING: (EMBEDDING, HEAD)}
    agree(model, params)
    merged = copy.deepcopy(model)
    merged.load_state_dict(merge(model.state_dict(), params))
    assert torch.equal(run(model, params, inputs), logits(merged, inputs))

    wrapped = peft_of(model, target_modules=targets)
    if len(targets) == 2:
        with pytest.raises(ValueError, match="unknown layer type"):
            wrapped(**inputs)
    else:
        peft_deltas(wrapped)[HEAD].data.copy_(params.deltas[EMBEDDING])
        unmerged = logits(wrapped, inputs)
        wrapped.merge_adapter()
        assert far(logits(wrapped, inputs), unmerged)


def test_a_tie_that_the_config_denies():
    """PEFT leaves the head as it is, until the rows are merged."""
    model = toy("llama_untied")
    model.lm_head.weight = model.model.embed_tokens.weight
    params, inputs = learnt(model), inputs_of(model, 7, 3)
    wrapped = peft_is_wrong(model, params)
    wrapped.merge_adapter()
    torch.testing.assert_close(run(model, params, inputs), logits(wrapped, inputs))


def test_a_tie_by_memory():
    """Two parameters over one memory: PEFT trains one, and merging unties them."""
    model, idx = filled(StorageTied()), [7, 3]
    params = learnt(model, idx)
    merged = peft_is_wrong(model, params, idx).merge_and_unload()
    assert not torch.equal(merged.embed_tokens.weight, merged.lm_head.weight)
    state = merge(model.state_dict(), params)
    assert state["embed_tokens.weight"] is state[HEAD]


class Doubled(nn.Embedding):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * 2


class Shifted(nn.Linear):
    def forward(self, h: Tensor) -> Tensor:
        return super().forward(h) + torch.arange(self.out_features)


def own_forwards() -> nn.Module:
    model = Language(tie=False)
    rows, width = model.lm_head.weight.shape
    model.embed_tokens, model.lm_head = Doubled(rows, width), Shifted(width, rows, bias=False)
    return model


def hooked() -> nn.Module:
    model = Language(tie=False)
    model.embed_tokens.register_forward_hook(lambda _module, _args, out: out * 3)
    return model


def claimed() -> nn.Module:
    model = toy("llama_tied")
    model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach().clone())
    return model


@pytest.mark.parametrize(
    ("build", "targets"),
    [
        pytest.param(claimed, ["embed_tokens"], id="untied, and tied by the config"),
        pytest.param(lambda: Language(tie=False, bias=True), ["lm_head"], id="bias of a target"),
        pytest.param(own_forwards, ["lm_head"], id="forward of a head"),
        pytest.param(own_forwards, ["embed_tokens"], id="forward of an embedding"),
        pytest.param(hooked, ["embed_tokens"], id="38. hook on the embedding"),
        pytest.param(lambda: ByTranspose(tie=False), ["lm_head"], id="weight that is transposed"),
        pytest.param(lambda: ByReading(tie=False), ["lm_head"], id="weight that is put together"),
    ],
)
def test_what_peft_skips(build, targets: list[str]):
    """PEFT's rows are not read, or what the module does besides is left out."""
    model, idx = filled(build()), [7, 3]
    params = learnt(model, idx, targets=targets)
    assert [len(names) for names in params.tied.values()] == [1]
    peft_is_wrong(model, params, idx, target_modules=targets)


def test_an_embedding_that_is_never_read():
    """get_input_embeddings() of an untied BART is unused: PEFT trains nothing and says nothing."""
    model = toy("bart_untied")
    params, inputs = learnt(model), inputs_of(model, 7, 3)
    assert torch.equal(logits(peft_of(model, IDX, params), inputs), logits(model, inputs))
    with pytest.warns(UserWarning, match=r"did not read .*'model.shared.weight'.*targets="):
        run(model, params, inputs)
    agree(model, learnt(model, targets=["encoder.embed_tokens", "decoder.embed_tokens"]))
