"""Tries cells of the grid: python -m tests.grid --cells 10000 --seed 0."""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections import Counter
from pathlib import Path

import torch

from tests.grid.cells import QUICK, WAYS, Cell, drawn
from tests.grid.outcomes import outcome


def main() -> int:
    options = _options()
    cells = [Cell.parse(text) for text in options.cell]
    cells = cells or drawn(options.cells, options.seed, options.ways.split(","))
    found: dict[str, str] = {}
    start = time.perf_counter()
    for cell in cells:
        found[str(cell)] = outcome(cell)
        if found[str(cell)].startswith("wrong"):
            print(f"{found[str(cell)]}\n    python -m tests.grid --cell {cell}", flush=True)
    if options.output:
        options.output.write_text(json.dumps(found, indent=1))
    lost = _lost(json.loads(options.compare.read_text()), found) if options.compare else []
    for text in lost:
        print(f"right before, and not now: {text}: {found[text]}")
    counts = Counter(
        one if one.startswith("refused") else one.split(":")[0] for one in found.values()
    )
    print(f"{len(found)} cells in {time.perf_counter() - start:.0f} s")
    for name, count in counts.most_common():
        print(f"{count:7} {name}")
    return int(bool(lost) or "wrong" in counts)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.grid", description=__doc__)
    parser.add_argument("--cells", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--ways", default=",".join(QUICK), help=f"of {','.join(WAYS)}")
    parser.add_argument("--cell", action="append", default=[], help="this one alone")
    parser.add_argument("--output", type=Path, help="what came of each cell, as JSON")
    parser.add_argument("--compare", type=Path, help="such a file: what was right must be right")
    return parser.parse_args()


def _lost(before: dict[str, str], now: dict[str, str]) -> list[str]:
    return [text for text, was in before.items() if was == "right" and now.get(text, was) != was]


if __name__ == "__main__":
    torch.set_num_threads(1)
    sys.exit(main())
