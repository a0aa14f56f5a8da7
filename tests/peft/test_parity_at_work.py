"""PEFT's behaviours, 37 and 38: training, generating, compiling, copying."""

from __future__ import annotations

import copy

import pytest
import torch

from tests.helpers.models import loss_of
from tests.helpers.peft_reference import (
    EMBEDDING,
    IDX,
    V,
    far,
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
from ttfunc import functional_call, init_deltas, merge, patch


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
    params, x = random_rows(model, IDX), inputs_of(model, 7, 3)["input_ids"]
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
    params, inputs, runs = random_rows(model, IDX, requires_grad=True), inputs_of(model, 7, 3), []
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
    params, inputs = random_rows(model, IDX), {**inputs_of(model, 7, 3), "use_cache": False}
    call = torch.compile(run, backend="aot_eager", fullgraph=True)
    expected = logits(peft_of(model, IDX, params), inputs)
    torch.testing.assert_close(call(model, params, inputs, False), expected)
    assert far(call(model, init_deltas(model, IDX), inputs, False), expected)


def test_38_deepcopy():
    """38. A copy of the rows is apart from them; for a copy of the model rows are made anew."""
    model = toy("llama_tied")
    params, inputs = random_rows(model, IDX), inputs_of(model, 7, 3)
    expected = logits(copy.deepcopy(peft_of(model, IDX, params)), inputs)
    rows, other = copy.deepcopy(params), copy.deepcopy(model)
    params.deltas[EMBEDDING].zero_()
    torch.testing.assert_close(run(model, rows, inputs), expected)
    assert far(run(model, params, inputs), expected)
    with pytest.raises(ValueError, match="stale patch"):
        run(other, rows, inputs)
    torch.testing.assert_close(run(other, random_rows(other, IDX), inputs), expected)


def test_38_resizing_and_tying_afterwards():
    """38. PEFT's model cannot be resized or tied any more; the plain one can."""
    model = toy("llama_tied")
    params, inputs = random_rows(model, IDX), inputs_of(model, 7, 3)
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
