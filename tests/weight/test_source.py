"""Whether a call read the patched matrix."""

from __future__ import annotations

import pytest
import torch
import transformers
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from tests.helpers.models import D, Fused, Language, V, loss_of, make, tokens
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


class Checkpointed(Language):
    def head(self, h: Tensor) -> Tensor:
        return checkpoint(super().head, h, use_reentrant=False)


class ByScaledFunction(Language):
    def head(self, h: Tensor) -> Tensor:
        return Fused.apply(h, self.lm_head.weight) * 2


@pytest.mark.parametrize("kind", [Checkpointed, ByScaledFunction])
def test_rows_that_a_backward_reads_after_a_write_are_refused(kind: type[Language]):
    torch.manual_seed(0)
    model = kind().requires_grad_(False)
    params = random_rows(model, [7, 3], requires_grad=True)
    (rows,) = params.deltas.values()
    weights = patch(params)

    def loss() -> Tensor:
        return loss_of(functional_call(model, weights, (X,)))

    for _ in range(2):  # a patch that is made once serves each step
        late = loss()
        plain = loss_of(functional_call(model, patch(params, dense=True), (X,)))
        torch.testing.assert_close(
            torch.autograd.grad(loss(), rows), torch.autograd.grad(plain, rows)
        )
        with torch.no_grad():
            rows.add_(1)
        with pytest.raises(RuntimeError, match="have been modified by an inplace operation"):
            late.backward()
        assert rows.grad is None
