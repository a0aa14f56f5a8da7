"""The models of the grid: the corpus and some of transformers, plain and in an adapter of PEFT."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

import peft
import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn

from tests.helpers import models

SIZE = 37  # of a vocabulary of transformers' models; nothing else in them is of that size
SIZES = {
    **dict.fromkeys(["hidden_size", "d_model"], 8),
    **dict.fromkeys(["num_hidden_layers", "num_layers", "encoder_layers", "decoder_layers"], 1),
    **dict.fromkeys(["num_attention_heads", "num_key_value_heads", "num_heads"], 2),
    **dict.fromkeys(["encoder_attention_heads", "decoder_attention_heads"], 2),
    **dict.fromkeys(["head_dim", "d_kv"], 4),
    **dict.fromkeys(["intermediate_size", "d_ff", "encoder_ffn_dim", "decoder_ffn_dim"], 16),
    **{"max_position_embeddings": 32, "attn_implementation": "eager"},
    **dict.fromkeys(["pad_token_id", "decoder_start_token_id"], 0),
    **dict.fromkeys(["eos_token_id", "forced_eos_token_id"]),  # so that texts end together
}


class OneBias(models.Language):
    """BART's: untied, with one bias of the logits above both matrices."""

    def __init__(self, size: int) -> None:
        super().__init__(tie=False, vocabulary=size)
        self.register_buffer("final_logits_bias", torch.zeros(1, size))

    def head(self, h: Tensor) -> Tensor:
        return super().head(h) + self.final_logits_bias


class Family(NamedTuple):
    """How to build a model, and the names of its parts."""

    build: Callable[[int], nn.Module]  # with a vocabulary of this size
    embedding: str = "embed_tokens"
    head: str = "lm_head"
    body: str = "body"
    size: int = models.V
    tied: bool = True
    generates: bool = False


def _built(name: str, tie: bool, size: int) -> nn.Module:
    kind: Any = getattr(transformers, name)
    config = kind.config_class(**SIZES, vocab_size=size, tie_word_embeddings=tie)
    return kind(config)


def _of_transformers(
    name: str, embedding: str, *, head: str = "lm_head", body: str = "q_proj", tie: bool = True
) -> Family:
    build = partial(_built, name, tie)
    return Family(build, embedding, head, body, SIZE, tie, generates="Masked" not in name)


FAMILIES = {
    **{
        case: Family(lambda size, case=case: models.CORPUS[case](vocabulary=size))
        for case in models.CORPUS
    },
    "untied": Family(lambda size: models.CORPUS["untied"](vocabulary=size), tied=False),
    "one_bias": Family(OneBias, tied=False),
    "llama": _of_transformers("LlamaForCausalLM", "model.embed_tokens"),
    "llama_untied": _of_transformers("LlamaForCausalLM", "model.embed_tokens", tie=False),
    "phi": _of_transformers("PhiForCausalLM", "model.embed_tokens", tie=False),
    "gemma": _of_transformers("Gemma3ForCausalLM", "model.embed_tokens"),
    "bert": _of_transformers(
        "BertForMaskedLM",
        "bert.embeddings.word_embeddings",
        head="cls.predictions.decoder",
        body="query",
    ),
    "t5": _of_transformers("T5ForConditionalGeneration", "shared", body="q"),
    "bart": _of_transformers("BartForConditionalGeneration", "model.shared"),
}

# The adapters of PEFT: what they put a LoRA on, and what they train a whole copy of.
WRAPS = ("plain", "lora_body", "lora_head", "lora_embedding", "saved_head", "saved_embedding")


def built(family: Family, wrap: str, size: int) -> nn.Module:
    """A frozen model with a vocabulary of this size, in the adapter."""
    model = family.build(size)
    if wrap != "plain":
        kind, part = wrap.split("_")
        module = getattr(family, part)
        options: dict[str, Any] = (
            {"target_modules": [module]}
            if kind == "lora"
            else {"target_modules": [family.body], "modules_to_save": [module]}
        )
        config = peft.LoraConfig(r=2, init_lora_weights=False, **options)
        with warnings.catch_warnings():  # of a tie between what the adapter is on and what not
            warnings.simplefilter("ignore")
            model = peft.get_peft_model(model, config)
    return model.eval().requires_grad_(False)


@torch.no_grad()
def filled(model: nn.Module, seed: int) -> nn.Module:
    """The model with no zero in it, to hide a mistake behind."""
    generator = torch.Generator().manual_seed(seed)
    biases = [one for name, one in model.named_buffers() if name.endswith("final_logits_bias")]
    for tensor in [*model.parameters(), *biases]:
        tensor.normal_(std=0.5, generator=generator)
    return model


@torch.no_grad()
def longer(state: Mapping[str, Tensor], family: Family, wrap: str, size: int) -> nn.Module:
    """The model of this state, built with a larger vocabulary: zeros are what that one has not."""
    made = built(family, wrap, size)
    for name, tensor in made.state_dict().items():
        tensor.zero_()[tuple(map(slice, state[name].shape))] = state[name]
    return made


def inputs_of(model: nn.Module, ids: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
    """The keyword arguments of a call. `labels` are given where the model makes its own loss."""
    if not hasattr(model, "config") or not hasattr(model.config, "vocab_size"):
        return {"x": ids}
    inputs = {"input_ids": ids}
    if model.config.is_encoder_decoder:
        inputs["decoder_input_ids"] = ids.flip(1)
    return inputs if labels is None else {**inputs, "labels": labels}


def results_of(out: Any, labels: Tensor) -> tuple[Tensor, Tensor]:
    """The logits and the loss."""
    if isinstance(out, Tensor):
        return out, F.cross_entropy(out.flatten(0, -2), labels.flatten())
    return out.logits, out.loss
