"""Toy models of transformers, PEFT around them, and what it means that the two agree."""

from __future__ import annotations

import contextlib
import copy
import re
import warnings

import peft
import torch
import transformers
from torch import Tensor, nn

from tests.helpers.models import loss_of, tokens
from tests.helpers.oracle import edited, row_gradients
from tests.helpers.rows import random_rows
from ttfunc import TokenDeltas, functional_call, patch

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
    params = random_rows(model, idx, targets=targets)
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
