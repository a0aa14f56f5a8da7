"""The loss without the logits, against `F.cross_entropy` of the logits."""

from __future__ import annotations

from unittest import mock

import hypothesis.strategies as st
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from torch import Tensor

from tests.helpers.sizes import Sizes
from ttfunc.rows.token_ids import TokenIndices
from ttfunc.weight import loss
from ttfunc.weight.loss import cross_entropies
from ttfunc.weight.product import patched_product

V, D, IGNORED = 17, 5, -100
STEPS = {
    "none": (),
    "scaled": (lambda y: y * 0.5,),
    "capped": (lambda y: y / 3.0, torch.tanh, lambda y: y * 3.0),
}


def of_chunks(positions: int, height: int = V, dtype: torch.dtype = torch.float64):
    """So many positions in a chunk."""
    size = positions * height * dtype.itemsize
    return mock.patch.multiple(loss, LEAST=size, MOST=size, _CACHED=2 * height * 8)


def operands(ids: list[int], grown: int = 0, seed: int = 0, count: int = 11):
    generator = torch.Generator().manual_seed(seed)

    def drawn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    indices = TokenIndices((*ids, *range(V, V + grown)))
    hidden, rows = drawn(count, D).requires_grad_(), drawn(len(indices), D).requires_grad_()
    target = torch.randint(0, V + grown, (count,), generator=generator)
    return hidden, drawn(V, D), rows, indices, target


@given(
    ids=st.lists(st.integers(0, V - 1), min_size=1, max_size=V, unique=True),
    grown=st.integers(0, 2),
    positions=st.integers(1, 12),
    ignored=st.sets(st.integers(0, 10)),
    smoothing=st.sampled_from([0.0, 0.1, 1.0]),
    biased=st.booleans(),
    steps=st.sampled_from(list(STEPS)),
    seed=st.integers(0, 99),
)
def test_losses_and_gradients(ids, grown, positions, ignored, smoothing, biased, steps, seed):
    hidden, base, rows, indices, target = operands(ids, grown, seed)
    target[sorted(ignored)] = IGNORED
    bias = torch.randn(V + grown, dtype=torch.float64) if biased else None
    logits = patched_product(hidden, base, rows, bias, indices)
    for step in STEPS[steps]:
        logits = step(logits)
    expected = F.cross_entropy(logits, target, reduction="none", label_smoothing=smoothing)
    with of_chunks(positions, V + grown):
        found = cross_entropies(
            *(hidden, base, rows, bias, indices, target),
            **{"steps": STEPS[steps], "ignore_index": IGNORED},
            **{"label_smoothing": smoothing, "once": False},
        )
    torch.testing.assert_close(found, expected)
    weight = torch.rand(len(expected), dtype=torch.float64)
    for create_graph in (False, True):
        options = {"retain_graph": True, "create_graph": create_graph}
        ours = torch.autograd.grad((found * weight).sum(), [hidden, rows], **options)
        theirs = torch.autograd.grad((expected * weight).sum(), [hidden, rows], **options)
        torch.testing.assert_close(ours, theirs)


def cross_entropy(hidden, base, rows, ids, target, **options) -> Tensor:
    known = {"steps": (), "ignore_index": IGNORED, "label_smoothing": 0.0}
    options = {**known, "once": False, **options}
    return cross_entropies(hidden, base, rows, None, ids, target, **options)


def test_first_and_second_derivatives():
    hidden, base, rows, ids, target = operands([3, 7], count=4)

    def function(hidden: Tensor, rows: Tensor) -> Tensor:
        with of_chunks(3):
            return cross_entropy(hidden, base, rows, ids, target, steps=STEPS["capped"])

    assert torch.autograd.gradcheck(function, (hidden, rows))
    assert torch.autograd.gradgradcheck(function, (hidden, rows))


def test_hidden_states_that_depend_on_the_rows():
    _, base, rows, ids, target = operands([3, 7])

    def second(losses) -> Tensor:
        mixed = torch.linspace(-1, 1, 22, dtype=torch.float64).reshape(11, 2)
        (first,) = torch.autograd.grad(losses((mixed @ rows).tanh()), rows, create_graph=True)
        return torch.autograd.grad(first.square().sum(), rows)[0]

    ours = second(lambda h: cross_entropy(h, base, rows, ids, target).sum())
    theirs = second(
        lambda h: F.cross_entropy(
            patched_product(h, base, rows, None, ids), target, reduction="sum"
        )
    )
    torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_as_near_to_the_truth_as_the_plain_loss(dtype):
    """Of 300 positions over 3,000 tokens, in both halves."""
    torch.manual_seed(0)
    hidden, base = torch.randn(300, 64), torch.randn(3000, 64) / 8
    rows, ids, target = (
        torch.randn(4, 64) / 8,
        TokenIndices((5, 9, 70, 999)),
        torch.arange(300) * 10,
    )
    target[::7], target[::5] = 9, 999

    def both(make) -> list[Tensor]:
        leaves = [one.clone().requires_grad_() for one in (hidden.to(dtype), rows.to(dtype))]
        loss = make(*leaves)
        return [loss.detach(), *torch.autograd.grad(loss, leaves)]

    def plain(hidden: Tensor, rows: Tensor) -> Tensor:
        logits = patched_product(hidden, base.to(hidden.dtype), rows, None, ids)
        return F.cross_entropy(logits.float(), target)

    narrow = [one.to(dtype).double().requires_grad_() for one in (hidden, rows)]
    logits = patched_product(narrow[0], base.to(dtype).double(), narrow[1], None, ids)
    truth = F.cross_entropy(logits, target)
    exact = [truth.detach(), *torch.autograd.grad(truth, narrow)]
    with of_chunks(100, 3000, dtype):
        steps = (lambda y: y.float(),)
        ours = both(
            lambda h, r: cross_entropy(h, base.to(dtype), r, ids, target, steps=steps).mean()
        )
    theirs = both(plain)
    for mine, other, real in zip(ours, theirs, exact, strict=True):
        assert mine.dtype == other.dtype
        error, known = ((one.double() - real).norm() for one in (mine, other))
        assert error <= 1.05 * known + 2e-6 * real.norm()  # the sum of a product has an order


def test_no_buffer_has_the_size_of_the_logits():
    hidden, base, rows, ids, target = operands([3, 7], count=400)
    target[::2] = IGNORED
    with of_chunks(8), Sizes() as sizes:
        cross_entropy(hidden, base, rows, ids, target).sum().backward()
    assert max(sizes.found) <= max(400 * D, 8 * V)
    assert hidden.grad[::2].count_nonzero() == 0


def test_labels_out_of_range_raise_as_in_torch():
    hidden, base, rows, ids, target = operands([3, 7])
    for wrong in (V, -1):
        target[4] = wrong
        with pytest.raises(IndexError, match=f"Target {wrong} is out of bounds"):
            cross_entropy(hidden, base, rows, ids, target)


def test_no_positions_and_no_labels():
    hidden, base, rows, ids, target = operands([3, 7])
    empty = cross_entropy(hidden[:0], base, rows, ids, target[:0])
    assert empty.shape == (0,)
    losses = cross_entropy(hidden, base, rows, ids, torch.full_like(target, IGNORED))
    mean = losses.sum() / 0
    mean.backward()
    assert mean.isnan()
    assert hidden.grad.count_nonzero() == rows.grad.count_nonzero() == 0
