"""One of the ranks that try the recipes of an engine: torchrun ... -m tests.engines ENGINE FILE."""

from __future__ import annotations

import importlib
import json
import sys
import traceback
from pathlib import Path

import torch
import torch.distributed as dist

from tests.helpers.ranks import leave


def main() -> None:
    engine, file, *names = sys.argv[1:]
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    recipes = importlib.import_module(f"tests.engines.{engine}").RECIPES
    found: dict[str, dict[str, float] | str] = {}
    for name in names or recipes:
        try:
            found[name] = recipes[name]()
        except Exception:
            found[name] = traceback.format_exc()
        if dist.get_rank() == 0:
            Path(file).write_text(json.dumps(found))
    leave()


if __name__ == "__main__":
    main()
