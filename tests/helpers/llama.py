"""The toy Llama."""

from __future__ import annotations

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from tests.helpers.models import D, V


def llama(
    *, tie: bool = True, vocabulary: int = V, width: int = D, layers: int = 2, **options
) -> LlamaForCausalLM:
    """A frozen Llama with no zero in it, the same at each call; `options` are its config's."""
    torch.manual_seed(3)
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=layers,
        num_attention_heads=2,
        tie_word_embeddings=tie,
        **{"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, **options},
    )
    model = LlamaForCausalLM(config).eval().requires_grad_(False)
    for parameter in model.parameters():
        parameter.normal_(std=0.3)
    return model.to(config.dtype or torch.float32)
