"""The same call on sharded engines: how far it is from one process, and what a step costs there.

By default a table of each recipe of tests/engines, as torchrun runs it: the largest difference of
the logits and of the rows' gradients from one process, or what was refused. With `--time` a step
under DDP and under FSDP2, times a step of the frozen model there.

python -m bench.engines [--time] [--repeats 9] [--vocabulary 49152] [--width 576] [--quick]
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import ttfunc
from bench.contestants import Work
from bench.memory import trim_heap
from bench.report import print_table
from bench.timing import in_turns
from tests.engines.launch import launch, wrong
from tests.engines.test_engines import RANKS
from tests.helpers.ranks import leave


def run_recipes(engines: list[str]) -> None:
    """A row for each recipe of each engine."""
    rows = []
    for engine in engines:
        with tempfile.TemporaryDirectory() as folder:
            found = launch(engine, RANKS[engine], Path(folder))
        bad = wrong(found)
        for name, result in found.items():
            cells = {} if isinstance(result, str) else dict(result)
            refused = "refused" in cells
            shown = [_shown(cells.pop(what, None)) for what in ("logits", "rows")]
            others = "refused" if refused else ", ".join(f"{n} {v:.1g}" for n, v in cells.items())
            rows.append([engine, name, *shown, others, "WRONG" if name in bad else ""])
            print(*rows[-1], sep="; ", flush=True)
    columns = ["engine", "recipe", "logits", "rows' gradient", "other", ""]
    print_table("the largest difference from one process", columns, rows)


def _shown(value: float | None) -> str:
    return "" if value is None else f"{value:.0e}"


def run_times(options: argparse.Namespace) -> None:
    """A row for each engine and way, from two ranks with a thread each."""
    command = [
        *(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"),
        *("-m", "bench.engines", "--rank", "--repeats", str(options.repeats)),
        *("--vocabulary", str(options.vocabulary), "--width", str(options.width)),
        *("--tokens", str(options.tokens)),
    ]
    settings = {**os.environ, "OMP_NUM_THREADS": "1"}
    out = subprocess.run(command, check=True, capture_output=True, text=True, env=settings)  # noqa: S603
    found = json.loads(out.stdout.splitlines()[-1])
    rows = [
        [engine, way, f"{1e3 * seconds:,.0f}", f"{seconds / ways['frozen model']:.2f}"]
        for engine, ways in found.items()
        for way, seconds in ways.items()
    ]
    title = (
        f"a step on two ranks, tied {options.vocabulary:,}×{options.width:,} float32, two layers, "
        f"{options.tokens} tokens and 16 rows on each"
    )
    print_table(title, ["engine", "way", "ms", "times the frozen model"], rows)


def measure_on_rank(options: argparse.Namespace) -> None:
    """Times on this rank; the first prints them as JSON."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    work = Work(options.vocabulary, options.width, 2, "float32", options.tokens, 16)
    found = {}
    for engine in ("DDP", "FSDP2"):
        model, x = work.model(), work.text()
        if engine == "FSDP2":
            mesh = init_device_mesh("cpu", (dist.get_world_size(),))
            for block in model.model.layers:
                fully_shard(block, mesh=mesh)
            fully_shard(model, mesh=mesh)
        steps = ways(model, x, work.idx())
        for step in steps.values():  # to warm up
            step()
        found[engine] = in_turns(steps, options.repeats, prepare=_together)
    if dist.get_rank() == 0:
        print(json.dumps(found))
    leave()


def _together() -> None:
    trim_heap()
    dist.barrier()


def ways(model: Any, x: torch.Tensor, idx: list[int]) -> dict[str, Callable[[], object]]:
    """The frozen model, and the ways to train rows on this engine."""
    params = ttfunc.init_deltas(model, idx, requires_grad=True)
    (rows,) = params.deltas.values()
    others = ttfunc.init_deltas(model, idx)
    module = DistributedDataParallel(ttfunc.TokenModule(model, others))

    def frozen() -> None:
        hook = model.get_input_embeddings().register_forward_hook(
            lambda module, args, out: out.detach().requires_grad_()
        )
        model(input_ids=x, labels=x).loss.backward()
        hook.remove()

    def by_hand() -> None:
        kwargs = {"input_ids": x, "labels": x}
        ttfunc.functional_call(model, ttfunc.patch(params), kwargs=kwargs).loss.backward()
        dist.all_reduce(rows.grad)

    return {
        "frozen model": frozen,
        "functional_call, all_reduce of the rows": by_hand,
        "DDP over a TokenModule": lambda: module(input_ids=x, labels=x).loss.backward(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n\n")[0])
    parser.add_argument("--time", action="store_true", help="measure a step in place of the table")
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--vocabulary", type=int, default=49_152)
    parser.add_argument("--width", type=int, default=576)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--quick", action="store_true", help="one engine, and a small matrix")
    parser.add_argument("--rank", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.rank:
        measure_on_rank(options)
    elif options.quick:
        run_recipes(["data_parallel"])
        options.vocabulary, options.width, options.repeats = 4000, 128, 1
        run_times(options)
    elif options.time:
        run_times(options)
    else:
        run_recipes(list(RANKS))


if __name__ == "__main__":
    main()
