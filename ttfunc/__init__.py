"""Train a few token rows of a frozen model, functionally.

    params = ttfunc.init_deltas(model, [3, 7], requires_grad=True)
    output = ttfunc.functional_call(model, ttfunc.patch(params), inputs)
    merged = ttfunc.merge(model.state_dict(), params)

Make the rows
    init_deltas         rows of tokens that the model has, or of new ones, to train
    mean_of_pieces      where new ones can start: at the mean of the pieces that spelled them
    combine             several TokenDeltas of one model as one
    TokenDeltas         what holds the rows: a pytree

Call the model with them
    patch               the model's weights with the rows in them
    functional_call     call the model with these weights, and leave it as it is
    PatchedWeight       the class of such a weight

Train them as a module
    TokenModule         the model with its rows, for an optimizer, Trainer, TRL or Lightning

Merge them into the model's weights
    merge               a state dict with the rows in it
    unmerge             the state dict as it was before
    merge_checkpoint    copy a checkpoint, with the rows in the copy; the model is never loaded
    unmerge_checkpoint  copy a merged checkpoint, with the original rows

Keep them in a file
    save                write the rows to a file
    load                read them, for a model

Exchange them with PEFT
    save_peft           write an adapter that PEFT loads
    load_peft           read the token rows of one
    save_as_lora        write a plain LoRA, for servers that know no token rows

Run many adapters at once
    patch_mixed         weights for a batch whose examples have an adapter each
    stack               adapters as one pytree, for torch.vmap

Export a program
    Exportable          a module that takes any rows as its inputs, for torch.export

See what is trained
    summary             count it, and the whole model
    Summary             what was counted

`help(ttfunc.patch)` tells all about `patch`, and so on.
"""

import sys
from typing import NoReturn

try:
    from ttfunc import torch_private as torch_private
except (AttributeError, ImportError) as error:
    raise ImportError(
        f"ttfunc relies on an internal of torch or optree that is missing here: {error}. It was "
        "tested with torch 2.10 to 2.15: install one of these, or a newer ttfunc."
    ) from error

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
from ttfunc.rows.deltas import TokenDeltas
from ttfunc.rows.init_deltas import init_deltas
from ttfunc.rows.mean_of_pieces import mean_of_pieces
from ttfunc.rows.several import combine, stack
from ttfunc.rows.summary import Summary, summary
from ttfunc.weight.deferred import PatchedWeight

__version__ = "0.2.0.dev0"

__all__ = [  # by task, in the order of the docstring
    "init_deltas",
    "mean_of_pieces",
    "combine",
    "TokenDeltas",
    "patch",
    "functional_call",
    "PatchedWeight",
    "TokenModule",
    "merge",
    "unmerge",
    "merge_checkpoint",
    "unmerge_checkpoint",
    "save",
    "load",
    "save_peft",
    "load_peft",
    "save_as_lora",
    "patch_mixed",
    "stack",
    "Exportable",
    "summary",
    "Summary",
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
