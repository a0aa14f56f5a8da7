"""Peak memory of one training step over the loaded model, each contestant in a process of its own.

python -m bench.memory [--vocabulary 128000] [--width 1024] [--tokens 16] [--rows 4]
"""

from __future__ import annotations

import ctypes
import json
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch

from bench.contestants import CONTESTANTS, Work
from bench.report import arguments, print_table


def resident(field: str) -> int:
    """A figure of this process in bytes, as Linux keeps it."""
    (kib,) = re.findall(rf"^{field}:\s+(\d+) kB", Path("/proc/self/status").read_text(), re.M)
    return int(kib) * 1024


def trim_heap() -> None:
    """Give freed memory back to the system, where the C library has a call for it (glibc's)."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def growth(call: Callable[[], object]) -> int:
    """Bytes that the peak of the call is above what this process had before."""
    trim_heap()  # what was freed before would be used unseen
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    before = resident("VmRSS")
    call()
    return resident("VmHWM") - before


def peak_of(name: str, work: Work) -> int:
    """Bytes that the peak of a step is above the loaded model, in this process."""
    # What the libraries load with their first step is not the step's.
    small = replace(work, vocabulary=work.rows + 50)
    CONTESTANTS[name](small.model(), small.text(), small.idx())()
    step = CONTESTANTS[name](work.model(), work.text(), work.idx())
    if work.device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        loaded = torch.cuda.memory_allocated()
        step()
        return torch.cuda.max_memory_allocated() - loaded
    return growth(step)


def measure(name: str, work: Work) -> int:
    """`peak_of` in a process of its own."""
    fields = [f"--{field}={value}" for field, value in vars(work).items()]
    command = [sys.executable, "-m", "bench.memory", *fields, "--only", name]
    out = subprocess.run(command, check=True, capture_output=True, text=True)  # noqa: S603
    return int(json.loads(out.stdout.splitlines()[-1]))


def main() -> None:
    work, options = arguments(__doc__ or "")
    if options.only:
        print(json.dumps(peak_of(options.only, work)))
        return
    peaks = {name: measure(name, work) for name in CONTESTANTS}
    floor, matrix = peaks["frozen floor"], work.matrix_bytes
    print_table(
        f"peak of a step over the loaded model, tied {work} ({matrix / 2**20:.0f} MiB), "
        f"{work.tokens} tokens, {work.rows} rows",
        ["", "peak, MiB", "above the floor, of the matrix"],
        [[n, f"{p / 2**20:,.0f}", f"{(p - floor) / matrix:.1%}"] for n, p in peaks.items()],
    )


if __name__ == "__main__":
    main()
