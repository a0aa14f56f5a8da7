"""A TokenModule in TRL's trainers, against loops written by hand over whole logits."""

from __future__ import annotations

import copy

import peft
import pytest
import torch
import torch.nn.functional as F
from trl import (
    DPOConfig,
    DPOTrainer,
    GRPOConfig,
    GRPOTrainer,
    KTOConfig,
    KTOTrainer,
    RLOOConfig,
    RLOOTrainer,
    SFTConfig,
    SFTTrainer,
)
from trl.experimental import sdft, sdpo

import tests.helpers.oracle as oracle
from tests.helpers.trl import (
    SETTINGS,
    by_hand,
    dataset,
    folder_of,
    log_probs,
    losses_of,
    module_of,
    parts,
    pupil,
    pupil_tokenizer,
)
from ttfunc import patch
from ttfunc.module.token_module import TokenModule

pytestmark = pytest.mark.filterwarnings(
    "ignore:.is_gradient_checkpointing:FutureWarning",
    "ignore:.gradient_checkpointing:FutureWarning",
)

KINDS = {
    "text": ("text", {}),
    "prompt and completion": ("completion", {}),
    "chat": ("chat", {"assistant_only_loss": True}),
    "packed": ("text", {"packing": True, "max_length": 48}),
    "padding-free": ("text", {"padding_free": True, "max_length": None}),
    "dft": ("text", {"loss_type": "dft"}),
    "not checkpointed": ("text", {"gradient_checkpointing": False}),
    "reentrant": ("text", {"gradient_checkpointing_kwargs": {"use_reentrant": True}}),
    "not reentrant": ("text", {"gradient_checkpointing_kwargs": {"use_reentrant": False}}),
}


def sft(tmp_path, module, kind="text", eval=None, **options) -> SFTTrainer:
    settings = SFTConfig(folder_of(tmp_path), **{**SETTINGS, **options})
    words, data = pupil_tokenizer(), dataset(kind)
    return SFTTrainer(
        module, args=settings, train_dataset=data, eval_dataset=eval, processing_class=words
    )


@pytest.mark.parametrize("lora", [False, True], ids=["rows", "rows and LoRA"])
@pytest.mark.parametrize("kind", KINDS)
def test_sft_equals_a_loop_by_hand(tmp_path, kind, lora):
    form, options = KINDS[kind]
    module = module_of(lora=lora)
    trainer = sft(tmp_path, module, form, **options)
    batches = list(trainer.get_train_dataloader())
    assert any((batch["labels"] == -100).any() for batch in batches)
    before = oracle.snapshot(module.base)
    trainer.train()
    model, params = pupil(lora=lora)
    repeated = (batches * 3)[: SETTINGS["max_steps"]]
    losses, trained = by_hand(model, params, repeated, kind == "dft")
    assert losses_of(trainer) == pytest.approx(losses, rel=1e-5)
    assert len(parts(module)) == len(trained) == (9 if lora else 1)
    for ours, theirs in zip(parts(module), trained, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=2e-4)
    if not lora:
        module.eval()
        assert oracle.snapshot(module.base) == before


def test_sft_of_an_untied_model_trains_both_ends(tmp_path):
    module = module_of(tied=False)
    trainer = sft(tmp_path, module)
    batches = list(trainer.get_train_dataloader())
    trainer.train()
    losses, trained = by_hand(*pupil(tied=False), batches, dft=False)
    assert losses_of(trainer) == pytest.approx(losses, rel=1e-5)
    assert len(parts(module)) == len(trained) == 2
    for ours, theirs in zip(parts(module), trained, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=2e-4)


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_sft_trains_tokens_that_the_model_does_not_have(tmp_path, tied):
    module = module_of(tied, lora=True, grown=True)
    vocabulary = module.base.config.vocab_size
    trainer = sft(tmp_path, module)
    batches = list(trainer.get_train_dataloader())
    assert max(batch["input_ids"].max() for batch in batches) > vocabulary
    trainer.train()
    losses, trained = by_hand(*pupil(tied, lora=True, grown=True), batches, dft=False)
    assert losses_of(trainer) == pytest.approx(losses, rel=1e-5)
    for ours, theirs in zip(parts(module), trained, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=2e-4)
    assert len(module.base.get_input_embeddings().weight) == vocabulary


@pytest.mark.parametrize("lora", [False, True], ids=["rows", "rows and LoRA"])
def test_sft_in_mixed_precision(tmp_path, lora):
    module = module_of(lora=lora)
    trainer = sft(tmp_path, module, bf16=True)  # TRL's default
    batches = list(trainer.get_train_dataloader())
    trainer.train()
    losses, _ = by_hand(*pupil(lora=lora), batches, dft=False)
    assert losses_of(trainer) == pytest.approx(losses, rel=0.02)
    assert all(part.dtype == torch.float32 for part in parts(module))


@pytest.mark.parametrize("lora", [False, True], ids=["rows", "rows and LoRA"])
def test_sft_evaluates_with_what_it_trained(tmp_path, lora):
    module = module_of(lora=lora)
    trainer = sft(tmp_path, module, eval=dataset("text", 8))
    trainer.train()
    found = trainer.evaluate()["eval_loss"]
    (batch,) = trainer.get_eval_dataloader()
    each, mask = log_probs(module.base, patch(module.params()), batch)
    assert found == pytest.approx(-((each * mask).sum() / mask.sum()).item(), rel=1e-6)


@pytest.mark.parametrize("lora", [False, True], ids=["rows", "rows and LoRA"])
def test_sft_resumes_bit_for_bit_from_kilobytes(tmp_path, lora):
    options = {"save_strategy": "steps", "save_steps": 2}
    whole = module_of(lora=lora)
    sft(tmp_path / "a", whole, **options).train()
    checkpoint = tmp_path / "a" / "out" / "checkpoint-2"
    size = sum(file.stat().st_size for file in checkpoint.glob("*.safetensors"))
    assert size < 8 * 1024
    resumed = module_of(lora=lora)
    sft(tmp_path / "b", resumed, **options).train(resume_from_checkpoint=str(checkpoint))
    for ours, theirs in zip(parts(resumed), parts(whole), strict=True):
        assert torch.equal(ours, theirs)


# DPO


def dpo(tmp_path, module, reference, **options) -> DPOTrainer:
    settings = DPOConfig(folder_of(tmp_path), **{**SETTINGS, **options})
    words, data = pupil_tokenizer(), dataset("preference")
    return DPOTrainer(module, reference, args=settings, train_dataset=data, processing_class=words)


def preferred_by_hand(model, params, batches) -> tuple[list[float], list[torch.Tensor]]:
    """The sigmoid loss with beta 0.1 against the model as it was at the start."""
    trained = [
        *(delta.requires_grad_() for delta in params.deltas.values()),
        *(p for p in model.parameters() if p.requires_grad),
    ]
    optimizer = torch.optim.AdamW(trained, lr=SETTINGS["learning_rate"], weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / 3)
    first = copy.deepcopy((model, {name: d.detach() for name, d in params.deltas.items()}))
    (name,) = params.deltas
    ids = params.token_indices[name]
    with torch.no_grad():
        first[0].get_input_embeddings().weight[ids] = first[1][name]
    losses = []
    for batch in batches:
        labels = batch["input_ids"].masked_fill(batch["completion_mask"] == 0, -100)
        inputs = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]}
        sums = []
        for one, weights in ((model, patch(params)), (first[0], {})):
            with torch.set_grad_enabled(one is model):
                each, mask = log_probs(one, weights, {**inputs, "labels": labels})
            sums.append((each * mask).sum(1).chunk(2))
        (chosen, rejected), (was_chosen, was_rejected) = sums
        margin = (chosen - was_chosen) - (rejected - was_rejected)
        loss = -F.logsigmoid(0.1 * margin).mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
    return losses, [one.detach() for one in trained]


@pytest.mark.parametrize("how", ["a copy of the module", "before training"])
@pytest.mark.parametrize("lora", [False, True], ids=["rows", "rows and LoRA"])
def test_dpo_equals_a_loop_by_hand_with_one_copy_of_the_model(tmp_path, how, lora):
    module = module_of(lora=lora)
    if how == "before training":
        trainer = dpo(tmp_path, module, None, precompute_ref_log_probs=True)
    else:
        reference = copy.deepcopy(module)
        assert reference.base is module.base
        trainer = dpo(tmp_path, module, reference)
    batches = list(trainer.get_train_dataloader())
    trainer.train()
    losses, trained = preferred_by_hand(*pupil(lora=lora), batches)
    assert losses[0] == pytest.approx(0.6931, abs=1e-4)
    assert losses_of(trainer) == pytest.approx(losses, rel=1e-4)
    for ours, theirs in zip(parts(module), trained, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=5e-4)


# A reference that a trainer would load by the name of the model


def named(tmp_path, lora=False, grown=True, tied=True) -> TokenModule:
    """A module of a model that a trainer can load again."""
    module = module_of(tied, lora, grown)
    plain = module.base.unload() if lora else module.base
    plain.save_pretrained(tmp_path / "base")
    module = module_of(tied, lora, grown)
    module.config._name_or_path = str(tmp_path / "base")
    return module


def rewards(completions, **_):
    return [float(len(completion)) for completion in completions]


def online(kind, tmp_path, module, **options):
    trainer, config = {
        "GRPO": (GRPOTrainer, GRPOConfig),
        "RLOO": (RLOOTrainer, RLOOConfig),
    }[kind]
    settings = config(
        folder_of(tmp_path), num_generations=2, max_completion_length=4, **{**SETTINGS, **options}
    )
    data = dataset("completion").remove_columns("completion")
    words = pupil_tokenizer()
    return trainer(module, rewards, args=settings, train_dataset=data, processing_class=words)


@pytest.mark.parametrize("grown", [False, True], ids=["old", "new"])
@pytest.mark.parametrize("lora", [False, True], ids=["rows", "rows and LoRA"])
def test_a_reference_loaded_without_the_rows_is_refused_as_dpo_is_made(tmp_path, lora, grown):
    module = named(tmp_path, lora, grown)
    before = parts(module)
    match = r"DPOTrainer has loaded its ref_model .*Give ref_model=copy.deepcopy\(module\).eval"
    with pytest.raises(ValueError, match=match):
        dpo(tmp_path, module, None)
    assert [*map(torch.equal, parts(module), before)] == [True] * len(before)
    with pytest.raises(ValueError, match=match.replace("DPO", "KTO")):
        kto(tmp_path, module, None)


def kto(tmp_path, module, reference):
    settings = KTOConfig(folder_of(tmp_path), **SETTINGS)
    data = dataset("completion")
    data = data.add_column("label", [True, False] * (len(data) // 2))
    words = pupil_tokenizer()
    return KTOTrainer(module, reference, args=settings, train_dataset=data, processing_class=words)


def test_what_the_refusal_says_trains_dpo_and_kto_with_new_tokens(tmp_path):
    for make in (dpo, kto):
        module = named(tmp_path)
        reference = copy.deepcopy(module).eval()  # as the message says
        first = parts(reference)
        trainer = make(tmp_path, module, reference)
        trainer.train()
        assert losses_of(trainer)[0] == pytest.approx(0.6931 if make is dpo else 0.5, abs=1e-4)
        assert [*map(torch.equal, parts(reference), first)] == [True]
        assert not torch.equal(parts(module)[0], first[0])


def test_a_reference_that_the_caller_gives_is_the_caller_s(tmp_path):
    module = named(tmp_path, grown=False)
    plain = type(module.base).from_pretrained(tmp_path / "base")
    dpo(tmp_path, module, plain).train()
    dpo(tmp_path, module, None, precompute_ref_log_probs=True)  # none is loaded

    class Distilled(DPOTrainer):
        """With a model of the same name that its own `__init__` was given."""

        def __init__(self, teacher, *args, **kwargs) -> None:
            self.teacher = teacher
            super().__init__(*args, **kwargs)

    settings = DPOConfig(folder_of(tmp_path), **SETTINGS, precompute_ref_log_probs=True)
    given = {"train_dataset": dataset("preference"), "processing_class": pupil_tokenizer()}
    assert Distilled(plain, module, args=settings, **given).teacher is plain


@pytest.mark.parametrize("kind", ["GRPO", "RLOO"])
def test_a_trainer_that_takes_no_reference_is_told_another_way(tmp_path, kind):
    module = named(tmp_path)
    match = rf"{kind}Trainer .*trainer.beta, trainer.ref_model = 0.2, copy.deepcopy\(module\).eval"
    with pytest.raises(ValueError, match=match):
        online(kind, tmp_path, module, beta=0.2)
    trainer = online(kind, tmp_path, module, beta=0.0)
    trainer.beta, trainer.ref_model = 0.2, copy.deepcopy(module).eval()  # as the message says
    first = parts(module)
    assert trainer.ref_model.base is module.base
    trainer.train()
    apart = losses_of(trainer, "kl")
    assert apart[0] == pytest.approx(0, abs=1e-6)
    assert max(map(abs, apart)) > 1e-6
    assert torch.equal(parts(trainer.ref_model)[0], first[0])


@pytest.mark.filterwarnings("ignore:.*experimental:UserWarning")
@pytest.mark.parametrize("kind", ["base", "ema"])
def test_a_teacher_loaded_without_the_rows_is_refused(tmp_path, kind):
    module = named(tmp_path)
    data = dataset("completion").rename_column("completion", "privileged_context")
    options = {"train_dataset": data, "processing_class": pupil_tokenizer()}
    settings = {"num_generations": 2, "max_completion_length": 4, **SETTINGS}
    for make, config, more in (
        (sdft.SDFTTrainer, sdft.SDFTConfig, {}),
        (sdpo.SDPOTrainer, sdpo.SDPOConfig, {"reward_funcs": rewards}),
    ):
        given = config(folder_of(tmp_path), teacher_model_kind=kind, **settings)
        with pytest.raises(ValueError, match=r"Trainer would load its teacher_model .*'live', and"):
            make(module, args=given, **options, **more)
    given = config(folder_of(tmp_path), teacher_model_kind="live", **settings)
    trainer = make(module, args=given, **options, **more)
    trainer.teacher_model = copy.deepcopy(module).eval()  # as the message says
    first = parts(module)
    trainer.train()
    assert torch.equal(parts(trainer.teacher_model)[0], first[0])


@pytest.mark.parametrize("lora", [False, True], ids=["rows", "rows and LoRA"])
def test_a_lora_that_a_trainer_would_add_is_refused_with_the_way_out(tmp_path, lora):
    module, config = module_of(lora=lora), peft.LoraConfig(r=2, task_type="CAUSAL_LM")
    before = dict(module.base.named_parameters())
    match = r"Make the adapter first.*TokenModule\(peft.get_peft_model\(module.base, peft_config"
    with pytest.raises(TypeError, match=match):
        peft.get_peft_model(module, config)
    settings = SFTConfig(folder_of(tmp_path), **SETTINGS)
    words, data = pupil_tokenizer(), dataset("text")
    options = {"args": settings, "train_dataset": data, "processing_class": words}
    with pytest.raises(TypeError, match=match):
        SFTTrainer(module, peft_config=config, **options)
    assert dict(module.base.named_parameters()) == before
    if not lora:
        adapted = peft.get_peft_model(module.base, config)
        both = TokenModule(adapted, module.params(), train_base=True)  # as the message says
        first = parts(both)
        SFTTrainer(both, **options).train()
        assert not any(map(torch.equal, parts(both), first))
