"""Train a few token rows of a frozen model, functionally."""

import sys
from typing import NoReturn

from ttfunc.call.functional_call import functional_call
from ttfunc.call.patch import patch
from ttfunc.call.patch_mixed import patch_mixed
from ttfunc.disk.checkpoint import merge_checkpoint, unmerge_checkpoint
from ttfunc.disk.load import load
from ttfunc.disk.rows_file import save
from ttfunc.export.exportable import Exportable
from ttfunc.merging.merge import merge, unmerge
from ttfunc.module.token_module import TokenModule
from ttfunc.peft.as_lora import save_as_lora
from ttfunc.peft.load_peft import load_peft
from ttfunc.peft.save_peft import save_peft
from ttfunc.rows.deltas import TokenDeltas, combine
from ttfunc.rows.init_deltas import init_deltas
from ttfunc.rows.mean_of_pieces import mean_of_pieces
from ttfunc.rows.stack import stack
from ttfunc.rows.summary import Summary, summary
from ttfunc.weight.deferred import PatchedWeight

__version__ = "0.2.0.dev0"

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
    # state dicts
    "merge",
    "unmerge",
    # files
    "save",
    "load",
    "save_peft",
    "load_peft",
    "save_as_lora",
    "merge_checkpoint",
    "unmerge_checkpoint",
    # what is trained
    "Summary",
    "summary",
]

# Names of version 0.1.0, and what to write in their place.
_REPLACED = {
    "ExportableMixed": "Exportable(model, assignment=True)",
    "lora_bytes": "save_as_lora(params, directory), which returns the bytes of tensors written",
}


def __getattr__(name: str) -> NoReturn:
    if name not in _REPLACED:
        raise AttributeError(f"module 'ttfunc' has no attribute {name!r}")
    told = f"ttfunc.{name} is no longer there. Its place has {_REPLACED[name]}."
    # `from ttfunc import ...` first looks an attribute up, and drops what an AttributeError says.
    imported = sys._getframe(1).f_code.co_name == "_handle_fromlist"
    raise ImportError(told) if imported else AttributeError(told)
