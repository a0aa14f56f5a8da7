"""Whether a call with new tokens made logits for them."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import Any
from weakref import WeakSet

from torch import Tensor, nn

from ttfunc.call.slots import Slot, is_patch

# The models of which it was said that they make no logits for their new tokens.
_TOLD: WeakSet[nn.Module] = WeakSet()


def check_said(
    model: nn.Module, slots: Sequence[Slot], sizes: Mapping[int, int], out: Any, method: Any
) -> None:
    """Warn, once for a model, where a call read new tokens and made no logits for them."""
    sources = [slot.stand_in.source for slot in slots if is_patch(slot.stand_in)]
    sources = [source for source in sources if source.new_tokens]
    uses = set().union(*(source.uses for source in sources))
    if isinstance(out, Tensor):  # hidden states may be as wide as the matrix was high
        short = out.ndim > 2 and out.is_floating_point()
        short = short and out.shape[-1] in sizes.keys() - {one.base.shape[1] for one in sources}
    else:
        logits = getattr(out, "logits", None)
        short = isinstance(logits, Tensor) and logits.ndim > 1 and logits.shape[-1] in sizes
    silent = short or (method == "generate" and uses == {"lookup"})
    if not silent or model in _TOLD or not all(source.uses for source in sources):
        return  # of one that was not read at all `check_read` has told
    _TOLD.add(model)
    warnings.warn(
        f"this {type(model).__name__} read a matrix with new tokens, rows from {dict(sizes)}, and "
        "made no logits for them: it can never say one. Its head is of another matrix (rows of "
        "both ends: init_deltas(targets=[...])), or it cuts its logits by a count of its own. If "
        "they are only to be read, all is well.",
        stacklevel=4,
    )
