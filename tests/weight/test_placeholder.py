"""What never asks `__torch_function__` gets what the copy would give, under each transform."""

from __future__ import annotations

import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functionalize, grad, jacfwd, jacrev, jvp, vjp, vmap

from tests.helpers.models import D, Fused, V
from tests.helpers.sizes import Sizes
from ttfunc import functional_call, init_deltas, patch, patch_mixed
from ttfunc.rows.token_ids import TokenIndices
from ttfunc.weight.deferred import PatchedWeight, patched
from ttfunc.weight.placeholder import Reads, matrix_placeholder
from ttfunc.weight.rows import Rows

IDS = [7, 3, 20]
INDICES = TokenIndices(tuple(IDS))
BASE, ROWS = torch.randn(V, D), torch.randn(len(IDS), D)
HIDDEN = torch.randn(2, 4, D)
TOKENS = torch.tensor([[3, 7, 0], [20, 20, 1]])
TEXTS, STATES = (
    torch.nested.nested_tensor(parts, layout=torch.jagged)
    for parts in ([torch.tensor([3, 1]), torch.tensor([7, 2, 20])], [HIDDEN[0], HIDDEN[1, :2]])
)


def weight(rows: Tensor) -> PatchedWeight:
    return patched(BASE, Rows(rows, INDICES), None, dense=False)


def full(rows: Tensor) -> Tensor:
    return BASE.index_copy(0, torch.tensor(IDS), rows)


def linear(hidden: Tensor, w: Tensor) -> Tensor:
    return F.linear(hidden, w)


def embedding(tokens: Tensor, w: Tensor) -> Tensor:
    return F.embedding(tokens, w)


def unasked(read):
    """`read` with `__torch_function__` off, as C++ and other subclasses run it."""

    def wrapped(w: Tensor) -> Tensor:
        with torch._C.DisableTorchFunctionSubclass():
            return read(w)

    return wrapped


with warnings.catch_warnings():
    warnings.simplefilter("ignore", DeprecationWarning)  # torch's, of all of torch.jit
    SCRIPTED, LOOKED_UP = torch.jit.script(linear), torch.jit.script(embedding)
    TRACED = torch.jit.trace(lambda h, w: h @ w.t(), (HIDDEN, BASE))

PAST = {
    "jagged tokens": lambda w: F.embedding(TEXTS, w).values(),
    "jagged hidden states": lambda w: F.linear(STATES, w).values(),
    "scripted": lambda w: SCRIPTED(HIDDEN, w),
    "a scripted lookup": lambda w: LOOKED_UP(TOKENS, w),
    "traced": lambda w: TRACED(HIDDEN, w),
    "vmap over it": lambda w: vmap(torch.tanh)(w),
    "vmap over its columns": lambda w: vmap(torch.tanh, in_dims=1)(w),
    "vmap over its transpose": lambda w: vmap(torch.cos)(w.T),
    "grad by it": lambda w: grad(lambda v: F.linear(HIDDEN, v).pow(2).sum())(w),
    "vjp by it": lambda w: vjp(lambda v: F.linear(HIDDEN, v), w)[0],
    "functionalize": lambda w: functionalize(lambda v: F.linear(HIDDEN, v))(w),
    "a view": unasked(lambda w: w.view(-1)),
    "its class taken off": lambda w: w.as_subclass(Tensor),
    "an operation": unasked(lambda w: F.linear(HIDDEN, w)),
    "its transpose": unasked(lambda w: HIDDEN @ w.T.T.T),
}


def transformed(transform, read, make) -> Tensor | tuple[Tensor, ...]:
    return transform(lambda rows: read(make(rows)).cos().sum(), ROWS)


def by_backward(f, rows: Tensor) -> Tensor:
    rows = rows.clone().requires_grad_()
    return torch.autograd.grad(f(rows), rows)[0]


def dual(f, rows: Tensor) -> Tensor:
    with torch.autograd.forward_ad.dual_level():
        made = torch.autograd.forward_ad.make_dual(rows, rows.cos())
        return torch.autograd.forward_ad.unpack_dual(f(made)).tangent


STACKED = torch.stack([ROWS, -ROWS])
EACH = {
    "value": lambda f, rows: f(rows),
    "backward": by_backward,
    "grad": lambda f, rows: grad(f)(rows),
    "jvp": lambda f, rows: jvp(f, (rows,), (rows.cos(),)),
    "vmap": lambda f, _: vmap(f)(STACKED),
    "vmap(vmap(grad))": lambda f, _: vmap(vmap(grad(f)))(STACKED.unsqueeze(0)),
    "vmap(jvp) of one": lambda f, rows: vmap(lambda t: jvp(f, (rows,), (t,))[1])(STACKED),
    "grad(vmap)": lambda f, _: grad(lambda rows: vmap(f)(rows).sum())(STACKED),
    "forward over reverse": lambda f, rows: jvp(grad(f), (rows,), (rows.cos(),)),
    "forward over forward": lambda f, rows: jvp(
        lambda q: jvp(f, (q,), (rows.cos(),))[1], (rows,), (rows.sin(),)
    ),
    "reverse over reverse": lambda f, rows: grad(lambda q: (grad(f)(q) * q.sin()).sum())(rows),
    "jacrev": lambda f, rows: jacrev(f)(rows),
    "jacfwd": lambda f, rows: jacfwd(f)(rows),
    "functionalize": lambda f, rows: functionalize(f)(rows),
    "dual numbers": dual,
}


# torch has no transform of jagged tensors, whatever the matrix, and no functionalize of another.
PAIRS = [
    (past, transform)
    for past in PAST
    for transform in EACH
    if not ("jagged" in past and transform not in ("value", "backward", "functionalize"))
    and not past == transform == "functionalize"
]


@pytest.mark.parametrize(("past", "transform"), PAIRS)
def test_what_gets_past_it_is_the_matrix(past: str, transform: str):
    found, expected = (transformed(EACH[transform], PAST[past], make) for make in (weight, full))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_a_sparse_gradient_of_the_matrix_is_carried_to_the_rows():
    def loss(rows: Tensor, sparse: bool) -> Tensor:
        read = unasked(lambda w: F.embedding(TOKENS, w, sparse=sparse))
        return read(weight(rows)).cos().sum()

    found, expected = (by_backward(lambda r, s=s: loss(r, s), ROWS) for s in (True, False))
    assert torch.equal(found, expected)


@pytest.mark.parametrize(
    "read",
    [
        lambda w: torch.tensor(w),
        lambda w: HIDDEN.new_tensor(w),
        lambda w: torch.FloatTensor(w),
        lambda w: torch.as_tensor(w) * 1,
        lambda w: torch.asarray(w) * 1,
        lambda w: torch.from_dlpack(w),
        lambda w: torch.from_numpy(w.numpy()),
    ],
)
@pytest.mark.filterwarnings("ignore:To copy construct from a tensor")
def test_its_values_are_those_of_the_matrix(read):
    torch.testing.assert_close(read(weight(ROWS)), full(ROWS), rtol=0, atol=0)


def test_its_memory_is_refused():
    with pytest.raises(RuntimeError, match="Cannot access data pointer"):
        torch.utils.dlpack.to_dlpack(weight(ROWS))


@pytest.mark.parametrize("make", [weight, lambda rows: weight(rows).T], ids=["it", "its transpose"])
def test_a_write_past_it_is_refused(make):
    with torch.no_grad(), pytest.raises(RuntimeError, match="on a patched weight.*would be lost"):
        unasked(lambda w: w.mul_(2))(make(ROWS))
    with pytest.raises(RuntimeError, match="mul_.* on a patched weight.*would be lost"):
        vmap(lambda rows: unasked(lambda w: w.mul_(2).sum())(make(rows)))(STACKED)


def test_strides_are_refused_as_they_are_not_the_matrix_s():
    def read(rows: Tensor) -> Tensor:
        return unasked(lambda w: w.as_strided((V, D), (D, 1)).sum())(weight(rows))

    for f in (read, grad(read)):
        with pytest.raises(RuntimeError, match="as_strided on a patched weight.*dense=True"):
            f(ROWS)


class Past(nn.Module):
    """Reads its matrix past the weight alone."""

    def __init__(self) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(V, D)

    def forward(self) -> Tensor:
        return unasked(lambda w: F.embedding(TOKENS, w))(self.embed_tokens.weight)


def test_such_a_read_counts_as_one():
    model = Past().requires_grad_(False)
    params = init_deltas(model, [7, 20])
    functional_call(model, patch(params))  # warns otherwise
    found = grad(lambda p: functional_call(model, patch(p)).sum())(params)
    assert torch.equal(
        found.deltas["embed_tokens.weight"], torch.tensor([[1.0], [2.0]]).expand(2, D)
    )


def test_no_matrix_of_a_mixed_patch_is_read_past_it():
    model = Past().requires_grad_(False)
    params = init_deltas(model, IDS)

    def call(p) -> Tensor:
        return functional_call(model, patch_mixed([p], [0, -1])).sum()

    for f in (call, grad(call), functionalize(call), lambda p: jvp(call, (p,), (p,))):
        with pytest.raises(RuntimeError, match="in a way that cannot be mixed"):
            f(params)


@pytest.mark.parametrize("past", PAST)
def test_what_gets_past_it_in_a_compiled_function_is_the_matrix(past: str):
    torch._dynamo.reset()
    read = PAST[past]
    f = torch.compile(lambda rows: read(weight(rows)).cos().sum(), backend="aot_eager")
    found, expected = (
        by_backward(f, ROWS),
        by_backward(lambda rows: read(full(rows)).cos().sum(), ROWS),
    )
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("make", [weight, full], ids=["deferred", "dense"])
def test_a_fused_head_in_a_compiled_function_gets_its_gradient(make):
    torch._dynamo.reset()

    def head(rows: Tensor) -> Tensor:
        return Fused.apply(HIDDEN, make(rows)).cos().sum()

    f = torch.compile(head, backend="aot_eager")
    expected = by_backward(lambda rows: F.linear(HIDDEN, full(rows)).cos().sum(), ROWS)
    torch.testing.assert_close(by_backward(f, ROWS), expected, rtol=1e-4, atol=1e-4)


def test_the_nan_is_in_no_memory_and_carries_gradients():
    rows = ROWS.clone().requires_grad_()
    carried = matrix_placeholder(Rows(rows, INDICES), BASE, Reads())
    assert carried.shape == BASE.shape
    assert carried.isnan().all()
    assert carried.untyped_storage().nbytes() == BASE.element_size()
    gradient = torch.randn_like(BASE)
    (found,) = torch.autograd.grad(carried, rows, gradient)
    assert torch.equal(found, gradient[IDS])


def test_a_matrix_that_no_rank_has_gives_the_gradient_and_refuses_a_transform():
    def carried(rows: Tensor) -> Tensor:
        return matrix_placeholder(Rows(rows, INDICES), BASE, Reads(), whole=False)

    rows, gradient = ROWS.clone().requires_grad_(), torch.randn_like(BASE)
    (found,) = torch.autograd.grad(carried(rows), rows, gradient)
    assert torch.equal(found, gradient[IDS])
    with pytest.raises(RuntimeError, match=r"past its patch. Leave the matrix out"):
        grad(lambda rows: carried(rows).sum())(ROWS)


@pytest.mark.parametrize(
    "transform", ["value", "backward", "grad", "jvp", "vmap", "vmap(jvp) of one"]
)
def test_nothing_of_its_size_is_made_for_what_asks_it(transform: str):
    used: set[str] = set()

    def head(rows: Tensor) -> Tensor:
        w = weight(rows)
        loss = (F.linear(HIDDEN[0, 0], w).cos() + HIDDEN[0, 0] @ w.T).sum()
        used.update(w.source.uses())
        return loss

    with Sizes() as sizes:
        EACH[transform](head, ROWS)
    assert used == {"product"}
    assert max(sizes.found) < BASE.numel()
