"""The lessons of teach_a_token.py, taught on several ranks that each hold a part of the model.

FSDP2 shards the frozen model. Each rank takes its share of every batch, and the gradient of the
rows is summed over the ranks: by a line of ours, or with `--trainer` by DDP in transformers'
Trainer. In one process the same lines teach the same rows, which the others are compared with.

    python -m examples.teach_on_ranks [--quick] [--trainer] [--model FOLDER_OR_HUB_NAME]
    torchrun --nproc-per-node 2 -m examples.teach_on_ranks [the same options]
"""

from __future__ import annotations

import contextlib
import os
import random
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import optree
import torch
import torch.distributed as dist
import transformers
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import ttfunc
from examples.shared.calculator import Lesson, add_tokens, loss_of, read_lessons, report
from examples.shared.options import arguments
from examples.shared.smollm2 import folder_of, load
from examples.teach_with_trainer import batch, example

BATCH = 8  # lessons in a step, on all ranks together
RANK, RANKS = (int(os.environ.get(name, n)) for name, n in (("RANK", 0), ("WORLD_SIZE", 1)))


def main() -> None:
    flags = {"trainer": "let transformers' Trainer do it"}
    options = arguments(__doc__ or "", flags, steps=(120, 12), rate=(0.02, 0.02))
    # A process that torchrun did not start is a group of its own.
    store = None if dist.is_torchelastic_launched() else dist.HashStore()  # type: ignore[attr-defined]
    dist.init_process_group("gloo", store=store, rank=RANK, world_size=RANKS)
    if RANK == 0:
        folder_of(options.model, options.cache)  # fetched once
    dist.barrier()
    folder = folder_of(options.model, options.cache)
    model, tokenizer = load(folder)
    idx, start = add_tokens(tokenizer)
    train, held_out = read_lessons(tokenizer)
    held_out = held_out[:4] if options.quick else held_out
    params = ttfunc.init_deltas(model, idx, grow=True, init=start, requires_grad=True)
    if RANK == 0:
        report("before", model, params, tokenizer, held_out)
    dist.barrier()
    if RANKS > 1:
        shard(model)

    batches = [random.sample(train, BATCH) for _ in range(options.steps)]
    teach, began = (by_trainer if options.trainer else by_hand), time.perf_counter()
    teach(model, params, batches, options.rate)
    print(f"{options.steps} steps in {time.perf_counter() - began:.0f} s on {RANKS} rank(s)")
    with torch.no_grad():
        print(f"held-out loss of the model as it lies: {loss_of(model, params, held_out):.6f}")

    if RANK == 0:  # the rows are the same on every rank
        finish(params, options, folder, tokenizer, held_out)
    dist.barrier()
    dist.destroy_process_group()


def shard(model: Any) -> None:
    """Each block, and the root with the token matrix: a part of every tensor is on each rank."""
    mesh = init_device_mesh("cpu", (RANKS,))
    for block in model.model.layers:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    here = sum(p.to_local().nbytes for p in model.parameters())
    print(f"{here / 2**20:.0f} of {sum(p.nbytes for p in model.parameters()) / 2**20:.0f} MiB here")


def by_hand(
    model: Any, params: ttfunc.TokenDeltas, batches: list[list[Lesson]], rate: float
) -> None:
    """Adam on the rows. A rank's loss has the weight of its labels: all labels count the same."""
    leaves: list[Any] = optree.tree_leaves(params)  # type: ignore[arg-type]
    optimizer, schedule = adam(params, rate, len(batches))
    for step, lessons in enumerate(batches):
        mine = lessons[RANK::RANKS]
        total = torch.tensor(sum(len(lesson.answer_ids) for lesson in mine))
        dist.all_reduce(total)
        loss = loss_of(model, params, mine, reduction="sum") / total
        optimizer.zero_grad()
        loss.backward()
        for rows in leaves:
            dist.all_reduce(rows.grad)
        optimizer.step()
        schedule.step()
        dist.all_reduce(loss := loss.detach())
        if (step + 1) % max(1, len(batches) // 6) == 0:
            print(f"    step {step + 1:3}: loss {loss:.6f}")


def by_trainer(
    model: Any, params: ttfunc.TokenDeltas, batches: list[list[Lesson]], rate: float
) -> None:
    """The same steps: Trainer puts the TokenModule, and not the model, into DDP."""
    with tempfile.TemporaryDirectory() as folder:
        settings = transformers.TrainingArguments(
            output_dir=folder,
            max_steps=len(batches),
            per_device_train_batch_size=BATCH // RANKS,
            train_sampling_strategy="sequential",
            max_grad_norm=0,
            ddp_find_unused_parameters=False,
            use_cpu=True,
            dataloader_pin_memory=False,
            logging_steps=max(1, len(batches) // 6),
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
        )
        transformers.Trainer(
            model=ttfunc.TokenModule(model, params),
            args=settings,
            train_dataset=[example(lesson) for lessons in batches for lesson in lessons],
            data_collator=batch,
            optimizers=adam(params, rate, len(batches)),
        ).train()
    model.eval()


def adam(params: ttfunc.TokenDeltas, rate: float, steps: int) -> tuple[Any, Any]:
    optimizer = torch.optim.Adam(optree.tree_leaves(params), lr=rate)  # type: ignore[arg-type]
    return optimizer, torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.1, steps)


def finish(
    params: ttfunc.TokenDeltas, options: Any, folder: Path, tokenizer: Any, held_out: list[Lesson]
) -> None:
    """Save the rows, try them on a model in one piece, and compare them with one process's."""
    of_one = options.output / f"rows_of_one_process_{options.steps}_{options.seed}.safetensors"
    alone = RANKS == 1 and not options.trainer
    file = of_one if alone else options.output / "rows.safetensors"
    ttfunc.save(params, file)
    print(f"rows in {file}")
    plain, _ = load(folder)
    loaded = ttfunc.load(file, plain)
    report("after", plain, loaded, tokenizer, held_out)
    if alone:
        return
    if not of_one.exists():
        print("compare with one process: python -m examples.teach_on_ranks, with the same options")
        return
    pairs = zip(loaded.deltas.values(), ttfunc.load(of_one, plain).deltas.values(), strict=True)
    apart = max(float((a - b).abs().max()) for a, b in pairs)
    print(f"largest difference of the rows from those of one process: {apart:.1e}")
    if not apart < 1e-4:
        raise RuntimeError(f"{RANKS} rank(s) train other rows than one process")


if __name__ == "__main__":
    with contextlib.redirect_stdout(sys.stdout if RANK == 0 else None):
        main()
