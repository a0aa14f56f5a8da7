"""The two reads of a patched matrix, against the same functions on the copy."""

from __future__ import annotations

from unittest import mock

import hypothesis.strategies as st
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from tests.helpers.sizes import Sizes
from ttfunc.rows.token_ids import TokenIndices
from ttfunc.weight import reads
from ttfunc.weight.reads import SharedRows

V, D = 17, 5
ids = st.lists(st.integers(0, V - 1), min_size=1, max_size=V, unique=True)


def operands(ids: list[int], seed: int = 0, dtype: torch.dtype = torch.float64):
    generator = torch.Generator().manual_seed(seed)
    base = torch.randn(V, D, generator=generator, dtype=dtype)
    rows = torch.randn(len(ids), D, generator=generator, dtype=dtype, requires_grad=True)
    return base, rows, TokenIndices(tuple(ids))


def copied(base: Tensor, rows: Tensor, indices: TokenIndices) -> Tensor:
    return base.index_copy(0, torch.tensor(indices.ids), rows)


@given(ids=ids, seed=st.integers(0, 99), padding=st.none() | st.integers(-V, V - 1))
def test_lookup(ids: list[int], seed: int, padding: int | None):
    base, rows, indices = operands(ids, seed)
    tokens = torch.randint(0, V, (3, 4), generator=torch.Generator().manual_seed(seed))
    found = SharedRows(rows, indices).lookup(tokens, base, padding)
    expected = F.embedding(tokens, copied(base, rows, indices), padding)
    assert torch.equal(found, expected)
    weight = torch.randn_like(expected)
    torch.testing.assert_close(
        torch.autograd.grad((found * weight).sum(), rows),
        torch.autograd.grad((expected * weight).sum(), rows),
    )


@pytest.mark.parametrize("shape", [(), (0,), (4,), (2, 3, 4)])
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_lookup_takes_every_shape_of_tokens(shape: tuple[int, ...], dtype: torch.dtype):
    base, rows, indices = operands([3, 1])
    tokens = torch.randint(0, V, shape).to(dtype)
    expected = F.embedding(tokens, copied(base, rows, indices))
    assert torch.equal(SharedRows(rows, indices).lookup(tokens, base), expected)


@pytest.mark.parametrize("token", [V, -1])
def test_lookup_refuses_what_an_embedding_refuses(token: int):
    base, rows, indices = operands([V - 1])
    with pytest.raises(IndexError, match="index out of range"):
        SharedRows(rows, indices).lookup(torch.tensor([token]), base)


@given(
    ids=ids,
    seed=st.integers(0, 99),
    biased=st.booleans(),
    flat=st.booleans(),
    most=st.sampled_from([0, 1, 64]),
)
def test_product(ids: list[int], seed: int, biased: bool, flat: bool, most: int):
    base, rows, indices = operands(ids, seed)
    hidden = torch.randn((D,) if flat else (2, 3, D), dtype=torch.float64, requires_grad=True)
    bias = torch.randn(V, dtype=torch.float64, requires_grad=True) if biased else None
    with mock.patch.object(reads, "_most_parts", return_value=most):
        found = SharedRows(rows, indices).product(hidden, base, bias)
    expected = F.linear(hidden, copied(base, rows, indices), bias)
    torch.testing.assert_close(found, expected)
    inputs = [x for x in (hidden, rows, bias) if x is not None]
    weight = torch.randn_like(expected)
    torch.testing.assert_close(
        torch.autograd.grad((found * weight).sum(), inputs),
        torch.autograd.grad((expected * weight).sum(), inputs),
    )


@pytest.mark.parametrize("shape", [(0,), (2, 0)])
def test_product_of_nothing(shape: tuple[int, ...]):
    base, rows, indices = operands([3, 1])
    hidden = torch.randn(*shape, D, dtype=torch.float64, requires_grad=True)
    found = SharedRows(rows, indices).product(hidden, base)
    assert found.shape == (*shape, V)
    by_hidden, by_rows = torch.autograd.grad(found.sum(), (hidden, rows))
    assert by_hidden.shape == hidden.shape
    assert not by_rows.any()


@pytest.mark.parametrize("shape", [(10, 0), (1, 3), (1, 1), (1, 0)])
@pytest.mark.parametrize("hidden", [(4,), (2, 3), ()])
def test_a_matrix_of_no_columns_or_of_one_row(shape: tuple[int, int], hidden: tuple[int, ...]):
    base, rows = torch.randn(shape), torch.randn(1, shape[1], requires_grad=True)
    h = torch.randn(*hidden, shape[1], requires_grad=True)
    indices = TokenIndices((0,))
    found = SharedRows(rows, indices).product(h, base)
    expected = F.linear(h, copied(base, rows, indices))
    torch.testing.assert_close(found, expected)
    for one, other in zip(
        torch.autograd.grad(found.sum(), (h, rows)),
        torch.autograd.grad(expected.sum(), (h, rows)),
        strict=True,
    ):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("most", [0, 64])
def test_product_has_all_derivatives(biased: bool, most: int, monkeypatch):
    monkeypatch.setattr(reads, "_most_parts", lambda base: most)
    base, rows, indices = operands([3, 1, 11])
    hidden = torch.randn(2, D, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(V, dtype=torch.float64, requires_grad=True) if biased else None

    def f(hidden, rows, bias=None):
        return SharedRows(rows, indices).product(hidden, base, bias)

    inputs = (hidden, rows) if bias is None else (hidden, rows, bias)
    checks = {"check_forward_ad": True, "check_batched_grad": True}
    assert torch.autograd.gradcheck(f, inputs, check_batched_forward_grad=True, **checks)
    assert torch.autograd.gradgradcheck(f, inputs, check_fwd_over_rev=True)


def test_a_base_that_requires_grad_gets_none_and_keeps_its_values():
    base, rows, indices = operands([3, 1])
    base.requires_grad_()
    before = base.detach().clone()
    hidden = SharedRows(rows, indices).lookup(torch.tensor([[3, 4]]), base.detach())
    SharedRows(rows, indices).product(hidden, base.detach()).sum().backward()
    assert base.grad is None
    assert torch.equal(base, before)


def test_the_product_saves_nothing_of_the_size_of_its_result():
    base, rows, indices = operands([3, 1])
    hidden = torch.randn(50, D, dtype=torch.float64, requires_grad=True)
    sizes = []

    def saved(tensor: Tensor) -> Tensor:
        sizes.append(tensor.numel())
        return tensor

    with saved_tensors_hooks(saved, lambda tensor: tensor):
        SharedRows(rows, indices).product(hidden, base)
    assert sorted(sizes) == sorted(x.numel() for x in (hidden, base, rows, torch.zeros(2)))


@pytest.mark.parametrize("scale", [1, 45, 300])
@pytest.mark.parametrize("ids", [[3, 1], [15, 16]])
def test_a_large_old_row_cancels_nothing(scale: int, ids: list[int]):
    # The gradient by the hidden states must be as near to the truth as the copy's own.
    base, rows, indices = operands(ids, dtype=torch.bfloat16)
    base[ids] *= scale
    hidden = torch.randn(50, D).bfloat16().requires_grad_()
    factor = torch.randn(50, V).bfloat16()

    def gradient(full) -> Tensor:
        (by_hidden,) = torch.autograd.grad((full * factor).sum(), hidden)
        return by_hidden.double()

    truth = factor.double() @ copied(base, rows, indices).double()
    exact = (gradient(F.linear(hidden, copied(base, rows, indices))) - truth).norm()
    assert (gradient(SharedRows(rows, indices).product(hidden, base)) - truth).norm() <= 2 * exact


def test_the_product_makes_no_second_buffer_where_few_parts_are_kept():
    # V/D is 3: up to so many parts.
    def largest(ids: list[int], dtype: torch.dtype) -> int:
        base, rows, indices = operands(ids, dtype=dtype)
        hidden = torch.randn(50, D, dtype=dtype, requires_grad=True)
        logits = SharedRows(rows, indices).product(hidden, base)
        gradient = torch.randn_like(logits)
        with Sizes() as sizes:
            torch.autograd.grad(logits, hidden, gradient)
        return max(sizes.found)

    added, apart = list(range(V - 3, V)), [3, 11]
    assert largest(added, torch.bfloat16) < 50 * V
    assert largest(apart, torch.float32) < 50 * V
    assert largest([3, 7, 11], torch.float32) == 50 * V
    # Each part of a sum is rounded.
    assert largest(apart, torch.bfloat16) == 50 * V


@pytest.mark.parametrize("hidden_dtype", [torch.float32, torch.bfloat16])
def test_product_under_autocast(hidden_dtype: torch.dtype):
    base, rows, indices = operands([3, 1, 11], dtype=torch.float32)
    hidden = torch.randn(4, D).to(hidden_dtype).requires_grad_()
    bias = torch.randn(V)
    with torch.autocast("cpu", torch.bfloat16):
        found = SharedRows(rows, indices).product(hidden, base, bias)
        expected = F.linear(hidden, copied(base, rows, indices), bias)
    assert found.dtype == expected.dtype == torch.bfloat16
    torch.testing.assert_close(found, expected)
    gradients = torch.autograd.grad(found.float().pow(2).sum(), (hidden, rows))
    full = torch.autograd.grad(expected.float().pow(2).sum(), (hidden, rows))
    for one, other in zip(gradients, full, strict=True):
        assert one.dtype == other.dtype
        # bfloat16 keeps 8 bits, of the largest of the numbers that are added up.
        torch.testing.assert_close(one, other, rtol=0, atol=0.02 * other.abs().max().item())
    assert torch.autograd.gradcheck(  # float64 is left as it is, as torch leaves it
        lambda r: SharedRows(r, indices).product(hidden.double(), base.double()), rows.double()
    )
