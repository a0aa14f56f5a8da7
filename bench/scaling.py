"""Cost of a step against the vocabulary, the rows and the tokens of a batch, drawn as PNG.

python -m bench.scaling [--output bench/plots] [--quick]
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path

import matplotlib as mpl
import matplotlib.pyplot as plt
from rich.progress import track

from bench.contestants import Work
from bench.memory import measure
from bench.report import machine, print_table
from bench.step import times

NAMES = ["frozen floor", "ttfunc", "ttfunc, dense", "PEFT"]
USUAL = Work(vocabulary=64_000, width=512, layers=2, tokens=64, rows=16)
SWEEPS = {
    "vocabulary": [8_000, 32_000, 128_000, 256_000],
    "rows": [1, 16, 256, 1024, 4096, 16_000],  # up to a quarter of the vocabulary
    "tokens": [16, 64, 256, 1024],
}


def sweep(field: str, values: list[int], repeats: int) -> dict[str, dict[int, tuple[float, float]]]:
    """Seconds, and bytes at the peak above the loaded model, of each contestant at each value."""
    found: dict[str, dict[int, tuple[float, float]]] = {name: {} for name in NAMES}
    for value in track(values, field):
        work = replace(USUAL, **{field: value})  # type: ignore[arg-type]  # each field is an int
        seconds = times(work, NAMES, repeats)
        for name in NAMES:
            found[name][value] = seconds[name], measure(name, work)
    return found


def draw(field: str, found: dict[str, dict[int, tuple[float, float]]], path: Path) -> None:
    """Time and memory side by side, the floor dashed."""
    mpl.use("agg")
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.5), layout="constrained")
    for name, points in found.items():
        style = {"linestyle": "--", "color": "black"} if name == "frozen floor" else {}
        for axis, which, scale in ((axes[0], 0, 1e3), (axes[1], 1, 2**-20)):
            # The floor goes on top, and ttfunc, which lies on it, is drawn wide.
            axis.plot(
                list(points),
                [point[which] * scale for point in points.values()],
                label=name,
                linewidth=4 if name == "ttfunc" else 1.5,
                zorder=3 if name == "frozen floor" else 2,
                **style,
            )
    for axis, label in zip(axes, ("ms a step", "peak above the loaded model, MiB"), strict=True):
        axis.set(xlabel=field, ylabel=label, xscale="log", yscale="log")
    axes[0].legend()
    figure.suptitle(f"tied {USUAL}, {USUAL.tokens} tokens, {USUAL.rows} rows, but for the {field}")
    figure.savefig(path, dpi=110)


def run(output: Path, repeats: int, quick: bool) -> None:
    """Every sweep: a table each, and a plot."""
    output.mkdir(parents=True, exist_ok=True)
    for field, values in SWEEPS.items():
        found = sweep(field, values[:2] if quick else values, repeats)
        draw(field, found, output / f"{field}.png")
        floor = found["frozen floor"]
        print_table(
            f"a step against the {field}: ms (times the floor), MiB at the peak",
            ["", *(f"{value:,}" for value in floor)],
            [
                [
                    name,
                    *(
                        f"{1e3 * s:.0f} ({s / floor[v][0]:.2f}), {b / 2**20:.0f}"
                        for v, (s, b) in points.items()
                    ),
                ]
                for name, points in found.items()
            ],
        )
    print(f"plots in {output}; {machine()}")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n\n")[0])
    parser.add_argument("--output", type=Path, default=Path("bench/plots"))
    parser.add_argument("--repeats", type=int, default=9, help="of a timed step")
    parser.add_argument("--quick", action="store_true", help="two points of each sweep")
    options = parser.parse_args()
    run(options.output, options.repeats, options.quick)


if __name__ == "__main__":
    main()
