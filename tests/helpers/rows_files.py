"""Rows to save, and what it means that the same come back."""

from __future__ import annotations

import optree
import torch

from tests.helpers.oracle import same_bits
from ttfunc import TokenDeltas

IDX = [7, 5, 11]  # in no order


def same(a: TokenDeltas, b: TokenDeltas) -> bool:
    """Equal in every bit, and in the order of the rows."""
    return (
        a.specs == b.specs and same_bits(a.deltas, b.deltas) and same_bits(a.originals, b.originals)
    )


def stacked(params: TokenDeltas) -> TokenDeltas:
    """The rows of two adapters."""
    return optree.tree_map(lambda rows: torch.stack([rows, rows]), params)
