"""Train a few token rows of a frozen model, functionally."""

from ttfunc.call import functional_call
from ttfunc.counts import Summary, summary
from ttfunc.deltas import TokenDeltas, combine
from ttfunc.disk.checkpoint import merge_checkpoint, unmerge_checkpoint
from ttfunc.disk.rows_file import load, save
from ttfunc.exportable import Exportable
from ttfunc.exportable_mixed import ExportableMixed
from ttfunc.init import init_deltas
from ttfunc.merging import merge, unmerge
from ttfunc.mixing import patch_mixed
from ttfunc.module import TokenModule
from ttfunc.patching import patch
from ttfunc.peft.as_lora import lora_bytes, save_as_lora
from ttfunc.peft.convert import load_peft, save_peft
from ttfunc.pieces import mean_of_pieces
from ttfunc.stacking import stack
from ttfunc.weight.deferred import PatchedWeight

__version__ = "0.1.0"

__all__ = [
    # the rows, and where they come from
    "TokenDeltas",
    "init_deltas",
    "mean_of_pieces",
    "combine",
    "stack",
    # the call
    "PatchedWeight",
    "patch",
    "patch_mixed",
    "functional_call",
    # for tools that want a module
    "TokenModule",
    "Exportable",
    "ExportableMixed",
    # state dicts
    "merge",
    "unmerge",
    # files
    "save",
    "load",
    "save_peft",
    "load_peft",
    "save_as_lora",
    "lora_bytes",
    "merge_checkpoint",
    "unmerge_checkpoint",
    # what is trained
    "Summary",
    "summary",
]
