"""Recipes of transformers' Trainer over a TokenModule, on ranks that each see a part of a batch."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor
from transformers import LlamaForCausalLM, Trainer
from transformers.distributed import DistributedConfig

from tests.engines.fsdp import accelerate_shards, saved, shard
from tests.engines.launch import ROOT
from tests.engines.work import Recipes, distance, refused
from tests.helpers.lessons import BATCH, NAME, STEPS, TOKENS, arguments, lessons, looped, student
from tests.helpers.rows import random_rows
from ttfunc import TokenModule, functional_call, init_deltas, load, patch, save

RECIPES = Recipes()
EVERY = {"save_strategy": "steps", "save_steps": 2}
LATE = f"checkpoint-{STEPS - 2}"


def bridge(sharded: bool) -> TokenModule:
    model = student()
    params = random_rows(model, TOKENS)
    return TokenModule(shard(model) if sharded else model, params)


def trained(
    folder: Path, module: TokenModule, resume: Path | None = None, **options: Any
) -> Tensor:
    """The rows after Trainer was at work; a step has the same texts on any number of ranks."""
    ranks = dist.get_world_size() if dist.is_initialized() else 1
    options["per_device_train_batch_size"] = BATCH // ranks
    if ranks > 1:
        options |= {"ddp_backend": "gloo", "ddp_find_unused_parameters": False}
    trainer = Trainer(model=module, args=arguments(folder, **options), train_dataset=lessons())
    trainer.train(resume_from_checkpoint=str(resume) if resume else None)
    return whole(module.params().deltas[NAME])


def whole(rows: Any) -> Tensor:
    rows = rows.full_tensor() if isinstance(rows, DTensor) else rows
    return rows.detach().clone()


def scratch() -> Path:
    """A new folder, the same for all ranks."""
    folder = [tempfile.mkdtemp() if dist.get_rank() == 0 else None]
    dist.broadcast_object_list(folder)
    return Path(str(folder[0]))


def alone(*arguments: object) -> None:
    """Train in one process that knows of no ranks, and come back on all of them."""
    if dist.get_rank() == 0:
        ranks = ("RANK", "WORLD_SIZE", "MASTER_", "GROUP_", "ROLE_", "TORCHELASTIC_", "LOCAL_")
        kept = {name: value for name, value in os.environ.items() if not name.startswith(ranks)}
        command = [sys.executable, "-m", "tests.engines.trainers", *map(str, arguments)]
        ran = subprocess.run(  # noqa: S603
            command, cwd=ROOT, env=kept, capture_output=True, text=True, check=False
        )
        if ran.returncode:
            raise RuntimeError(ran.stderr)
    dist.barrier()


def largest(**differences: float) -> dict[str, float]:
    """Of all ranks."""
    found = torch.tensor(list(differences.values()))
    dist.all_reduce(found, op=dist.ReduceOp.MAX)
    return dict(zip(differences, found.tolist(), strict=True))


@RECIPES.recipe("DDP over a plain model", sharded=False)
@RECIPES.recipe("DDP over an FSDP2 model", sharded=True)
def whole_and_resumed(sharded: bool) -> dict[str, float]:
    """Trained at once, and from a checkpoint in the middle: bit for bit the same."""
    folder = scratch()
    module = bridge(sharded)
    start = whole(module.params().deltas[NAME])
    rows = trained(folder / "whole", module, **EVERY)
    again = trained(folder / "again", bridge(sharded), folder / "whole" / LATE, **EVERY)
    kept = (folder / "whole" / LATE / "model.safetensors").stat().st_size
    return largest(
        unmoved=float(distance(rows, start) < 0.1),
        rows=distance(rows, looped()),
        resumed=float(not torch.equal(rows, again)),
        not_rows_alone=float(kept > 1024),
    )


@RECIPES.recipe("a model that transformers sharded as it loaded it")
def sharded_at_load() -> dict[str, float]:
    """Trainer leaves it unwrapped, takes the mean of the rows' gradient, and saves no optimizer."""
    config = DistributedConfig(fsdp_size=dist.get_world_size())
    model = LlamaForCausalLM.from_pretrained(saved(student()), distributed_config=config)
    model.eval().requires_grad_(False)
    start = random_rows(student(), TOKENS).deltas[NAME]
    module = TokenModule(model, init_deltas(model, TOKENS, init=start))
    folder = scratch()
    return {
        **refused(
            ValueError, "sharded at load time", lambda: trained(folder / "a", module, **EVERY)
        ),
        **largest(rows=distance(trained(folder / "b", module), looped())),
    }


@RECIPES.recipe("accelerate's FSDP2 around a TokenModule")
def around() -> dict[str, float]:
    """It looks for the model's layers among the submodules, of which the module has none."""
    return refused(ValueError, "LlamaDecoderLayer", lambda: accelerate_shards(bridge(False)))


@RECIPES.recipe("what two ranks saved, resumed in one process", sharded=True)
def two_to_one(sharded: bool) -> dict[str, float]:
    folder = scratch()
    trained(folder / "two", bridge(sharded), **EVERY)
    alone(folder / "one", folder / "rows.pt", folder / "two" / LATE)
    return largest(rows=distance(torch.load(folder / "rows.pt"), looped()))


@RECIPES.recipe("what one process saved, resumed on two ranks", sharded=True)
@RECIPES.recipe("what one process saved, resumed on two ranks, plain model", sharded=False)
def one_to_two(sharded: bool) -> dict[str, float]:
    folder = scratch()
    alone(folder / "one", folder / "rows.pt")
    rows = trained(folder / "two", bridge(sharded), folder / "one" / LATE)
    return largest(
        rows=distance(rows, looped()),
        of_the_one=distance(rows, torch.load(folder / "rows.pt")),
    )


@RECIPES.recipe("saved on one rank, loaded on all before they shard", early=True)
@RECIPES.recipe("saved on one rank, loaded on all after they sharded", early=False)
def saved_and_loaded(early: bool) -> dict[str, float]:
    folder, model = scratch(), student()
    plain = student()
    expected = random_rows(plain, TOKENS)
    start = expected.deltas[NAME]
    params = init_deltas(shard(student()), TOKENS, init=start)
    if dist.get_rank() == 0:
        save(params, folder / "rows.safetensors")
    dist.barrier()
    if not early:
        shard(model)
    loaded = load(folder / "rows.safetensors", model)
    if early:
        shard(model)
    x = torch.tensor([TOKENS])
    own = plain.get_input_embeddings().weight[TOKENS]
    return largest(
        rows=float(not torch.equal(loaded.deltas[NAME], start)),
        originals=float(not torch.equal(loaded.originals[NAME], own)),
        logits=distance(
            functional_call(model, patch(loaded), x).logits,
            functional_call(plain, patch(expected), x).logits,
        ),
    )


def main() -> None:
    """In one process: the folder of Trainer, the file for the rows, and what to resume from."""
    folder, file, *resume = map(Path, sys.argv[1:])
    torch.set_num_threads(1)
    torch.save(trained(folder, bridge(sharded=False), *resume, **EVERY), file)


if __name__ == "__main__":
    main()
