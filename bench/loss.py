"""A step whose loss needs no logits: time and peak memory against the tokens, all labelled or some.

The contestants are the frozen floor; the floor with the losses by chunks of torch
(`F.linear_cross_entropy`) and of TRL (its fused head), which train no row; PEFT; ttfunc without
deferred logits and with them (`patch(params, deferred_logits=True)`); and TRL's loss on ttfunc.

python -m bench.loss [--repeats 5] [--dtype bfloat16] [--matrix M] [--tokens T] [--memory] [--quick]
"""

from __future__ import annotations

import argparse
import gc
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import matplotlib as mpl
import matplotlib.pyplot as plt

from bench.contestants import CONTESTANTS, LEAVE_THE_MODEL, Step, Work
from bench.matrices import MATRICES, MIB
from bench.memory import measure, trim_heap
from bench.report import print_table
from bench.timing import in_turns

NAMES = [
    *("frozen floor", "torch's chunks", "TRL's chunks"),
    *("ttfunc", "ttfunc, no logits", "TRL on ttfunc", "PEFT"),
]
TEXTS = {"SmolLM2-135M": 1024, "Qwen2.5-0.5B": 512, "Llama 3.2 1B": 256, "Gemma 3 270M": 512}
PARTS = (1, 4)  # all positions, and a quarter of them
LENGTHS = [64, 256, 1024, 4096, 16_384]


def steps(work: Work, names: Sequence[str]) -> dict[str, Step]:
    shared, x, labels, idx = work.model(), work.text(), work.labels(), work.idx()
    return {
        name: CONTESTANTS[name](
            shared if name in LEAVE_THE_MODEL else work.model(), x, idx, labels=labels
        )
        for name in names
    }


def run(texts: dict[str, int], dtype: str, repeats: int) -> None:
    """A row for each matrix, with all positions labelled and with a quarter of them."""
    lines = []
    for model, tokens in texts.items():
        for labelled in PARTS:
            work = Work(*MATRICES[model], 2, dtype, tokens, 16, labelled)
            calls = steps(work, NAMES)
            for call in calls.values():
                call()
            gc.collect()
            found = in_turns(calls, repeats, prepare=trim_heap)
            floor = found["frozen floor"]
            part = "all" if labelled == 1 else f"1 of {labelled}"
            cells = [f"{s / floor:.2f}" for s in found.values()]
            lines.append([f"{model}, {tokens}", part, f"{1e3 * floor:,.0f}", *cells[1:]])
            print(*lines[-1], sep="; ", flush=True)
    title = f"a step, times the floor, {dtype}, two layers, 16 rows"
    print_table(title, ["matrix, tokens", "labelled", "floor, ms", *NAMES[1:]], lines)


def run_memory(lengths: Sequence[int], output: Path) -> None:
    """MiB of the peak against the tokens, as a table and a plot."""
    usual = Work(*MATRICES["SmolLM2-135M"], 2, "float32", 64, 16)
    peaks = {
        name: [measure(name, replace(usual, tokens=tokens)) / MIB for tokens in lengths]
        for name in NAMES
    }
    title = f"peak over the loaded model, MiB, tied {usual}, all positions labelled"
    rows = [[name, *(f"{mib:,.0f}" for mib in found)] for name, found in peaks.items()]
    print_table(title, ["tokens", *(f"{tokens:,}" for tokens in lengths)], rows)
    mpl.use("agg")
    _, axes = plt.subplots(figsize=(6, 3.5), layout="constrained")
    for name, found in peaks.items():
        axes.plot(lengths, found, "o--" if name == "frozen floor" else "o-", label=name)
    axes.set(xscale="log", yscale="log", xlabel="tokens", ylabel="peak over the model, MiB")
    axes.legend()
    output.mkdir(parents=True, exist_ok=True)
    plt.savefig(output / "loss.png", dpi=110)
    print(f"plot in {output / 'loss.png'}")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n\n")[0])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--matrix", choices=TEXTS, help="one of them alone")
    parser.add_argument("--tokens", type=int, help="in place of those of each matrix")
    parser.add_argument("--memory", action="store_true", help="measure memory in place of time")
    parser.add_argument("--output", type=Path, default=Path("bench/plots"), help="for the plot")
    parser.add_argument("--quick", action="store_true", help="the smallest matrix, short texts")
    options = parser.parse_args()
    if options.memory:
        run_memory(LENGTHS[:2] if options.quick else LENGTHS, options.output)
    else:
        texts = {options.matrix: TEXTS[options.matrix]} if options.matrix else TEXTS
        texts = {name: options.tokens or tokens for name, tokens in texts.items()}
        run({"SmolLM2-135M": 64} if options.quick else texts, options.dtype, options.repeats)


if __name__ == "__main__":
    main()
