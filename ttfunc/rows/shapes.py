"""Whether deltas are `(k, D)` rows, a row for each token."""

from __future__ import annotations

from torch import Tensor

from ttfunc.rows.deltas import TokenDeltas
from ttfunc.torch_distributed_private import is_dtensor

# For rows that an engine has sharded, as those of a TokenModule in fully_shard.
GATHER = (
    "Gather the rows first, on all ranks: "
    "optree.tree_map(lambda row: row.detach().full_tensor(), params)."
)


def check_shapes(params: TokenDeltas) -> None:
    """Raise where a delta is not one `(k, D)` float tensor: ValueError, or TypeError."""
    for name, delta in params.deltas.items():
        spec = params.specs[name]
        expected = (len(spec.indices), spec.shape[1])
        if not isinstance(delta, Tensor) or not delta.is_floating_point():
            what = delta.dtype if isinstance(delta, Tensor) else type(delta).__name__
            raise TypeError(f"the delta of {name!r} is {what}: a floating-point tensor is needed.")
        if is_dtensor(delta):
            raise TypeError(f"the delta of {name!r} is in parts on several ranks. {GATHER}")
        if tuple(delta.shape) != expected:
            raise ValueError(
                f"the delta of {name!r} has shape {tuple(delta.shape)}, and {expected} is needed: "
                "a row for each token index. For a leading axis of adapters use torch.vmap."
            )
