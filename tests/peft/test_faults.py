"""Where PEFT's answers are wrong. The reference is a copy of the model with the rows written in."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from tests.helpers.models import ByReading, ByTranspose, Language, StorageTied
from tests.helpers.peft_reference import (
    EMBEDDING,
    HEAD,
    IDX,
    add,
    agree,
    far,
    filled,
    inputs_of,
    logits,
    peft_deltas,
    peft_is_wrong,
    peft_of,
    run,
    toy,
)
from tests.helpers.rows import random_rows
from ttfunc import merge

# --- Where PEFT's answers are wrong


@pytest.mark.parametrize("lora", [False, True], ids=["standalone", "lora"])
def test_a_tied_head_keeps_its_bias(lora: bool):
    """PEFT's logits lack exactly the bias."""
    model = toy("bert")
    params, inputs = random_rows(model, IDX), inputs_of(model, 7, 3)
    theirs = logits(peft_is_wrong(model, params, lora=lora), inputs)
    bias = model.cls.predictions.bias
    torch.testing.assert_close(run(model, params, inputs), theirs + bias)


@pytest.mark.parametrize("name", ["llama_tied", "bart"])
def test_a_second_adapter_on_a_tied_model(name: str):
    """PEFT's every forward raises."""
    model = toy(name)
    first, second = random_rows(model, [7, 3], 1), random_rows(model, [3, 41], 2)
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
    agree(model, random_rows(model, IDX))


@pytest.mark.parametrize("targets", [["lm_head"], ["embed_tokens", "lm_head"]])
def test_a_tied_head_among_the_targets(targets: list[str]):
    """With both, PEFT's every forward raises; with the head alone, merging changes its logits."""
    model = toy("llama_tied")
    params, inputs = random_rows(model, IDX, targets=targets), inputs_of(model, 7, 3)
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
    params, inputs = random_rows(model, IDX), inputs_of(model, 7, 3)
    wrapped = peft_is_wrong(model, params)
    wrapped.merge_adapter()
    torch.testing.assert_close(run(model, params, inputs), logits(wrapped, inputs))


def test_a_tie_by_memory():
    """Two parameters over one memory: PEFT trains one, and merging unties them."""
    model, idx = filled(StorageTied()), [7, 3]
    params = random_rows(model, idx)
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
    params = random_rows(model, idx, targets=targets)
    assert [len(names) for names in params.tied.values()] == [1]
    peft_is_wrong(model, params, idx, target_modules=targets)


def test_an_embedding_that_is_never_read():
    """get_input_embeddings() of an untied BART is unused: PEFT trains nothing and says nothing."""
    model = toy("bart_untied")
    params, inputs = random_rows(model, IDX), inputs_of(model, 7, 3)
    assert torch.equal(logits(peft_of(model, IDX, params), inputs), logits(model, inputs))
    with pytest.raises(RuntimeError, match=r"did not read .*'model.shared.weight'.*targets="):
        run(model, params, inputs)
    agree(model, random_rows(model, IDX, targets=["encoder.embed_tokens", "decoder.embed_tokens"]))
