"""Rows that differ from the model's own."""

from __future__ import annotations

import warnings
from collections.abc import Sequence

import torch
from torch import nn

from ttfunc import TokenDeltas, init_deltas


def random_rows(model: nn.Module, idx: object = (7, 3), seed: int = 0, **options) -> TokenDeltas:
    """New rows for these tokens, the same for the same seed."""
    generator = torch.Generator().manual_seed(seed)
    with warnings.catch_warnings():  # a padding row may be among them, and the head apart
        warnings.filterwarnings("ignore", message=".*padding_idx")
        warnings.filterwarnings("ignore", message="rows of '.*' alone are trained")
        return init_deltas(model, idx, init="normal", generator=generator, **options)


def adapters(model: nn.Module, *ids: Sequence[int], **options) -> list[TokenDeltas]:
    """New rows for each list of tokens, no two alike."""
    return [random_rows(model, list(i), seed, **options) for seed, i in enumerate(ids)]
