"""Tries cells of the grid: python -m tests.grid --cells 10000 --seed 0."""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import torch

from tests.engines.launch import launch
from tests.grid.cells import QUICK, WAYS, Cell, drawn
from tests.grid.outcomes import outcome


def main() -> int:
    options = _options()
    before = json.loads(options.compare.read_text()) if options.compare else {}
    cells = [Cell.parse(text) for text in options.cell or before]
    cells = cells or drawn(options.cells, options.seed, options.ways.split(","))
    start, found = time.perf_counter(), {}
    try:
        for name, one in _outcomes(cells, options.jobs):
            found[name] = one
            if one.startswith("wrong"):
                print(f"{one}\n    python -m tests.grid --cell {name}", flush=True)
    finally:
        if options.output:
            options.output.write_text(json.dumps(found, indent=1))
    lost = [name for name, one in found.items() if before.get(name) == "right" != one]
    for name in lost:
        print(f"right before, and not now: {name}: {found[name]}")
    print(f"{len(found)} cells in {time.perf_counter() - start:.0f} s")
    counts = Counter(
        one if one.startswith("refused") else one.split(":")[0] for one in found.values()
    )
    for kind, count in counts.most_common():
        print(f"{count:7} {kind}")
    return int(bool(lost) or "wrong" in counts)


def _outcomes(cells: list[Cell], jobs: int) -> Iterator[tuple[str, str]]:
    """What comes of each cell: of those on an engine in one launch of its ranks."""
    here = [cell for cell in cells if cell.way != "fsdp2"]
    ranks = [str(cell) for cell in cells if cell.way == "fsdp2"]
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(jobs, spawn, torch.set_num_threads, (1,)) as pool:
        outcomes = pool.map(outcome, here, chunksize=10)
        yield from zip(map(str, here), outcomes, strict=True)
    if ranks:
        with tempfile.TemporaryDirectory() as folder:
            found = launch("grid", 2, Path(folder), *ranks)
        yield from ((name, ", ".join(one)) for name, one in found.items())


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.grid", description=__doc__)
    parser.add_argument("--cells", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--ways", default=",".join(QUICK), help=f"of {','.join(WAYS)}")
    parser.add_argument("--cell", action="append", default=[], help="this one alone")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="processes")
    parser.add_argument("--output", type=Path, help="what came of each cell, as JSON")
    parser.add_argument("--compare", type=Path, help="its cells: those right must be right")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
