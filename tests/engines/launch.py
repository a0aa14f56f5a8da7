"""Starting the ranks of an engine by torchrun, and what is taken for wrong in what they find."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
# The largest difference that is rounding; of bfloat16 what the oracle itself rounds.
CLOSE, CLOSE_IN_BFLOAT16 = 5e-6, 5e-3

Found = dict[str, dict[str, float] | str]


def launch(
    engine: str, ranks: int, folder: Path, *names: str, module: str = "tests.engines"
) -> Found:
    """What the recipes of an engine find: differences by name, or the traceback of an error."""
    file = folder / f"{engine}.json"
    command = [
        *(sys.executable, "-m", "torch.distributed.run", "--standalone"),
        *("--nproc-per-node", str(ranks), "-m", "tests.engines", engine, str(file), *names),
    ]
    settings = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    ran = subprocess.run(  # noqa: S603
        command, cwd=ROOT, env=settings, capture_output=True, text=True, timeout=900, check=False
    )
    if ran.returncode or not file.exists():
        raise RuntimeError(f"{engine}: {ran.stderr[-4000:]}")
    found: Found = json.loads(file.read_text())
    return found


def wrong(found: Found) -> Found:
    """The recipes that raised, or differ by more than rounding."""
    return {
        name: result
        for name, result in found.items()
        if isinstance(result, str)
        or not result
        or any(not abs(value) < _close(what) for what, value in result.items())
    }


def _close(what: str) -> float:
    return CLOSE_IN_BFLOAT16 if "bfloat16" in what else CLOSE
