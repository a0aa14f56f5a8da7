"""What a call left unread, where the caller gives embeddings in place of tokens."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.helpers.llama import llama
from tests.helpers.models import tokens
from tests.helpers.oracle import edited
from ttfunc import TokenDeltas, TokenModule, functional_call, init_deltas, patch

X = tokens(7, 3)
NAME = "model.embed_tokens.weight"
BOTH = ["embed_tokens", "lm_head"]
LEFT_OUT = r"was given inputs_embeds and looked no token up in 'model.embed_tokens.weight'"


def rows(model: nn.Module, targets: list[str] | str) -> TokenDeltas:
    return init_deltas(model, [7, 3], targets=targets, init="normal", requires_grad=True)


def called(model: nn.Module, params: TokenDeltas, embeddings: Tensor) -> Tensor:
    given = {"inputs_embeds": embeddings, "labels": X}
    return functional_call(model, patch(params), kwargs=given)


@pytest.mark.parametrize(("tie", "targets"), [(True, "embed_tokens"), (False, BOTH)])
def test_embeddings_of_the_model_itself_are_told_once(tie: bool, targets: list[str]):
    model = llama(tie=tie)
    params = rows(model, targets)
    own = model.get_input_embeddings()(X)
    with pytest.warns(UserWarning, match=LEFT_OUT) as caught:
        logits = called(model, params, own).logits
    assert caught[0].filename == __file__
    torch.testing.assert_close(logits, edited(model, params)(inputs_embeds=own).logits)
    assert torch.equal(called(model, params, own).logits, logits)


def test_rows_of_an_untied_input_alone_are_no_error():
    model = llama(tie=False)
    params = rows(model, "embed_tokens")
    own = model.get_input_embeddings()(X)
    with pytest.warns(UserWarning, match=LEFT_OUT):
        logits = called(model, params, own).logits
    assert torch.equal(logits, model(inputs_embeds=own).logits)


@pytest.mark.parametrize("looked_up", ["patch", "module"])
@pytest.mark.parametrize("tie", [True, False])
def test_embeddings_with_the_rows_are_right(tie: bool, looked_up: str):
    model = llama(tie=tie)
    params = rows(model, "embed_tokens" if tie else BOTH)
    if looked_up == "patch":
        embeddings = F.embedding(X, patch(params)[NAME])
    else:
        embeddings = TokenModule(model, params).get_input_embeddings()(X)
    found = called(model, params, embeddings)
    expected = edited(model, params).requires_grad_(True)(X, labels=X)
    torch.testing.assert_close(found.logits, expected.logits)
    torch.testing.assert_close(found.loss, expected.loss)


def test_a_lookup_is_good_for_one_call():
    model = llama()
    params = rows(model, "embed_tokens")
    called(model, params, F.embedding(X, patch(params)[NAME]))
    functional_call(model, patch(params), kwargs={"input_ids": X})  # as in a step of training
    with pytest.warns(UserWarning, match=LEFT_OUT):
        called(model, params, model.get_input_embeddings()(X))


@pytest.mark.parametrize("tie", [True, False])
def test_a_module_generates_one_token_from_embeddings(tie: bool):
    model = llama(tie=tie)
    module = TokenModule(model, rows(model, "embed_tokens" if tie else BOTH)).eval()
    embeddings = module.get_input_embeddings()(X)
    for count in (1, 3):
        options = {"max_new_tokens": count, "do_sample": False}
        expected = edited(model, module.params()).generate(X, **options)[:, X.shape[1] :]
        assert torch.equal(module.generate(inputs_embeds=embeddings, **options), expected)
