"""Rows and means of a matrix that is in parts; more ranks are in tests/engines."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

from tests.helpers.mesh import mesh_of_one
from ttfunc.engines.shards import ZeroShard, mean_of, of_first_rank, rows_at, spread_of, whole_of

IDS = torch.tensor([4, 0, 6])


@pytest.fixture
def mesh():
    with mesh_of_one() as mesh:
        yield mesh


def matrix(dtype: torch.dtype = torch.float32) -> torch.Tensor:
    torch.manual_seed(0)
    found = torch.randn(7, 3).to(dtype)
    found[4] = torch.tensor([-0.0, torch.nan, torch.inf])
    return found


def partitioned(whole: torch.Tensor) -> nn.Parameter:
    """As ZeRO-3 leaves a parameter: nothing in it, and a filled-up part beside it."""
    kept = nn.Parameter(torch.empty(0, dtype=whole.dtype))
    part = torch.cat([whole.flatten(), whole.new_full((2,), 7.0)])
    part.ds_numel = len(part)
    kept.ds_id, kept.ds_shape, kept.ds_tensor = 0, whole.shape, part
    kept.ds_process_group = torch.distributed.group.WORLD
    return kept


KINDS = {
    "plain": lambda whole, mesh: whole.clone(),
    "tokens split": lambda whole, mesh: distribute_tensor(whole.clone(), mesh, [Shard(0)]),
    "features split": lambda whole, mesh: distribute_tensor(whole.clone(), mesh, [Shard(1)]),
    "replicated": lambda whole, mesh: distribute_tensor(whole.clone(), mesh, [Replicate()]),
    "partitioned": lambda whole, mesh: partitioned(whole),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float8_e4m3fn])
@pytest.mark.parametrize("kind", KINDS)
def test_each_bit_of_a_row_arrives(kind: str, dtype: torch.dtype, mesh):
    if kind in ("tokens split", "features split", "replicated") and dtype.itemsize == 1:
        whole = matrix().to(torch.float16)  # DTensor scatters no 8-bit floats on the CPU
    else:
        whole = matrix(dtype)
    found = rows_at(KINDS[kind](whole, mesh), IDS)
    assert type(found) is torch.Tensor
    expected = whole.view(torch.uint8)[IDS]
    assert torch.equal(found.contiguous().view(torch.uint8), expected)


@pytest.mark.parametrize("kind", KINDS)
def test_means_and_spreads_are_those_of_the_whole(kind: str, mesh):
    whole = matrix().nan_to_num(posinf=1.0)
    held = KINDS[kind](whole, mesh)
    torch.testing.assert_close(mean_of(held, torch.float32), whole.mean(0))
    torch.testing.assert_close(spread_of(held, torch.float32), whole.std(0, correction=0))
    assert torch.equal(whole_of(held), whole)


@pytest.mark.parametrize("kind", KINDS)
def test_the_first_rank_keeps_what_it_has_drawn(kind: str, mesh):
    drawn = matrix()
    kept = of_first_rank(drawn, KINDS[kind](matrix(), mesh))
    assert torch.equal(kept.view(torch.uint8), drawn.view(torch.uint8))


def test_a_part_that_is_elsewhere_is_refused():
    with pytest.raises(RuntimeError, match=r"cannot be read from here .*GatheredParameters"):
        ZeroShard(SimpleNamespace(ds_tensor=torch.empty(0)))
