"""PEFT's behaviours, 10 to 17: what is tied, and what the embedding does of its own."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from tests.helpers.models import Language, loss_of, tokens
from tests.helpers.oracle import same_bits
from tests.helpers.peft_reference import (
    EMBEDDING,
    HEAD,
    IDX,
    agree,
    agree_with_peft,
    filled,
    gradients,
    inputs_of,
    logits,
    peft_deltas,
    peft_of,
    run,
    toy,
)
from tests.helpers.rows import random_rows
from ttfunc import init_deltas, merge, patch


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
    inputs, params = inputs_of(model, 7, 3), random_rows(model, IDX)
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
        init_deltas(model, [7, 0])
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
    without = gradients(plain, random_rows(plain, [7, 3]), inputs)["embed_tokens.weight"]
    assert not torch.allclose(found, without)
    tied = filled(Language(**option))
    agree(tied, random_rows(tied, [7, 3]), inputs=inputs)


def test_17_sparse_gradients_are_for_the_matrix_alone():
    """17. PEFT sends a sparse gradient through the copy of the rows, which takes none."""
    model, plain = filled(Language(tie=False, sparse=True)), filled(Language(tie=False))
    inputs = {"x": tokens(3)}
    with pytest.raises(RuntimeError, match="unsupported for Sparse"):
        loss_of(logits(peft_of(model, [3]), inputs)).backward()
    found, expected = (
        gradients(one, init_deltas(one, [3]), inputs)["embed_tokens.weight"]
        for one in (model, plain)
    )
    assert torch.equal(found, expected)
