"""A TokenModule that also trains what requires grad in its model, as a LoRA's parameters."""

from __future__ import annotations

import copy
import os
from pathlib import Path

import peft
import pytest
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from transformers import LlamaForCausalLM, Trainer

from tests.helpers.lessons import TOKENS, arguments, distance, lessons, student
from tests.helpers.ranks import join
from tests.helpers.rows import random_rows
from ttfunc import functional_call, patch
from ttfunc.module.token_module import TokenModule

pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")

X = torch.tensor([TOKENS, [1, 2, 48]])


def with_lora(targets=("q_proj", "v_proj")) -> peft.PeftModel:
    torch.manual_seed(6)
    config = peft.LoraConfig(r=2, target_modules=list(targets), init_lora_weights=False)
    return peft.get_peft_model(student(), config)


def made() -> tuple[TokenModule, dict[str, nn.Parameter]]:
    """A module over a model with a LoRA, and the parameters of the LoRA."""
    model = with_lora()
    module = TokenModule(model, random_rows(model, TOKENS), train_base=True)
    return module, {name: p for name, p in model.named_parameters() if p.requires_grad}


def test_its_parameters_are_the_rows_and_the_lora():
    module, lora = made()
    rows, *others = module.parameters()
    assert rows.shape == (3, 16)
    assert [id(one) for one in others] == [id(one) for one in lora.values()]
    names = [name for name, _ in module.named_parameters()]
    assert names[1].startswith("base/base_model/model/model/layers/0/self_attn/q_proj/lora_A/")
    entries = module.state_dict()
    assert len(entries) == 2 + len(lora)
    assert sum(one.numel() for one in entries.values()) < 1500


def test_its_gradients_are_those_of_full_training():
    module, lora = made()
    module.train()
    reference = copy.deepcopy(module.base).requires_grad_(True).train()
    matrix = reference.get_input_embeddings().weight
    with torch.no_grad():
        matrix[TOKENS] = next(module.parameters())
    reference(X, labels=X).loss.backward()
    module(X, labels=X).loss.backward()
    torch.testing.assert_close(next(module.parameters()).grad, matrix.grad[TOKENS])
    named = dict(reference.named_parameters())
    for name, parameter in lora.items():
        torch.testing.assert_close(parameter.grad, named[name].grad)


def test_a_model_with_a_lora_is_refused_unless_asked():
    model = with_lora()
    params = random_rows(model, TOKENS)
    match = r"8 parameters .* require grad .*train_base=True\)\. Or .*requires_grad_\(False\)"
    with pytest.raises(ValueError, match=match):
        TokenModule(model, params)


def test_a_matrix_with_rows_that_is_trained_whole_is_refused():
    model = student().requires_grad_(True)
    with pytest.raises(ValueError, match="the rest of the matrix would get no gradient"):
        TokenModule(model, random_rows(model, TOKENS), train_base=True)


@pytest.mark.parametrize("wrap", ["DDP", "compile"])
def test_a_wrapped_model_is_refused(wrap):
    model = student()
    params = random_rows(model, TOKENS)
    if wrap == "compile":
        wrapped = torch.compile(model, backend="eager")
    else:
        wrapped = object.__new__(DistributedDataParallel)
        nn.Module.__init__(wrapped)
    with pytest.raises(TypeError, match="Wrap the TokenModule of the model in it"):
        TokenModule(wrapped, params)


# What becomes of the parameters later


def test_a_lora_that_comes_later_is_noticed():
    model = student()
    module = TokenModule(model, random_rows(model, TOKENS))
    peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["q_proj"]))
    with pytest.raises(RuntimeError, match="4 parameters .* require grad since it was made"):
        module(X)


def test_a_second_lora_is_noticed():
    module, _ = made()
    module.base.add_adapter("other", peft.LoraConfig(r=2, target_modules=["k_proj"]))
    module.base.base_model.set_adapter(["default", "other"])
    with pytest.raises(RuntimeError, match=r"4 parameters .*k_proj.lora_A.other"):
        module(X)


def test_parameters_that_are_frozen_or_gone_are_noticed():
    module, lora = made()
    name = next(iter(lora))
    lora[name].requires_grad_(False)
    with pytest.raises(RuntimeError, match=f"1 parameters that a TokenModule trains .*'{name}'"):
        module(X)
    with torch.no_grad():
        module(X)
    lora[name].requires_grad_()
    module(X)
    module.base.merge_and_unload()
    with pytest.raises(RuntimeError, match="8 parameters .* or are no longer in it"):
        module(X)


@pytest.mark.filterwarnings("ignore:Model has .tie_word_embeddings=True:UserWarning")
def test_a_head_with_an_adapter_has_no_weight_to_take():
    model = with_lora(["lm_head"])
    module = TokenModule(model, random_rows(model, TOKENS), train_base=True)
    with pytest.raises(ValueError, match="Leave the head out of the adapter's target_modules"):
        module.get_output_embeddings()
    plain = functional_call(model, patch(module.params()), X).logits
    assert torch.equal(module(X).logits, plain)


# Copies and state


def test_a_copy_has_a_lora_of_its_own_over_the_same_model():
    module, lora = made()
    copied, expected = copy.deepcopy(module), module(X).logits
    assert torch.equal(copied(X).logits, expected)
    with torch.no_grad():
        for parameter in lora.values():
            parameter.add_(1)
    assert torch.equal(copied(X).logits, expected)
    assert not torch.equal(module(X).logits, expected)
    (loss := copied(X, labels=X).loss).backward()
    assert loss.requires_grad
    assert all(one.grad is not None for one in copied.parameters())
    assert all(one.grad is None for one in lora.values())


def test_state_dict_round_trip():
    module, lora = made()
    saved = copy.deepcopy(module.state_dict())
    expected = module(X).logits
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.mul_(2)
    module.load_state_dict(saved)
    assert torch.equal(module(X).logits, expected)
    assert all(dict(module.base.named_parameters())[name] is one for name, one in lora.items())


@pytest.mark.parametrize("strict", [True, False])
def test_a_state_dict_without_the_lora_is_refused_whole(strict):
    module, _ = made()
    before = copy.deepcopy(module.state_dict())
    other = {k: torch.zeros_like(v) if "deltas" in k else v for k, v in before.items()}
    del other[next(key for key in other if key.startswith("base/"))]
    with pytest.raises(RuntimeError, match="it lacks 1 parameters that are trained beside"):
        module.load_state_dict(other, strict=strict)
    for key, value in module.state_dict().items():
        assert torch.equal(value, before[key])


# Trainers


def trained(folder: Path, module: TokenModule, resume: Path | None = None, **options):
    """What was trained, after Trainer was at work."""
    trainer = Trainer(model=module, args=arguments(folder, **options), train_dataset=lessons())
    trainer.train(resume_from_checkpoint=str(resume) if resume else None)
    return [one.detach().clone() for one in module.parameters()]


def by_hand() -> list[Tensor]:
    """The same training as a plain loop over one call with both."""
    model = with_lora()
    params = random_rows(model, TOKENS, requires_grad=True)
    leaves = [*params.deltas.values(), *(p for p in model.parameters() if p.requires_grad)]
    optimizer = torch.optim.AdamW(leaves, lr=0.05, weight_decay=0.1)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / 6)
    examples = lessons()
    for step in range(6):
        batch = examples[4 * step : 4 * step + 4]
        x, y = (torch.stack([e[key] for e in batch]) for key in ("input_ids", "labels"))
        logits = functional_call(model, patch(params), kwargs={"input_ids": x}).logits
        loss = nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), y[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(leaves, 0.5)
        optimizer.step()
        schedule.step()
    return [leaf.detach() for leaf in leaves]


def check_close(found: list[Tensor], expected: list[Tensor]) -> None:
    assert len(found) == len(expected) == 9
    assert max(map(distance, found, expected)) < 5e-5


def test_trainer_trains_both_as_a_loop_by_hand_and_resumes(tmp_path):
    whole = trained(tmp_path / "a", made()[0], save_strategy="steps", save_steps=4)
    check_close(whole, by_hand())
    assert min(map(distance, whole, [p.detach() for p in made()[0].parameters()])) > 0.01
    checkpoint = tmp_path / "a" / "checkpoint-4"
    assert (checkpoint / "model.safetensors").stat().st_size < 8 * 1024
    resumed = trained(tmp_path / "b", made()[0], resume=checkpoint)
    for ours, theirs in zip(resumed, whole, strict=True):
        assert torch.equal(ours, theirs)


def test_two_ranks_equal_one_process(tmp_path):
    torch.multiprocessing.spawn(rank_trains, (tmp_path,), nprocs=2)
    ranks = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2)]
    for one, other in zip(*ranks, strict=True):
        assert torch.equal(one, other)
    check_close(ranks[0], by_hand())


def rank_trains(rank: int, folder: Path) -> None:
    """One of two ranks, each with half of every batch."""
    join(rank, folder)
    options = {"ddp_backend": "gloo", "ddp_find_unused_parameters": False}
    both = trained(folder, made()[0], gradient_accumulation_steps=1, **options)
    torch.save(both, folder / f"{rank}.pt")
    torch.distributed.barrier()
    os._exit(0)  # gloo's threads now and then abort a process that ends in torch's own way


def with_norms() -> TokenModule:
    model = student()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("norm" in name)
    return TokenModule(model, random_rows(model, TOKENS), train_base=True)


def test_a_copy_saves_what_it_trained(tmp_path):
    module = with_norms()
    copied = copy.deepcopy(module)
    with torch.no_grad():
        for parameter in copied.parameters():
            parameter.mul_(1.5)
        for one, folder in ((module, "a"), (copied, "b")):
            one.save_pretrained(tmp_path / folder)
            loaded = LlamaForCausalLM.from_pretrained(tmp_path / folder)
            torch.testing.assert_close(loaded(X).logits, one(X).logits)
        assert distance(module(X).logits, copied(X).logits) > 0.1


@pytest.mark.parametrize("grad", [True, False])
def test_torch_s_functional_call_replaces_all_of_its_parameters(grad):
    module = with_norms()
    others = {name: one.detach() * 2 for name, one in module.named_parameters()}
    expected = copy.deepcopy(module)
    with torch.no_grad():
        for parameter in expected.parameters():
            parameter.mul_(2)
    with torch.set_grad_enabled(grad):
        found = torch.func.functional_call(module, others, (X,)).logits
    torch.testing.assert_close(found, expected(X).logits)


def test_a_copy_keeps_the_modes_that_the_model_keeps():
    class Kept(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.norm = nn.Embedding(9, 4), nn.BatchNorm1d(4)

        def forward(self, x):
            return self.norm(self.embed(x))

        def train(self, mode=True):
            super().train(mode)
            self.norm.eval()
            return self

    model = Kept().requires_grad_(False).train()
    module = TokenModule(model, random_rows(model, [3], targets="embed"))
    copied = copy.deepcopy(module).train()
    x = torch.tensor([3, 4, 5])
    assert torch.equal(copied(x), module(x))
    assert not model.norm.training
    assert model.training


def test_train_base_with_nothing_to_train_warns():
    model = student().requires_grad_(False)
    with pytest.warns(UserWarning, match="nothing in .* requires grad.*before the TokenModule"):
        TokenModule(model, random_rows(model, TOKENS), train_base=True)
