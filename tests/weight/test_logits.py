"""Deferred logits: what they say, when they are made, and of which rows."""

from __future__ import annotations

import copy
import io

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import grad, vmap

from tests.helpers.llama import llama
from tests.helpers.logits import LABELS, Head, X, both, deferred, loss_of
from tests.helpers.models import D, V
from tests.helpers.rows import random_rows
from tests.helpers.sizes import Sizes
from tests.helpers.transforms import TRANSFORMS
from ttfunc import TokenModule, functional_call, patch
from ttfunc.weight.logits import DeferredLogits


def test_they_say_what_they_will_be():
    for dtype in (torch.float32, torch.bfloat16):
        waits, plain = deferred(dtype)
        assert waits.shape == plain.shape
        assert waits.stride() == plain.stride()
        assert (waits.dtype, waits.device, len(waits)) == (dtype, plain.device, 2)
        assert waits.is_contiguous()
        assert waits.requires_grad
        assert waits.float().dtype == torch.float32
        assert not waits.detach().requires_grad
        assert waits.memory.made is None
        assert torch.equal(waits.detach(), plain)


def test_they_are_made_once():
    waits, plain = deferred()
    with torch.no_grad():
        assert torch.equal(waits.argmax(-1), plain.argmax(-1))
    kept = waits.made()
    assert waits.exp().requires_grad
    waits.tanh()
    assert waits.made() is kept
    other, plain = deferred()
    with torch.inference_mode():
        assert torch.equal(other.argmax(-1), plain.argmax(-1))
    assert other.sum().requires_grad


def test_copies_and_files_hold_the_logits():
    waits, plain = deferred()
    file = io.BytesIO()
    torch.save(waits.detach(), file)
    file.seek(0)
    assert torch.equal(torch.load(file), plain.detach())
    assert torch.equal(copy.deepcopy(waits.detach()), plain.detach())
    assert waits.tolist() == plain.tolist()
    assert (waits.detach().numpy() == plain.detach().numpy()).all()
    assert repr(waits.detach()) == repr(plain.detach())


def add_counted(rows: Tensor) -> None:
    with torch.no_grad():
        rows.add_(1)


def add_past_the_version(rows: Tensor) -> None:
    rows.data.add_(1)


def add_by_numpy(rows: Tensor) -> None:
    rows.detach().numpy()[:] += 1


WRITES = [add_counted, add_past_the_version, add_by_numpy]


@pytest.mark.parametrize("write", WRITES)
@pytest.mark.parametrize(
    "read",
    [
        lambda y: y.argmax(-1),
        lambda y: y[:, -1].softmax(-1),
        lambda y: loss_of(y),
        lambda y: y.view(-1, V)[3] * 2,
        lambda y: F.cross_entropy(y.transpose(1, 2), X),
    ],
)
def test_after_a_step_of_the_optimizer_they_are_those_from_before(read, write):
    model = Head(lambda y: y)
    params = random_rows(model, [7, 3], requires_grad=True)
    waits = functional_call(model, patch(params, deferred_logits=True), X)
    plain = functional_call(model, patch(params), X).detach()
    view = waits.view(-1, V)
    write(params.deltas["embed_tokens.weight"])
    assert waits.is_pending
    torch.testing.assert_close(read(waits).detach() * 1, read(plain))
    torch.testing.assert_close(view.detach() * 1, plain.view(-1, V))


@pytest.mark.parametrize("made", ["before the write", "after it"])
@pytest.mark.parametrize("write", WRITES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("trained", ["rows", "body", "both"])
def test_a_gradient_after_a_write_to_the_rows_is_right_or_refused(trained, dtype, write, made):
    model = Head(lambda y: y).to(dtype).eval()  # which does not warn of frozen rows
    params = random_rows(model, [7, 3], requires_grad=trained != "body")
    rows = params.deltas["embed_tokens.weight"]
    body = model.mix.weight.requires_grad_(trained != "rows")
    leaves = [one for one in (rows, body) if one.requires_grad]

    def logits() -> Tensor:
        return functional_call(model, patch(params, deferred_logits=True), X)

    truth = torch.autograd.grad(loss_of(logits()), leaves)
    waits = logits()
    loss = loss_of(waits) if made == "before the write" else None
    write(rows)
    # Rows that are cast to the matrix's dtype are a copy, for torch too.
    refused = write is add_counted and rows.requires_grad and rows.dtype == dtype
    loss = loss_of(waits) if loss is None else loss
    if refused:
        with pytest.raises(
            RuntimeError, match="rows .* have been modified by an inplace operation"
        ):
            loss.backward()
        assert rows.grad is None
        assert body.grad is None
    else:
        torch.testing.assert_close(torch.autograd.grad(loss, leaves), truth)


def test_two_losses_of_the_same_logits_have_each_its_gradient():
    model = Head(lambda y: y)
    model.head.weight = nn.Parameter(torch.randn(V, D), requires_grad=False)
    params = random_rows(model, [7, 3], targets="head", requires_grad=True)
    (rows,) = params.deltas.values()
    waits = functional_call(model, patch(params, deferred_logits=True), X)
    first, second = loss_of(waits), F.cross_entropy(waits.view(-1, V), LABELS.view(-1))
    first.backward()
    second.backward()
    plain = functional_call(model, patch(params), X)
    total = loss_of(plain) + F.cross_entropy(plain.view(-1, V), LABELS.view(-1))
    torch.testing.assert_close(rows.grad, *torch.autograd.grad(total, rows))


def test_hidden_states_that_were_written_to_since_are_refused():
    waits, _ = deferred()
    view = waits.view(-1, V)
    with torch.no_grad():
        waits.pending.hidden.add_(1)
    for read in (lambda: waits.sum(), lambda: waits[0], lambda: loss_of(view)):
        with pytest.raises(RuntimeError, match="were written to. Read them before that"):
            read()


def test_a_gradient_past_the_handlers_after_a_write_to_hidden_states_is_refused():
    model = nn.Sequential(nn.Embedding(V, D), nn.Linear(D, D), nn.Linear(D, V))
    model.requires_grad_(False)
    params = random_rows(model, [7, 3], targets="2", requires_grad=True)
    waits = functional_call(model, patch(params, deferred_logits=True), X)
    total = torch.jit.script(_squares)(waits)
    with torch.no_grad():
        waits.pending.hidden.add_(1)  # of which the layer before it keeps nothing
    with pytest.raises(RuntimeError, match="were written to. Read them before that"):
        total.backward()


def _squares(logits: Tensor) -> Tensor:
    return logits.square().sum()


def test_nothing_waits_where_nobody_trains():
    model = Head(lambda y: y)
    params = random_rows(model, [7, 3], requires_grad=True)
    with torch.no_grad():
        assert type(functional_call(model, patch(params, deferred_logits=True), X)) is Tensor
    still = random_rows(model, [7, 3])
    assert type(functional_call(model, patch(still, deferred_logits=True), X)) is Tensor
    model.head.bias.requires_grad_()  # whose gradient sums over all positions
    assert type(functional_call(model, patch(params, deferred_logits=True), X)) is Tensor


@pytest.mark.filterwarnings("ignore:Attempted to insert a get_attr")  # torch's own linearize
@pytest.mark.parametrize("name", TRANSFORMS)
def test_transforms(name: str):
    model = llama(attn_implementation="eager").double()
    params = random_rows(model, [7, 3])

    def loss(params, waits: bool) -> Tensor:
        weights = patch(params, deferred_logits=waits)
        return functional_call(model, weights, kwargs={"input_ids": X, "labels": LABELS}).loss

    ours = TRANSFORMS[name](lambda p: loss(p, True), params)
    theirs = TRANSFORMS[name](lambda p: loss(p, False), params)
    torch.testing.assert_close(
        torch.utils._pytree.tree_leaves(ours), torch.utils._pytree.tree_leaves(theirs)
    )


def test_the_gradient_of_each_example_needs_no_logits():
    model = llama(attn_implementation="eager", vocabulary=999)
    params = random_rows(model, [7, 3])

    def loss(params, x: Tensor, labels: Tensor, waits: bool) -> Tensor:
        weights = patch(params, deferred_logits=waits)
        kwargs = {"input_ids": x.unsqueeze(0), "labels": labels.unsqueeze(0)}
        return functional_call(model, weights, kwargs=kwargs).loss

    def of_each(waits: bool) -> Tensor:
        each = vmap(grad(lambda p, x, y: loss(p, x, y, waits)), in_dims=(None, 0, 0))
        return each(params, X, LABELS).deltas["model.embed_tokens.weight"]

    with Sizes() as sizes:
        ours = of_each(True)
    torch.testing.assert_close(ours, of_each(False))
    assert max(sizes.found) < 12 * 999  # nine of the twelve positions have labels


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(dtype):
    def then(y: Tensor) -> Tensor:
        return F.cross_entropy(y.view(-1, V), LABELS.view(-1))

    with torch.autocast("cpu", dtype):
        (plain, gradient), (ours, found) = both(then)
    assert ours.dtype == plain.dtype == torch.float32
    torch.testing.assert_close(ours, plain, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(found, gradient, rtol=0.02, atol=0.02)


@pytest.mark.parametrize("inside", ["the product", "the loss"])
def test_autocast_is_that_of_the_product(inside):
    def cast(enabled: bool) -> torch.autocast:
        return torch.autocast("cpu", torch.bfloat16, enabled=enabled)

    def step(waits: bool) -> list[Tensor]:
        model = Head(lambda y: y)
        params = random_rows(model, [7, 3], requires_grad=True)
        with cast(inside == "the product"):
            logits = functional_call(model, patch(params, deferred_logits=waits), X)
        with cast(inside == "the loss"):
            loss = F.cross_entropy(logits.view(-1, V), LABELS.view(-1)) + logits.tanh().mean()
        return [loss, logits, *torch.autograd.grad(loss, list(params.deltas.values()))]

    for ours, plain in zip(step(True), step(False), strict=True):
        assert ours.dtype == plain.dtype
        torch.testing.assert_close(ours * 1, plain, rtol=0.02, atol=0.01)


def test_generate_and_compile():
    model = llama()
    params = random_rows(model, [7, 3], requires_grad=True)
    kwargs = {"inputs": X, "max_new_tokens": 4, "do_sample": False, "num_beams": 2}
    texts = [
        functional_call(model, patch(params, **options), kwargs=kwargs, method="generate")
        for options in ({}, {"deferred_logits": True})
    ]
    assert torch.equal(*texts)

    def loss(params) -> Tensor:
        weights = patch(params, deferred_logits=True)
        return functional_call(model, weights, kwargs={"input_ids": X, "labels": LABELS}).loss

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(params), loss(params))


def test_a_token_module_trains_without_logits():
    model = llama()
    module = TokenModule(model, random_rows(model, [7, 3]))
    out = module.train()(input_ids=X, labels=LABELS)
    assert type(out.logits) is DeferredLogits
    assert type(module.eval()(input_ids=X).logits) is Tensor
