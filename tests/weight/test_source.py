"""Whether a call read the patched matrix."""

from __future__ import annotations

import pytest
import torch
import transformers
from torch import nn

from tests.helpers.models import D, V, make, tokens
from tests.helpers.oracle import snapshot
from tests.helpers.rows import random_rows
from ttfunc import functional_call, init_deltas, patch

X = tokens(7, 3)


@pytest.mark.parametrize("dense", [False, True])
def test_a_matrix_that_no_call_reads_is_told(dense: bool):
    model = make("tied")
    model.unused = nn.Embedding(V, D)
    weights = patch(random_rows(model, targets="unused"), dense=dense)
    before = snapshot(model)
    with pytest.raises(RuntimeError, match=r"did not read.*'unused.weight'.*no effect"):
        functional_call(model, weights, (X,))
    # What an earlier call read is no excuse.
    weights = patch(random_rows(model), dense=dense)
    functional_call(model, weights, (X,))
    with pytest.raises(RuntimeError, match="did not read the patched matrix"):
        functional_call(model, weights, (torch.zeros(2, D),), method="mix")
    assert snapshot(model) == before


def test_bart_without_ties_does_not_read_its_input_embedding():
    config = transformers.BartConfig(
        vocab_size=V, d_model=D, encoder_layers=1, decoder_layers=1, encoder_attention_heads=1,
        decoder_attention_heads=1, encoder_ffn_dim=8, decoder_ffn_dim=8, tie_word_embeddings=False,
        max_position_embeddings=32, pad_token_id=1,
    )  # fmt: skip
    model = transformers.BartForConditionalGeneration(config).eval()
    with pytest.raises(RuntimeError, match="did not read the patched matrix"):
        functional_call(model, patch(random_rows(model, targets="model.shared")), (X,))


def test_one_of_two_matrices_that_a_call_does_not_read_is_warned_of():
    model = make("untied")
    weights = patch(init_deltas(model, {"embed_tokens": [7, 3], "lm_head": [3]}))
    with pytest.warns(UserWarning, match=r"did not read.*'lm_head.weight'.*no effect") as caught:
        functional_call(model, weights, X, method="embed")
    assert caught[0].filename == __file__
