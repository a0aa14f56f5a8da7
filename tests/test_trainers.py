"""A TokenModule in what trains modules: transformers' Trainer, accelerate, Lightning, and DDP."""

from __future__ import annotations

from pathlib import Path

import accelerate
import pytest
import pytorch_lightning as lightning
import torch
from accelerate.utils import extract_model_from_parallel
from torch import Tensor
from transformers import Trainer

import tests.helpers.oracle as oracle
from tests.helpers.lessons import (
    ACCUMULATE,
    BATCH,
    IDS,
    NAME,
    RATE,
    ROWS,
    STEPS,
    TOKENS,
    arguments,
    bridge,
    distance,
    lessons,
    looped,
    student,
)
from tests.helpers.llama import llama
from tests.helpers.ranks import join
from tests.helpers.rows import random_rows
from ttfunc import functional_call, init_deltas, merge, patch
from ttfunc.module.token_module import TokenModule


def trained(folder: Path, module: TokenModule, resume: Path | None = None, **options) -> Tensor:
    """The rows after Trainer was at work."""
    trainer = Trainer(model=module, args=arguments(folder, **options), train_dataset=lessons())
    trainer.train(resume_from_checkpoint=str(resume) if resume else None)
    return module.params().deltas[NAME].detach().clone()


# transformers' Trainer


def test_trainer_equals_the_functional_loop(tmp_path):
    module = bridge()
    before = oracle.snapshot(module.base)
    rows = trained(tmp_path, module)
    assert distance(rows, bridge().params().deltas[NAME]) > 0.1
    assert distance(rows, looped()) < 2e-6
    module.eval()
    assert oracle.snapshot(module.base) == before


def test_trainer_on_new_tokens_equals_that_on_a_model_that_has_them(tmp_path):
    """The labels are new tokens, and the loss is the model's own."""
    small = llama(vocabulary=48, width=16)
    state = {name: tensor[:48] for name, tensor in student().state_dict().items()}
    small.load_state_dict(state)
    start = bridge().params().deltas[NAME].detach()
    params = init_deltas(small, TOKENS, grow=True, init=start)
    module = TokenModule(small, params)
    rows = trained(tmp_path, module, save_strategy="steps", save_steps=4)
    assert distance(rows, looped()) < 2e-6
    assert (small.config.vocab_size, len(small.lm_head.weight)) == (48, 48)
    again = TokenModule(small, init_deltas(small, TOKENS, grow=True, init=start))
    assert torch.equal(trained(tmp_path / "b", again, tmp_path / "checkpoint-4"), rows)
    plain, options = bridge(), arguments(tmp_path, label_smoothing_factor=0.1)
    with torch.no_grad():
        plain.params().deltas[NAME].copy_(rows)
    found = [
        Trainer(model=one, args=options, eval_dataset=lessons()).evaluate()["eval_loss"]
        for one in (module, plain)
    ]
    assert found[0] == pytest.approx(found[1], rel=1e-6)


def test_trainer_resumes_bit_for_bit_from_kilobytes(tmp_path):
    whole = trained(tmp_path / "a", bridge(), save_strategy="steps", save_steps=2)
    checkpoint = tmp_path / "a" / "checkpoint-4"
    assert torch.equal(trained(tmp_path / "b", bridge(), resume=checkpoint), whole)
    assert (checkpoint / "model.safetensors").stat().st_size < 1024
    assert sum(file.stat().st_size for file in checkpoint.iterdir()) < 64 * 1024


def test_trainer_does_not_resume_the_rows_of_other_tokens(tmp_path):
    trained(tmp_path, bridge(), save_strategy="steps", save_steps=STEPS)
    model = student()
    module = TokenModule(model, random_rows(model, [48, 6, 49]))
    with pytest.raises(RuntimeError, match=r"tokens \[48, 5, 49\].*trains \[48, 6, 49\]"):
        trained(tmp_path, module, resume=tmp_path / f"checkpoint-{STEPS}")


@pytest.mark.parametrize("reentrant", [True, False])
def test_trainer_with_checkpointed_activations(tmp_path, reentrant):
    module = bridge()
    options = {"use_reentrant": reentrant}
    rows = trained(
        tmp_path, module, activation_checkpointing=True, activation_checkpointing_kwargs=options
    )
    assert module.is_activation_checkpointing
    assert distance(rows, looped()) < 2e-6
    module.activation_checkpointing_disable()
    assert not module.base.is_activation_checkpointing


def test_trainer_in_mixed_precision(tmp_path):
    module = bridge()
    rows = trained(tmp_path, module, bf16=True)
    assert rows.dtype == torch.float32
    assert 0 < distance(rows, looped()) < 0.05
    unwrapped = extract_model_from_parallel(module, keep_fp32_wrapper=False)
    x = torch.tensor([TOKENS])
    assert unwrapped is module
    assert torch.equal(
        module(x).logits, functional_call(module.base, patch(module.params()), x).logits
    )


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_trainer_evaluates_it_as_the_merged_model(tmp_path, smoothing):
    module, merged = bridge(), student()
    with torch.no_grad():
        merged.load_state_dict(merge(merged.state_dict(), module.params()))
    options = arguments(tmp_path, label_smoothing_factor=smoothing)
    measured = [
        Trainer(model=model, args=options, eval_dataset=lessons()).evaluate()["eval_loss"]
        for model in (module, merged)
    ]
    assert measured[0] == pytest.approx(measured[1], rel=1e-6)


# Lightning

OF_LIGHTNING_ITSELF = pytest.mark.filterwarnings(
    "ignore:.isinstance.treespec, LeafSpec:FutureWarning",
    "ignore:.*does not have many workers:UserWarning",
    "ignore:The dirpath has changed:UserWarning",
)


class Lesson(lightning.LightningModule):
    """What a user of Lightning writes; the module with the rows is an ordinary submodule of it."""

    def __init__(self, module: TokenModule) -> None:
        super().__init__()
        self.model = module

    def training_step(self, batch: dict[str, Tensor]) -> Tensor:
        return self.model(**batch).loss

    def train_dataloader(self) -> torch.utils.data.DataLoader:
        size = BATCH * ACCUMULATE  # an epoch of two steps, with texts of its own
        first = 2 * size * self.trainer.current_epoch
        return torch.utils.data.DataLoader(lessons()[first : first + 2 * size], batch_size=size)

    def configure_optimizers(self):
        optimizer = torch.optim.AdamW(self.parameters(), lr=RATE, weight_decay=0.1)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / STEPS)
        return [optimizer], [{"scheduler": schedule, "interval": "step"}]


def taught(folder: Path, module: TokenModule, resume: Path | None = None, **options) -> Tensor:
    """The rows after Lightning was at work."""
    saver = lightning.callbacks.ModelCheckpoint(folder, every_n_train_steps=2, save_top_k=-1)
    trainer = lightning.Trainer(
        max_steps=STEPS,
        reload_dataloaders_every_n_epochs=1,
        gradient_clip_val=0.5,
        accelerator="cpu",
        callbacks=[saver],
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **options,
    )
    trainer.fit(Lesson(module.train()), ckpt_path=resume)
    return module.params().deltas[NAME].detach().clone()


@OF_LIGHTNING_ITSELF
def test_lightning_equals_the_functional_loop(tmp_path):
    module = bridge()
    before = oracle.snapshot(module.base)
    rows = taught(tmp_path, module)
    assert distance(rows, looped()) < 2e-6
    module.eval()
    assert oracle.snapshot(module.base) == before


@OF_LIGHTNING_ITSELF
def test_lightning_resumes_bit_for_bit_from_kilobytes(tmp_path):
    whole = taught(tmp_path / "a", bridge())
    (checkpoint,) = (tmp_path / "a").glob("*step=4.ckpt")
    assert checkpoint.stat().st_size < 16 * 1024
    kept = torch.load(checkpoint, weights_only=True)["state_dict"]
    assert kept.keys() == {f"model.{ROWS}", f"model.{IDS}"}
    assert torch.equal(taught(tmp_path / "b", bridge(), resume=checkpoint), whole)


# accelerate, and two processes


def test_accelerate_prepares_it():
    module = bridge()
    accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=2)
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    loader = torch.utils.data.DataLoader(lessons(), batch_size=4)
    prepared, optimizer, loader = accelerator.prepare(module, optimizer, loader)
    before = oracle.snapshot(module.base)
    for batch in loader:
        with accelerator.accumulate(prepared):
            accelerator.backward(prepared(**batch).loss)
            optimizer.step()
            optimizer.zero_grad()
    assert accelerator.unwrap_model(prepared) is module
    assert accelerator.get_state_dict(prepared).keys() == {ROWS, IDS}
    assert distance(module.params().deltas[NAME], bridge().params().deltas[NAME]) > 0.01
    assert oracle.snapshot(module.base) == before


def test_two_ranks_equal_one_process(tmp_path):
    torch.multiprocessing.spawn(rank_trains, (tmp_path,), nprocs=2)
    ranks = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2)]
    assert torch.equal(ranks[0], ranks[1])
    assert distance(ranks[0], looped()) < 2e-6


def rank_trains(rank: int, folder: Path) -> None:
    """One of two ranks, each with half of every batch."""
    join(rank, folder)
    module = bridge()
    before = oracle.snapshot(module.base)
    options = {"ddp_backend": "gloo", "ddp_find_unused_parameters": False}
    rows = trained(folder, module, gradient_accumulation_steps=1, **options)
    after = oracle.snapshot(module.base)
    assert (after["bytes"], after["gradients"]) == (before["bytes"], before["gradients"])
    torch.save(rows, folder / f"{rank}.pt")
    torch.distributed.destroy_process_group()
