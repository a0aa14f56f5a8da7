"""A deferred weight beside the matrix that it stands for, and how it is read."""

from __future__ import annotations

import torch
from torch import Tensor

from tests.helpers.models import D, V
from ttfunc.rows.token_ids import TokenIndices
from ttfunc.weight.deferred import PatchedWeight, patched
from ttfunc.weight.rows import Rows

IDS = [7, 3, 20]
HIDDEN, MATRIX, VECTOR = torch.randn(2, 4, D), torch.randn(D, 6), torch.randn(D)
TOKENS = torch.tensor([[3, 7, 0], [20, 20, 1]])


def weights(dtype: torch.dtype = torch.float32) -> tuple[PatchedWeight, Tensor, Tensor]:
    """A deferred weight, the copy that it stands for, and their rows."""
    generator = torch.Generator().manual_seed(0)
    base = torch.randn(V, D, generator=generator).to(dtype)
    rows = torch.randn(len(IDS), D, generator=generator).to(dtype).requires_grad_()
    weight = patched(base, Rows(rows, TokenIndices(tuple(IDS))), None, dense=False)
    return weight, base.index_copy(0, torch.tensor(IDS), rows), rows
