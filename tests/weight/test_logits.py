"""Deferred logits: whatever a model or a loop does to them gives what it gives to the logits."""

from __future__ import annotations

import copy
import io
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import grad, vjp, vmap

from tests.helpers.llama import llama
from tests.helpers.models import D, V
from tests.helpers.rows import random_rows
from tests.helpers.sizes import Sizes
from tests.helpers.transforms import TRANSFORMS
from ttfunc import TokenModule, functional_call, patch, stack
from ttfunc.weight.logits import DeferredLogits, Undone

X = torch.tensor([[3, 7, 5, 9, 1, 4], [7, 2, 8, 3, 6, 11]])
LABELS = torch.tensor([[-100, -100, 5, 9, -100, 4], [7, 2, 8, -100, 6, 11]])


class Head(nn.Module):
    """An embedding, a tied head with a bias, and what a test does to the logits."""

    def __init__(self, then) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed_tokens = nn.Embedding(V, D)
        self.mix = nn.Linear(D, D)
        self.head = nn.Linear(D, V)
        self.head.weight = self.embed_tokens.weight
        self.then = then
        self.requires_grad_(False)

    def forward(self, x: Tensor) -> object:
        return self.then(self.head(self.mix(self.embed_tokens(x)).tanh()))


def both(then, x: Tensor = X) -> list[tuple[Tensor, Tensor]]:
    """What comes of it, and its gradient, without deferring and with it."""
    model, found = Head(then), []
    for deferred in (False, True):
        params = random_rows(model, [7, 3, 5], requires_grad=True)
        out = functional_call(model, patch(params, deferred_logits=deferred), x)
        weight = torch.linspace(-1, 1, out.numel()).reshape(out.shape)
        (out.float() * weight).sum().backward()
        found.append((out.detach(), params.deltas["embed_tokens.weight"].grad))
    return found


LOSSES = {
    "flat": lambda y: F.cross_entropy(y.view(-1, V), LABELS.view(-1)),
    "float": lambda y: F.cross_entropy(y.float().flatten(0, 1), LABELS.flatten()),
    "double": lambda y: F.cross_entropy(y.double().flatten(0, 1), LABELS.flatten()),
    "shifted": lambda y: F.cross_entropy(
        y[..., :-1, :].contiguous().reshape(-1, V), LABELS[..., 1:].reshape(-1)
    ),
    "sum": lambda y: F.cross_entropy(y.reshape(-1, V), LABELS.reshape(-1), reduction="sum"),
    "none": lambda y: F.cross_entropy(y.flatten(0, 1), LABELS.flatten(), reduction="none"),
    "ignoring": lambda y: F.cross_entropy(y.flatten(0, 1), X.flatten(), ignore_index=3),
    "smoothed": lambda y: F.cross_entropy(y.view(-1, V), LABELS.view(-1), label_smoothing=0.1),
    "weighted": lambda y: F.cross_entropy(
        y.view(-1, V), LABELS.view(-1), torch.linspace(0.1, 1, V)
    ),
    "scaled": lambda y: F.cross_entropy((y * 0.5 / 3).view(-1, V), LABELS.view(-1)),
    "capped": lambda y: F.cross_entropy(
        (2.0 * torch.tanh(y / 2.0)).squeeze(0).view(-1, V), LABELS.view(-1)
    ),
    "one position": lambda y: F.cross_entropy(y[0, 2], LABELS[0, 2]),
    "chosen": lambda y: F.cross_entropy(y[LABELS >= 0], LABELS[LABELS >= 0]),
    "at": lambda y: F.cross_entropy(y[:, torch.tensor([1, 3])][1], X[1, [1, 3]]),
    "module": lambda y: nn.CrossEntropyLoss(reduction="sum")(y[0], X[0]),
}


@pytest.mark.parametrize("loss", LOSSES)
def test_a_loss_needs_no_logits(loss: str):
    waited = []

    def then(logits: Tensor) -> Tensor:
        if not isinstance(logits, DeferredLogits):
            return LOSSES[loss](logits)
        waited.append(logits)
        with mock.patch.object(Undone, "done", side_effect=AssertionError("made")):
            return LOSSES[loss](logits)

    (plain, gradient), (ours, found) = both(then)
    assert waited
    torch.testing.assert_close(ours, plain)
    assert ours.dtype == plain.dtype
    torch.testing.assert_close(found, gradient)


READS = {
    "class first": lambda y: F.cross_entropy(y.transpose(1, 2), LABELS),
    "probabilities": lambda y: F.cross_entropy(y.view(-1, V), torch.full((12, V), 1 / V)),
    "weighted and smoothed": lambda y: F.cross_entropy(
        y.view(-1, V), LABELS.view(-1), torch.linspace(0.1, 1, V), label_smoothing=0.1
    ),
    "old arguments": lambda y: y.view(-1, V).log_softmax(-1).mean(),
    "log_softmax": lambda y: y.log_softmax(-1)[..., :3],
    "columns": lambda y: y[..., 3:7],
    "a column": lambda y: y[0, :, 4],
    "a new last dimension": lambda y: y[..., None],
    "the last of each": lambda y: y[:, -1],
    "views": lambda y: y.view(1, 12, V)[0].unsqueeze(0).squeeze(0)[::2],
    "a view of pieces": lambda y: y.view(-1),
    "plus": lambda y: y + 1,
    "with itself": lambda y: y * y,
    "with a tensor": lambda y: y * torch.tensor(2.0),
    "clone": lambda y: y.clone(),
    "cat": lambda y: torch.cat([y, y[:, :1]], dim=1),
    "matmul": lambda y: y @ torch.ones(V, 2),
    "in place": lambda y: y.mul_(2),
    "a column written": lambda y: (y.__setitem__((..., 4), 0.0), y)[1],
    "divided in place": lambda y: (y.div_(2), y.view(-1, V))[1],
    "twice": lambda y: F.cross_entropy(y.view(-1, V), X.view(-1)) * y.logsumexp(-1).mean(),
    "integers": lambda y: y.argmax(-1).float() + y[..., 0],
    "to bool": lambda y: y * (y > 0),
    "reversed": lambda y: 1.0 / (y * y + 1),
    # Writes reach all views of one memory, and no copies.
    "a view, then a write": lambda y: (y.view(-1, V), y.zero_(), y)[0] + 1,
    "a write to a column": lambda y: (unlearnt(y[..., 4].fill_, -5.0), loss_of(y))[1],
    "a write to a view's column": lambda y: (y.view(-1, V)[:, 4].fill_(-5.0), loss_of(y))[1],
    "a write to a detached view": lambda y: (y.detach()[..., 4].fill_(-5.0), loss_of(y))[1],
    "a write beside a view": lambda y: (lambda view: (y[..., 4].fill_(-5.0), loss_of(view))[1])(
        y.view(-1, V)
    ),
    "a write to one example": lambda y: (y[0].fill_(-5.0), loss_of(y))[1],
    "a write to a place": lambda y: (y[torch.tensor(0)].mul_(0.5), loss_of(y))[1],
    "a write to turned logits": lambda y: (y.transpose(0, 1).mul_(2.0), loss_of(y))[1],
    "a write to data": lambda y: (y.data.mul_(2), loss_of(y))[1],
    "a write of numpy's": lambda y: (y.detach().numpy().fill(3.0), loss_of(y))[1],
    "a copy, then a write": lambda y: (lambda copy: (y.zero_(), loss_of(copy))[1])(
        y[:, :-1].reshape(-1, V)
    ),
    "chosen, then a write": lambda y: (lambda copy: (y.zero_(), loss_of(copy))[1])(y[X > 3]),
    "a write under no_grad": lambda y: (unlearnt(y.__setitem__, (..., 4), -5.0), loss_of(y))[1],
    "scaled under no_grad": lambda y: loss_of(unlearnt(lambda: y / 2)) + loss_of(y),
    "a target of its own": lambda y: F.mse_loss(
        y[:, 1:].softmax(-1), unlearnt(lambda: y[:, :-1]).softmax(-1)
    ),
    "detached, then trained": lambda y: (y.detach().requires_grad_() * y).sum(),
    "infinite weight": lambda y: F.cross_entropy(
        y.view(-1, V), LABELS.view(-1), torch.tensor([float("inf"), *[0.5] * (V - 1)])
    ),
    "a function that scales": lambda y: loss_of(Reversed.apply(y)),
    "a function that views": lambda y: loss_of(ReversedView.apply(y)),
    "a hook of its node": lambda y: (
        y.grad_fn.register_prehook(lambda g: (g[0] * 3,)),
        loss_of(y),
    )[1],
    "a hook": lambda y: (y.register_hook(lambda g: g * 3) if y.requires_grad else 0, loss_of(y))[1],
}


def loss_of(logits: Tensor) -> Tensor:
    return F.cross_entropy(logits.reshape(-1, V), X.reshape(-1)[: logits.numel() // V])


def unlearnt(function, *args) -> Tensor:
    with torch.no_grad():
        return function(*args)


class Reversed(torch.autograd.Function):
    """A gradient of someone's own, around what deferred logits can do undone."""

    @staticmethod
    def forward(ctx, logits: Tensor) -> Tensor:
        return logits * 2

    @staticmethod
    def backward(ctx, gradient: Tensor) -> Tensor:
        return gradient * -100


class ReversedView(Reversed):
    @staticmethod
    def forward(ctx, logits: Tensor) -> Tensor:
        return logits.view(-1, V)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> Tensor:
        return gradient.view(2, 6, V) * -100


@pytest.mark.parametrize("read", READS)
def test_anything_else_makes_the_logits(read: str):
    (plain, gradient), (ours, found) = both(READS[read])
    torch.testing.assert_close(ours, plain)
    torch.testing.assert_close(found, gradient)


def deferred(dtype: torch.dtype = torch.float32) -> tuple[DeferredLogits, Tensor]:
    """Logits that wait, and the same ones without deferring."""
    model = Head(lambda y: y).to(dtype)
    params = random_rows(model, [7, 3], requires_grad=True)
    waits = functional_call(model, patch(params, deferred_logits=True), X)
    assert type(waits) is DeferredLogits
    return waits, functional_call(model, patch(params), X)


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
    kept = waits.made
    assert waits.exp().requires_grad
    waits.tanh()
    assert waits.made is kept
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


class Doubled(torch.autograd.Function):
    """As a kernel of someone else's, which never asks `__torch_function__` for its gradient."""

    @staticmethod
    def forward(ctx, logits: Tensor) -> Tensor:
        ctx.save_for_backward(logits)
        return logits.exp().sum(-1)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> Tensor:
        (logits,) = ctx.saved_tensors
        return logits.exp() * gradient.unsqueeze(-1)


def test_a_function_of_someone_else():
    (plain, gradient), (ours, found) = both(lambda y: Doubled.apply(y / 2))
    torch.testing.assert_close(ours, plain)
    torch.testing.assert_close(found, gradient)


def test_a_scripted_function():
    @torch.jit.script
    def scripted(y: Tensor) -> Tensor:
        return (y * 2).logsumexp(-1)

    (plain, gradient), (ours, found) = both(scripted)
    torch.testing.assert_close(ours, plain)
    torch.testing.assert_close(found, gradient)


def test_after_a_step_of_the_optimizer_they_are_those_from_before():
    for read in (
        lambda y: y.argmax(-1),
        lambda y: y[:, -1].softmax(-1),
        lambda y: loss_of(y),
        lambda y: y.view(-1, V)[3] * 2,
        lambda y: F.cross_entropy(y.transpose(1, 2), X),
    ):
        waits, plain = deferred()
        view = waits.view(-1, V)
        with torch.no_grad():
            waits.undone.rows.values.add_(1)
        torch.testing.assert_close(read(waits) * 1, read(plain).detach())
        torch.testing.assert_close(view * 1, plain.detach().view(-1, V))
        assert not read(waits).requires_grad  # plain torch refuses a backward from here


def test_hidden_states_that_were_written_to_since_are_refused():
    waits, _ = deferred()
    view = waits.view(-1, V)
    with torch.no_grad():
        waits.undone.hidden.add_(1)
    for read in (lambda: waits.sum(), lambda: waits[0], lambda: loss_of(view)):
        with pytest.raises(RuntimeError, match="were written to. Read them before that"):
            read()


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


def test_the_transpose_of_the_logits_themselves():
    model = llama(attn_implementation="eager")
    params, seed = random_rows(model, [7, 3]), torch.linspace(-1, 1, 12 * V).reshape(2, 6, V)

    def pulled_back(waits: bool) -> Tensor:
        def call(params):
            return functional_call(model, patch(params, deferred_logits=waits), X).logits

        return vjp(call, params)[1](seed)[0].deltas["model.embed_tokens.weight"]

    torch.testing.assert_close(pulled_back(True), pulled_back(False))
    (_, gradient), (_, found) = both(
        lambda y: (torch.autograd.backward(y, seed, retain_graph=True), y)[1]
    )
    torch.testing.assert_close(found, gradient)


def test_positions_chosen_by_vmap():
    waits, plain = deferred()

    def each(y: Tensor) -> Tensor:
        flat = y.view(-1, V)
        return vmap(lambda i: F.cross_entropy(flat[i], X.view(-1)[i]))(torch.arange(12))

    torch.testing.assert_close(each(waits), each(plain))


def test_logits_that_leave_a_transform():
    model = llama(attn_implementation="eager")
    params = random_rows(model, [7, 3], requires_grad=True)

    def call(params, waits: bool):
        return functional_call(model, patch(params, deferred_logits=waits), X, {"labels": LABELS})

    def aux(params, waits: bool):
        out = call(params, waits)
        return out.loss, out.logits

    ours = grad(lambda p: aux(p, True), has_aux=True)(params)[1]
    torch.testing.assert_close(ours * 1, grad(lambda p: aux(p, False), has_aux=True)(params)[1])
    members = stack([params, random_rows(model, [7, 3], 1)])
    ours = vmap(lambda p: call(p, True).logits)(members)
    torch.testing.assert_close(ours * 1, vmap(lambda p: call(p, False).logits)(members))


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


def test_linear_cross_entropy_of_a_bias_that_does_not_fit():
    params = random_rows(llama(), [7, 3])
    weight, hidden = patch(params)["model.embed_tokens.weight"], torch.randn(12, D)
    for length in (V + 1, V - 1):
        with pytest.raises(RuntimeError, match="size|shape|expand"):
            F.linear_cross_entropy(hidden, weight, X.view(-1), linear_bias=torch.ones(length))


def test_linear_cross_entropy():
    model = llama()
    params = random_rows(model, [7, 3], requires_grad=True)
    weight = patch(params)["model.embed_tokens.weight"]
    hidden = torch.randn(12, D, requires_grad=True)
    options = {"label_smoothing": 0.1, "reduction": "sum"}
    with Sizes() as sizes:
        ours = F.linear_cross_entropy(hidden, weight, LABELS.view(-1), **options)
    dense = patch(params, dense=True)["model.embed_tokens.weight"]
    theirs = F.linear_cross_entropy(hidden, dense, LABELS.view(-1), **options)
    torch.testing.assert_close(ours, theirs)
    leaves = [hidden, *params.deltas.values()]
    for one, other in zip(
        torch.autograd.grad(ours, leaves), torch.autograd.grad(theirs, leaves), strict=True
    ):
        torch.testing.assert_close(one, other)
    assert weight.source.uses == {"product"}
    assert max(sizes.found) < 12 * V
