"""The options of the examples, and what each of them sets for its run."""

from __future__ import annotations

import argparse
import random
import warnings
from collections.abc import Mapping
from pathlib import Path

import matplotlib as mpl
import torch
import transformers

from examples.shared.smollm2 import CACHE


def arguments(
    description: str, flags: Mapping[str, str] | None = None, **numbers: tuple[float, float]
) -> argparse.Namespace:
    """The options of an example; each of `numbers` has a default, and one for `--quick`.

    `flags` are off by default, and say what they are for.
    """
    parser = argparse.ArgumentParser(description=description.partition("\n\n")[0])
    parser.add_argument("--model", help="a folder or hub name; by default SmolLM2-135M from PyPI")
    parser.add_argument("--quick", action="store_true", help="only to see that it runs")
    for flag, meaning in (flags or {}).items():
        parser.add_argument(f"--{flag}", action="store_true", help=meaning)
    for name, (usual, _) in numbers.items():
        parser.add_argument(f"--{name}", type=type(usual), help=f"default {usual}")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--output", type=Path, default=Path("examples/out"), help="for what it makes"
    )
    parser.add_argument("--cache", type=Path, default=CACHE)
    options = parser.parse_args()
    for name, both in numbers.items():
        setattr(options, name, getattr(options, name) or both[options.quick])
    options.output.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(options.seed)
    random.seed(options.seed)
    # torch's CPU attention has no batching rule, and takes the examples one by one.
    warnings.filterwarnings("ignore", ".*not yet implemented the batching rule")
    transformers.logging.set_verbosity_error()
    mpl.use("agg")
    return options
