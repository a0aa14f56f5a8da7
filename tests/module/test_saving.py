"""A TokenModule over a PeftModel as one plain model, in memory and as a folder."""

from __future__ import annotations

import copy

import peft
import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

from tests.helpers.lessons import student
from tests.helpers.llama import llama
from tests.helpers.models import V
from tests.helpers.oracle import snapshot
from tests.helpers.rows import random_rows
from ttfunc import functional_call, load, patch, save
from ttfunc.module.token_module import TokenModule

pytestmark = pytest.mark.filterwarnings(
    "ignore:.is_gradient_checkpointing:FutureWarning"  # PEFT asks for it
)
IDS = {"old": [7, 3], "new": [V, V + 1], "both": [V + 1, 3, V]}
EMBEDDING = {"target_modules": ["q_proj", "embed_tokens"]}
# The tie, what the adapter is on, and which tokens have rows.
CASES = [
    *((tie, {"target_modules": "all-linear"}, ids) for tie in (True, False) for ids in IDS),
    (False, EMBEDDING, "old"),
    (False, {"target_modules": ["lm_head"]}, "old"),
    (True, {"target_modules": ["q_proj"], "modules_to_save": ["norm"]}, "both"),
    (True, {"target_modules": ["q_proj"], "use_dora": True}, "new"),
]


def module_of(tie, options, ids, **more) -> TokenModule:
    torch.manual_seed(2)
    config = peft.LoraConfig(r=2, init_lora_weights=False, **options)
    model = peft.get_peft_model(llama(tie=tie, **more), config).eval()
    ends = ["embed_tokens"] if tie else ["embed_tokens", "lm_head"]
    ends = [f"{e}.base_layer" if e in options["target_modules"] else e for e in ends]
    params = random_rows(model, IDS[ids], targets=None if "new" in ids else ends, grow=True)
    return TokenModule(model, params, train_base=True).eval()


def logits(model, ids: str) -> torch.Tensor:
    with torch.no_grad():
        return model(torch.tensor([[1, *IDS[ids], 2]])).logits


@pytest.mark.parametrize(("tie", "options", "ids"), CASES)
def test_the_folder_and_the_model_say_what_the_module_says(tie, options, ids, tmp_path):
    module = module_of(tie, options, ids)
    with torch.no_grad():
        for one in module.parameters():
            one.add_(0.1)
    expected, before = logits(module, ids), snapshot(module.base)
    trained = {name: one.requires_grad for name, one in module.base.named_parameters()}
    module.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    torch.testing.assert_close(logits(loaded, ids), expected)
    assert not any("lora" in name or "base_layer" in name for name in loaded.state_dict())
    plain = module.merge_and_unload()
    assert type(plain) is type(loaded)
    torch.testing.assert_close(logits(plain, ids), expected)
    height = V if ids == "old" else V + 2
    assert plain.config.vocab_size == loaded.config.vocab_size == height
    assert snapshot(module.base) == before
    assert {name: one.requires_grad for name, one in module.base.named_parameters()} == trained
    shared = {one.data_ptr() for one in module.base.parameters()}
    assert shared.isdisjoint(one.data_ptr() for one in plain.parameters())
    torch.testing.assert_close(logits(module, ids), expected, rtol=0, atol=0)


def test_a_copy_of_a_module_is_merged_with_its_own_adapter(tmp_path):
    module = module_of(True, {"target_modules": ["q_proj"]}, "both")
    copied = copy.deepcopy(module)
    with torch.no_grad():
        for one in copied.parameters():
            one.add_(0.3)
    expected = logits(copied, "both")
    assert not torch.allclose(expected, logits(module, "both"))
    torch.testing.assert_close(logits(copied.merge_and_unload(), "both"), expected)
    copied.save_pretrained(tmp_path, state_dict=copied.state_dict())  # as some trainers do
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    torch.testing.assert_close(logits(loaded, "both"), expected)


def test_a_base_in_half_precision_keeps_its_dtype(tmp_path):
    module = module_of(True, {"target_modules": ["q_proj"]}, "both", dtype=torch.bfloat16)
    module.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert {one.dtype for one in loaded.parameters()} == {torch.bfloat16}
    torch.testing.assert_close(logits(loaded, "both"), logits(module, "both"), rtol=0.05, atol=0.05)


@pytest.mark.filterwarnings(
    "ignore:Model has .tie_word_embeddings=True.", "ignore:Setting .save_embedding_layers."
)
def test_an_adapter_on_a_tied_matrix_is_refused(tmp_path):
    config = peft.LoraConfig(r=2, init_lora_weights=False, target_modules=["lm_head"])
    model = peft.get_peft_model(llama(), config).eval()
    rows = random_rows(model, [3], targets="embed_tokens")
    module = TokenModule(model, rows, train_base=True)
    before = snapshot(model)
    match = r"lm_head.*are one matrix, and the adapter is on it.* Save them apart \(ttfunc\.save\("
    for call in (module.merge_and_unload, lambda: module.save_pretrained(tmp_path / "a")):
        with pytest.raises(ValueError, match=match):
            call()
    assert not (tmp_path / "a").exists()
    assert snapshot(model) == before
    # As the message says.
    save(module.params(), tmp_path / "rows")
    module.base.save_pretrained(tmp_path / "b")
    loaded = peft.PeftModel.from_pretrained(llama(), tmp_path / "b").eval()
    weights = patch(load(tmp_path / "rows", loaded))
    x = torch.tensor([[1, 3, 2]])
    torch.testing.assert_close(functional_call(loaded, weights, x).logits, module(x).logits)


def test_what_has_no_adapter_to_merge_has_no_such_method():
    model = student()
    module = TokenModule(model, random_rows(model, [3]))
    with pytest.raises(AttributeError, match="no attribute 'merge_and_unload'"):
        module.merge_and_unload()


def test_a_plain_module_of_new_tokens_cannot_be_resized():
    class Words(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.emb, self.out = nn.Embedding(V, 4), nn.Linear(4, 4)

        def forward(self, x):
            return self.out(self.emb(x))

    model = peft.get_peft_model(Words(), peft.LoraConfig(r=2, target_modules=["out"]))
    module = TokenModule(model, random_rows(model, [V], grow=True), train_base=True)
    with pytest.raises(ValueError, match=r"Words cannot be resized for the new tokens"):
        module.merge_and_unload()
