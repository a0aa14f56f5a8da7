"""The laws of replaced rows: each read is the one of the matrix with the rows written in."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from tests.helpers.sizes import Sizes
from ttfunc.rows.token_ids import TokenIndices
from ttfunc.weight.placeholder import Reads, matrix_placeholder
from ttfunc.weight.rows import Rows, rows_at

V, D = 17, 5
B, K = 3, 4  # examples and rows, where each has its own


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def written(base: Tensor, values: Tensor, ids: list[int], new: int = 0) -> Tensor:
    """The matrix, row by row. A row whose id is no token is left out, and so is a second one."""
    matrix = [*base, *base.new_zeros(new, base.shape[1])]
    for row, token in reversed(list(enumerate(ids))):
        if 0 <= token < len(matrix):
            matrix[token] = values[row].to(base.dtype)
    return torch.stack(matrix)


@st.composite
def cases(draw) -> dict[str, Any]:
    """Rows and what is written to the base for each example (one, if they share their rows)."""
    new, seed = draw(st.integers(0, 2)), draw(st.integers(0, 99))
    each, fixed = draw(st.booleans()), draw(st.booleans())
    count = B if each else 1
    dtype = draw(st.sampled_from([torch.float64, torch.float32, torch.bfloat16]))
    ends = [V + token for token in range(new)]  # each new token has a row
    some = (0, V - 1) if fixed else (-1, V + new + 1)  # -1 is unused, what is past the end no token
    size = draw(st.integers(0 if new else 1, V))
    ids = [
        draw(st.permutations([*draw(
            st.lists(st.integers(*some), min_size=size, max_size=size, unique=fixed)
        ), *ends])) for _ in range(1 if fixed else count)
    ]  # fmt: skip
    k = len(ids[0])
    values = normal(*([count] * each), k, D, seed=seed).requires_grad_()
    if fixed:
        rows = Rows(values, TokenIndices(tuple(ids[0])))
    else:
        tensor = torch.tensor(ids if each else ids[0])
        rows = rows_at(values, tensor, V + new)
    base = normal(V, D, seed=seed + 1, dtype=dtype)
    known = values if each else values[None]
    matrices = [written(base, known[i], ids[0 if fixed else i], new) for i in range(count)]
    height = draw(st.sampled_from([0, V, V + new]))  # of the bias; new tokens may be without one
    bias = normal(height, seed=seed + 2, dtype=dtype).requires_grad_() if height else None
    padding = draw(st.none() | st.integers(-V, V - 1))
    return {"rows": rows, "values": values, "base": base, "matrices": matrices, "bias": bias,
            "padding": padding, "count": count, "new": new}  # fmt: skip


def check(found: Tensor, expected: Tensor, inputs: list[Tensor]) -> None:
    """They are equal, and so are their gradients."""
    wide = found.dtype == torch.float64
    bounds = {} if wide else {"rtol": 2e-2, "atol": 2e-1 if found.dtype == torch.bfloat16 else 1e-4}
    torch.testing.assert_close(found, expected, **bounds)
    weight = normal(*found.shape, seed=9, dtype=found.dtype)
    gradients = [
        torch.autograd.grad(
            (one * weight).sum(), inputs, allow_unused=True, materialize_grads=True,
            retain_graph=True,
        ) if one.requires_grad else [torch.zeros_like(leaf) for leaf in inputs]
        for one in (found, expected)
    ]  # fmt: skip
    torch.testing.assert_close(*map(list, gradients), **bounds)


@settings(max_examples=300, deadline=None)
@given(cases())
def test_each_read_and_its_gradient_is_the_one_of_the_matrix(case: dict[str, Any]):
    rows, base, matrices, bias = (case[name] for name in ("rows", "base", "matrices", "bias"))
    height, values, count = V + case["new"], case["values"], case["count"]
    tokens = torch.randint(0, height, (count, 7))
    hidden = normal(count, 3, D, seed=5, dtype=base.dtype).requires_grad_()
    # Of the model's own tokens, also where there are new ones.
    padding = None if case["padding"] is None else case["padding"] % V
    whole = None if bias is None else F.pad(bias, (0, height - len(bias)))
    looked_up, logits = (
        torch.stack([read(one, i) for i, one in enumerate(matrices)])
        for read in (
            lambda one, i: F.embedding(tokens[i], one, padding),
            lambda one, i: F.linear(hidden[i], one, whole),
        )
    )
    if not rows.by_example():  # of any shape
        tokens, looked_up = tokens[0], looked_up[0]
    assert rows.height(base) == height
    with torch.no_grad():
        assert torch.equal(rows.lookup(tokens, base), looked_up)
    check(rows.lookup(tokens, base, case["padding"]), looked_up, [values])
    leaves = [one for one in (values, hidden, bias) if one is not None]
    check(rows.product(hidden, base, bias), logits, leaves)
    with torch.no_grad():
        again = rows.product(hidden, base, bias)
    check(again, logits.detach(), leaves)
    if rows.by_example():
        for read in (rows.materialise, lambda one: rows.piece(one, 2, 7)):
            with pytest.raises(RuntimeError, match="cannot be mixed"):
                read(base)
        return
    assert torch.equal(rows.materialise(base), matrices[0])
    for start, stop in ((0, height), (2, 7), (V - 1, height), (height, height)):
        check(rows.piece(base, start, stop), matrices[0][start:stop], [values])
    nan = matrix_placeholder(rows, base, Reads())
    assert nan.isnan().all()
    weight = normal(height, D, seed=3, dtype=base.dtype)
    for one, other in zip(
        torch.autograd.grad(nan, values, weight, allow_unused=True),
        torch.autograd.grad(matrices[0], values, weight, allow_unused=True)
        if matrices[0].requires_grad
        else [None],
        strict=True,
    ):
        nothing = torch.zeros_like(values)
        torch.testing.assert_close(*(nothing if g is None else g for g in (one, other)))


def kinds(values: Tensor, ids: list[int]) -> dict[str, Rows]:
    """The same rows with ids that are fixed, and with a tensor of ids."""
    return {
        "fixed": Rows(values, TokenIndices(tuple(ids))),
        "tensor": rows_at(values, torch.tensor(ids), V),
    }


KINDS = pytest.mark.parametrize("kind", ["fixed", "tensor"])


@KINDS
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("ids", [[3, 1, 11], [15, 16]])
def test_the_product_has_all_derivatives(kind: str, biased: bool, ids: list[int]):
    base, values = normal(V, D), normal(len(ids), D, seed=1).requires_grad_()
    hidden = normal(2, D, seed=2).requires_grad_()
    bias = (normal(V, seed=3).requires_grad_(),) if biased else ()

    def product(values: Tensor, hidden: Tensor, *bias: Tensor) -> Tensor:
        return kinds(values, ids)[kind].product(hidden, base, *bias)

    checks = {"check_forward_ad": True, "check_batched_grad": True}
    inputs = (values, hidden, *bias)
    assert torch.autograd.gradcheck(product, inputs, check_batched_forward_grad=True, **checks)
    assert torch.autograd.gradgradcheck(product, inputs, check_fwd_over_rev=True)


@KINDS
@pytest.mark.parametrize("shape", [(), (0,), (4,), (2, 0), (2, 3, 4)])
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_reads_take_every_shape(kind: str, shape: tuple[int, ...], dtype: torch.dtype):
    base, values = normal(V, D), normal(2, D, seed=1).requires_grad_()
    rows, matrix = kinds(values, [3, 1])[kind], written(base, values, [3, 1])
    tokens = torch.randint(0, V, shape).to(dtype)
    hidden = normal(*shape, D, seed=2).requires_grad_()
    assert torch.equal(rows.lookup(tokens, base), F.embedding(tokens, matrix))
    check(rows.product(hidden, base), F.linear(hidden, matrix), [values, hidden])


@KINDS
@pytest.mark.parametrize("token", [V, -1, 2**40])
def test_a_lookup_refuses_what_an_embedding_refuses(kind: str, token: int):
    rows = kinds(normal(1, D), [V - 1])[kind]
    with pytest.raises(IndexError, match="index out of range"):
        rows.lookup(torch.tensor([token]), normal(V, D))


@pytest.mark.parametrize("shape", [(10, 0), (1, 3), (1, 1), (1, 0)])
@pytest.mark.parametrize("hidden", [(4,), (2, 3), ()])
def test_a_matrix_of_no_columns_or_of_one_row(shape: tuple[int, int], hidden: tuple[int, ...]):
    base, values = normal(*shape), normal(1, shape[1], seed=1).requires_grad_()
    states = normal(*hidden, shape[1], seed=2).requires_grad_()
    found = Rows(values, TokenIndices((0,))).product(states, base)
    check(found, F.linear(states, written(base, values, [0])), [values, states])


def test_a_base_that_requires_grad_gets_none_and_keeps_its_values():
    base, values = normal(V, D).requires_grad_(), normal(2, D, seed=1).requires_grad_()
    before = base.detach().clone()
    rows = Rows(values, TokenIndices((3, 1)))
    hidden = rows.lookup(torch.tensor([[3, 4]]), base.detach())
    rows.product(hidden, base.detach()).sum().backward()
    assert base.grad is None
    assert torch.equal(base, before)


def test_the_product_saves_nothing_of_the_size_of_its_result():
    base, values = normal(V, D), normal(2, D, seed=1).requires_grad_()
    hidden = normal(50, D, seed=2).requires_grad_()
    sizes = []

    def saved(tensor: Tensor) -> Tensor:
        sizes.append(tensor.numel())
        return tensor

    with saved_tensors_hooks(saved, lambda tensor: tensor):
        Rows(values, TokenIndices((3, 1))).product(hidden, base)
    assert sorted(sizes) == sorted(one.numel() for one in (hidden, base, values))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_the_backward_makes_no_second_buffer_for_the_last_tokens(dtype: torch.dtype):
    def largest(ids: list[int]) -> int:
        base, values = normal(V, D, dtype=dtype), normal(len(ids), D, dtype=dtype)
        hidden = normal(50, D, dtype=dtype).requires_grad_()
        logits = Rows(values.requires_grad_(), TokenIndices(tuple(ids))).product(hidden, base)
        gradient = torch.randn_like(logits)
        with Sizes() as sizes:
            torch.autograd.grad(logits, hidden, gradient)
        return max(sizes.found)

    assert largest([V - 1, V - 3, V - 2]) < 50 * V
    assert largest([*range(V, V + 3)]) < 50 * V
    assert largest([V - 1, V]) < 50 * V
    assert largest([3, 11]) == 50 * V


@pytest.mark.parametrize("scale", [1, 45, 300])
@pytest.mark.parametrize("ids", [[3, 1], [15, 16]])
def test_a_large_old_row_cancels_nothing(scale: int, ids: list[int]):
    # The gradient by the hidden states must be as near to the truth as the copy's own.
    base, values = normal(V, D).bfloat16(), normal(2, D, seed=1).bfloat16().requires_grad_()
    base[ids] *= scale
    hidden = normal(50, D, seed=2).bfloat16().requires_grad_()
    factor, matrix = normal(50, V, seed=3).bfloat16(), written(base, values, ids)

    def gradient(logits: Tensor) -> Tensor:
        return torch.autograd.grad((logits * factor).sum(), hidden)[0].double()

    truth = factor.double() @ matrix.double()
    exact = (gradient(F.linear(hidden, matrix)) - truth).norm()
    found = gradient(Rows(values, TokenIndices(tuple(ids))).product(hidden, base))
    assert (found - truth).norm() <= 2 * exact


@KINDS
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_product_under_autocast(kind: str, dtype: torch.dtype):
    base, values = normal(V, D).float(), normal(3, D, seed=1).float().requires_grad_()
    ids, bias = [3, 1, 11], normal(V, seed=3).float()
    hidden = normal(4, D, seed=2).to(dtype).requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        found = kinds(values, ids)[kind].product(hidden, base, bias)
        expected = F.linear(hidden, written(base, values, ids), bias)
    assert found.dtype == expected.dtype == torch.bfloat16
    torch.testing.assert_close(found, expected)
    gradients = torch.autograd.grad(found.float().pow(2).sum(), (hidden, values))
    full = torch.autograd.grad(expected.float().pow(2).sum(), (hidden, values))
    for one, other in zip(gradients, full, strict=True):
        assert one.dtype == other.dtype
        # bfloat16 keeps 8 bits, of the largest of the numbers that are added up.
        torch.testing.assert_close(one, other, rtol=0, atol=0.02 * other.abs().max().item())
    with torch.autocast("cpu", torch.bfloat16):  # float64 is left as it is, as torch leaves it
        wide = kinds(values.double(), ids)[kind].product(hidden.double(), base.double())
    assert wide.dtype == torch.float64


def test_columns_of_unused_rows_have_the_bits_that_they_had():
    base, hidden = normal(V, D), normal(4, D, seed=1)
    rows = rows_at(torch.full((3, D), torch.nan), torch.full((3,), -1), V)
    assert torch.equal(rows.product(hidden, base), F.linear(hidden, base))
    assert torch.equal(rows.lookup(torch.arange(V), base), base)


@pytest.mark.parametrize("unused", [torch.nan, torch.inf, 1e38])
def test_what_an_unused_row_holds_reaches_no_gradient(unused: float):
    base, hidden = normal(V, D), normal(4, D, seed=2).requires_grad_()
    values = normal(4, D, seed=1)
    values[1] = values[3] = unused
    values.requires_grad_()
    logits = rows_at(values, torch.tensor([7, -1, 2, 7]), V).product(hidden, base)
    clean = torch.where(values.isfinite() & (values < 1e30), values, 0).detach().requires_grad_()
    expected = F.linear(hidden, written(base, clean[[0, 2]], [7, 2]))
    torch.testing.assert_close(
        torch.autograd.grad(logits.square().sum(), (hidden, values)),
        torch.autograd.grad(expected.square().sum(), (hidden, clean)),
    )


@pytest.mark.parametrize("shape", [(B + 1, 2), (B,)])
def test_a_batch_of_others_is_refused(shape: tuple[int, ...]):
    rows = rows_at(normal(B, K, D), torch.arange(B * K).view(B, K), V)
    for read in (
        lambda: rows.lookup(torch.zeros(shape, dtype=torch.int64), normal(V, D)),
        lambda: rows.product(normal(*shape, D)[..., 0, :], normal(V, D)),
    ):
        with pytest.raises(ValueError, match=f"for {B} examples was given a batch of shape"):
            read()
