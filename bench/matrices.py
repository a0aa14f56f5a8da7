"""Time and peak memory of a step on the token matrices of well-known models, on two layers.

python -m bench.matrices [--repeats 7] [--tokens 64] [--memory] [--new-tokens] [--quick]
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import replace

from bench.contestants import Work
from bench.memory import measure
from bench.report import print_table
from bench.step import times

MATRICES = {
    "SmolLM2-135M": (49_152, 576),
    "Qwen2.5-0.5B": (151_936, 896),
    "Llama 3.2 1B": (128_256, 2_048),
    "Gemma 3 270M": (262_144, 640),
    "Gemma 2 2B": (256_000, 2_304),
}
MIB = 2**20
# Four models of the largest matrix are what 24 GiB hold.
NAMES = ["frozen floor", "ttfunc", "PEFT", "full embedding"]
NEW_TOKENS = ["frozen floor", "ttfunc, new tokens", "PEFT, resized"]


def run(
    matrices: Sequence[str], names: list[str], repeats: int, tokens: int, rows: int = 16
) -> None:
    """A row for each matrix and dtype: milliseconds, and times the floor."""
    lines = []
    for model in matrices:
        vocabulary, width = MATRICES[model]
        for dtype in ("float32", "bfloat16"):
            work = Work(vocabulary, width, 2, dtype, tokens, rows)
            found = times(work, names, repeats)
            floor = found["frozen floor"]
            cells = [f"{1e3 * s:,.0f} ({s / floor:.2f})" for s in found.values()]
            lines.append([f"{model}, {work}", *cells])
            print(*lines[-1], sep="; ", flush=True)
    print_table(f"a step, ms (times the floor), {tokens} tokens, {rows} rows", ["", *names], lines)


def run_memory(matrices: Sequence[str], tokens: int) -> None:
    """MiB of the peak over the loaded model, and what is above the floor, with 1,024 rows."""
    lines = []
    for model in matrices:
        vocabulary, width = MATRICES[model]
        work = Work(vocabulary, width, 2, "float32", tokens, 16)
        many = replace(work, rows=1024)
        floor = measure("frozen floor", work)
        peaks = [
            *(measure("ttfunc", each) for each in (work, many)),
            *(measure(name, many) for name in ("ttfunc, dense", "PEFT")),
        ]
        above = [f"{p / MIB:,.0f} ({(p - floor) / work.matrix_bytes:.1%})" for p in peaks]
        lines.append(
            [f"{model}, {work}, {work.matrix_bytes / MIB:,.0f} MiB", f"{floor / MIB:,.0f}", *above]
        )
        print(*lines[-1], sep="; ", flush=True)
    columns = ["", "frozen floor", "ttfunc, 16 rows", "ttfunc", "ttfunc, dense", "PEFT"]
    title = (
        f"peak over the loaded model, MiB (above the floor, of the matrix), {tokens} tokens, 1,024 "
        "rows where no number is given"
    )
    print_table(title, columns, lines)


def run_memory_of_new(matrices: Sequence[str], tokens: int) -> None:
    """The same for 16 new tokens."""
    lines = []
    for model in matrices:
        work = Work(*MATRICES[model], 2, "float32", tokens, 16)
        floor, *peaks = (measure(name, work) for name in NEW_TOKENS)
        above = [f"{p / MIB:,.0f} ({(p - floor) / work.matrix_bytes:.1%})" for p in peaks]
        lines.append([f"{model}, {work}", f"{floor / MIB:,.0f}", *above])
        print(*lines[-1], sep="; ", flush=True)
    title = "peak over the loaded model, MiB (above the floor, of the matrix), 16 new tokens"
    print_table(title, ["", *NEW_TOKENS], lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n\n")[0])
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--memory", action="store_true", help="measure memory in place of time")
    parser.add_argument("--new-tokens", action="store_true", help="for 16 that the model lacks")
    parser.add_argument("--quick", action="store_true", help="the smallest matrix alone")
    options = parser.parse_args()
    matrices = list(MATRICES)[: 1 if options.quick else None]
    if options.memory:
        (run_memory_of_new if options.new_tokens else run_memory)(matrices, options.tokens)
    else:
        names = NEW_TOKENS if options.new_tokens else NAMES
        run(matrices, names, options.repeats, options.tokens)


if __name__ == "__main__":
    main()
