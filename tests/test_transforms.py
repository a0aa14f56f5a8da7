"""Every transform of torch.func, and torch.compile: the deferred weight against the dense."""

from __future__ import annotations

import re

import optree
import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.func import functional_call as torch_functional_call
from torch.func import grad, jvp, vmap

from tests.helpers.models import CORPUS, D, loss_of, make, tokens
from tests.helpers.rows import random_rows
from tests.helpers.transforms import TRANSFORMS
from ttfunc import TokenDeltas, functional_call, init_deltas, patch

IDS = [7, 3, 20]
X = tokens(*IDS)
HEADS = ["tied", "untied", "biased", "padding", "transpose", "einsum", "encoder_decoder"]


def setting(case: str) -> tuple[nn.Module, TokenDeltas]:
    model = make(case).requires_grad_(False).double()
    return model, random_rows(model, IDS)


def leaves(tree) -> list[Tensor]:
    return optree.tree_leaves(tree)


@pytest.mark.filterwarnings("ignore:Attempted to insert a get_attr")  # torch's own linearize
@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("case", HEADS)
def test_each_transform_agrees_with_dense(case: str, transform: str):
    model, params = setting(case)

    def loss(dense: bool):
        return lambda p: loss_of(functional_call(model, patch(p, dense=dense), (X,)))

    found, expected = (leaves(TRANSFORMS[transform](loss(d), params)) for d in (False, True))
    assert any(leaf.abs().sum() > 0 for leaf in expected)
    torch.testing.assert_close(found, expected, rtol=1e-7, atol=1e-9)


# torch.compile traces none of these, with or without a patch.
@pytest.mark.parametrize(
    "transform", [t for t in TRANSFORMS if not re.search("ize|dual|forward over forward", t)]
)
@pytest.mark.parametrize("case", ["tied", "untied", "einsum"])
def test_each_transform_compiles_to_one_graph(case: str, transform: str):
    torch._dynamo.reset()
    model, params = setting(case)

    def f(p: TokenDeltas) -> Tensor:
        return loss_of(functional_call(model, patch(p), (X,)))

    apply = TRANSFORMS[transform]
    compiled = torch.compile(lambda p: apply(f, p), fullgraph=True, backend="aot_eager")
    for found, expected in zip(leaves(compiled(params)), leaves(apply(f, params)), strict=True):
        torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("case", HEADS)
def test_gradients_of_each_example_agree_with_one_call_each(case: str):
    model, params = setting(case)

    def loss(p: TokenDeltas, x: Tensor) -> Tensor:
        return loss_of(functional_call(model, patch(p), (x.unsqueeze(0),)))

    found = vmap(grad(loss), in_dims=(None, 0))(params, X)
    for row in range(len(X)):
        expected = grad(loss)(params, X[row])
        for one, other in zip(leaves(found), leaves(expected), strict=True):
            torch.testing.assert_close(one[row], other)


@pytest.mark.parametrize("call", [functional_call, torch_functional_call], ids=["ttfunc", "torch"])
@pytest.mark.parametrize("case", ["tied", "untied", "biased", "padding", "transpose", "einsum"])
@pytest.mark.parametrize("dense", [False, True], ids=["deferred", "dense"])
@pytest.mark.parametrize("inner", ["loss", "grad"])
def test_it_compiles_to_one_graph_that_serves_every_step(case: str, inner: str, call, dense: bool):
    torch._dynamo.reset()
    model, params = setting(case)

    def loss(p: TokenDeltas, x: Tensor) -> Tensor:
        return loss_of(call(model, patch(p, dense=dense), (x,)))

    f = loss if inner == "loss" else grad(loss)
    compiled = torch.compile(f, fullgraph=True, backend="aot_eager")
    with torch._dynamo.config.patch(error_on_recompile=True):
        for step in range(3):
            rows = optree.tree_map(lambda t, s=step: t + s, params)
            torch.testing.assert_close(leaves(compiled(rows, X)), leaves(f(rows, X)))


@pytest.mark.parametrize("change", ["replaced", "untied"])
def test_a_compiled_call_refuses_a_stale_patch(change: str):
    torch._dynamo.reset()
    model, params = setting("tied")
    compiled = torch.compile(lambda p, x: functional_call(model, patch(p), (x,)), backend="eager")
    compiled(params, X)
    module = model.embed_tokens if change == "replaced" else model.lm_head
    module.weight = torch.nn.Parameter(module.weight.detach().clone())
    with pytest.raises(ValueError, match="stale patch: the parameter"):
        compiled(params, X)


def test_several_adapters_compile_without_a_warning():
    torch._dynamo.reset()
    model, params = setting("tied")
    other = init_deltas(model, [1], init="mean")

    def loss(p: TokenDeltas, q: TokenDeltas, x: Tensor) -> Tensor:
        return loss_of(functional_call(model, patch(p, q), (x,)))

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(params, other, X), loss(params, other, X))


def test_a_compiled_step_trains_leaves_of_torch_optim():
    torch._dynamo.reset()
    model, params = setting("tied")
    params = optree.tree_map(lambda t: t.clone().requires_grad_(), params)

    def loss(p: TokenDeltas, x: Tensor) -> Tensor:
        return loss_of(functional_call(model, patch(p), (x,)))

    torch.compile(loss, fullgraph=True, backend="inductor")(params, X).backward()
    expected = grad(loss)(optree.tree_map(torch.detach, params), X)
    for leaf, other in zip(leaves(params), leaves(expected), strict=True):
        torch.testing.assert_close(leaf.grad, other)


def test_autocast_agrees_with_dense():
    model = make("tied").requires_grad_(False)
    params = random_rows(model, IDS)

    def gradient(dense: bool) -> Tensor:
        def loss(p):
            with torch.autocast("cpu", torch.bfloat16):
                logits = functional_call(model, patch(p, dense=dense), (X,))
            assert logits.dtype == torch.bfloat16
            return loss_of(logits.float())

        return leaves(grad(loss)(params))[0]

    assert gradient(False).dtype == torch.float32
    torch.testing.assert_close(gradient(False), gradient(True), rtol=0.05, atol=0.02)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # torch.compile looks at it
@pytest.mark.parametrize("part", ["forward", "lm_head", "model"])
def test_a_part_of_the_model_may_be_compiled(part: str):
    torch._dynamo.reset()
    model, plain = make("tied").requires_grad_(False), make("tied").requires_grad_(False)
    compiled = CompileCounterWithBackend("aot_eager")
    if part == "forward":
        model.forward = torch.compile(model.forward, backend=compiled)
    elif part == "lm_head":
        model.lm_head.forward = torch.compile(model.lm_head.forward, backend=compiled)
    else:
        model.compile(backend=compiled)

    for scale in (1.0, 2.0, -1.0):  # the graph of one patch must not serve another's rows
        gradients = []
        for one in (model, plain):
            params = init_deltas(one, IDS, init=scale * torch.ones(3, D), requires_grad=True)
            loss = loss_of(functional_call(one, patch(params), (X,)))
            (delta,) = leaves(params)
            gradients.append(torch.autograd.grad(loss, delta)[0])
        torch.testing.assert_close(*gradients)
    assert compiled.frame_count == 1
    torch.testing.assert_close(model(X), plain(X))


def test_an_operation_without_a_jvp_fails_as_it_does_without_ttfunc():
    class Attending(CORPUS["tied"]):
        def mix(self, h: Tensor) -> Tensor:
            h = h.unsqueeze(-3)
            return nn.functional.scaled_dot_product_attention(h, h, h).squeeze(-3)

    model = Attending().requires_grad_(False)
    params = init_deltas(model, IDS)

    def plain(weight: Tensor) -> Tensor:
        return torch_functional_call(model, {"embed_tokens.weight": weight}, (X,))

    weight = torch.randn(len(model.embed_tokens.weight), D)
    for f, primal in (
        (plain, weight),
        (lambda p: functional_call(model, patch(p), (X,)), params),
    ):
        with pytest.raises(NotImplementedError, match="forward AD with _scaled_dot_product"):
            jvp(f, (primal,), (optree.tree_map(torch.ones_like, primal),))


def test_a_patch_made_in_a_transform_that_the_rows_are_not_part_of():
    model, params = setting("tied")

    def loss(x: Tensor) -> Tensor:
        return loss_of(functional_call(model, patch(params), (x[None],)))

    expected = torch.stack([loss(x) for x in X])
    torch.testing.assert_close(vmap(loss)(X), expected)
