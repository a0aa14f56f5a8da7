"""The placeholder of a matrix that cannot be read."""

from __future__ import annotations

import pytest
import torch

from ttfunc.weight.placeholder import nan_placeholder
from ttfunc.weight.reads import Reads
from ttfunc.weight.unreadable import Unreadable

IDS = torch.tensor([4, 1])


def test_its_gradient_goes_to_the_rows():
    base = torch.empty(5, 3)
    rows = torch.ones(2, 3, requires_grad=True)
    nan = nan_placeholder(Unreadable, rows, base, IDS, 0, Reads())
    gradient = torch.arange(15.0).view(5, 3)
    (found,) = torch.autograd.grad(nan, rows, gradient)
    assert torch.equal(found, gradient[[4, 1]])


def test_a_transform_that_reads_it_is_refused():
    base = torch.empty(5, 3)

    def read(rows: torch.Tensor) -> torch.Tensor:
        return nan_placeholder(Unreadable, rows, base, IDS, 0, Reads()).sum()

    with pytest.raises(RuntimeError, match=r"past its patch. Leave the matrix out"):
        torch.func.grad(read)(torch.ones(2, 3))
