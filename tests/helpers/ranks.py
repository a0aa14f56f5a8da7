"""Processes that train together."""

from __future__ import annotations

import os
from pathlib import Path

import torch


def join(rank: int, folder: Path) -> None:
    """Make this process one of two, which meet in the folder."""
    os.environ.update(
        {"RANK": f"{rank}", "LOCAL_RANK": f"{rank}", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    )
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2
    )
