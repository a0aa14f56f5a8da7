"""Processes that train together."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import NoReturn

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


def leave() -> NoReturn:
    """End this process, once all ranks are done.

    Without the interpreter's own end, in which a thread of DDP that still runs now and then aborts
    the process ("terminate called without an active exception").
    """
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)
