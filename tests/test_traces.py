"""A patched weight where operations are traced: fake tensors, make_fx, torch.export, meta."""

from __future__ import annotations

import copy

import optree
import pytest
import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensor, FakeTensorMode
from torch.func import functional_call as torch_functional_call
from torch.func import grad, vmap
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils.flop_counter import FlopCounterMode

from tests.helpers.graphs import Of, constants, copies
from tests.helpers.models import CORPUS, D, V, loss_of, make, tokens
from tests.helpers.oracle import edited
from tests.helpers.rows import adapters, random_rows
from ttfunc import TokenDeltas, TokenModule, functional_call, init_deltas, patch, patch_mixed
from ttfunc.torch_private import no_torch_function

# torch's own, in run_decompositions
pytestmark = pytest.mark.filterwarnings("ignore:.isinstance.treespec, LeafSpec")

IDS = [7, 3, 20]
X = tokens(*IDS)
LONGER = tokens(*IDS, batch=5)
# Three ways to hold it, and what bypasses `__torch_function__` or reads the matrix itself.
CASES = ["tied", "untied", "biased", "padding", "storage_tied", "transpose"]
DENSE = ["function", "reading"]
MODES = ["real", "fake", "symbolic"]


def setting(case: str) -> tuple[nn.Module, TokenDeltas]:
    model = make(case).requires_grad_(False)
    return model, random_rows(model, IDS)


def called(model: nn.Module, params: TokenDeltas, x: Tensor) -> Tensor:
    return functional_call(model, patch(params), (x,))


def traced(f, *args, mode: str = "fake"):
    return make_fx(f, tracing_mode=mode, _allow_non_fake_inputs=True)(*args)


def of_a_batch(module: nn.Module, args: tuple, strict: bool) -> torch.export.ExportedProgram:
    """Exported for batches of any size."""
    rows = [None] * len(args[0].deltas)
    shapes = (rows, {0: torch.export.Dim("batch")})
    return torch.export.export(module, args, dynamic_shapes=(shapes,), strict=strict)


@pytest.mark.filterwarnings("ignore:token 3 is the padding_idx")
@pytest.mark.parametrize("case", sorted(CORPUS.keys() - {"max_norm"}))
def test_fake_tensors_have_the_shape_and_the_gradient(case: str):
    with FakeTensorMode():
        model = make(case).requires_grad_(False)
        params = init_deltas(model, IDS, requires_grad=True)
        logits = called(model, params, torch.zeros(2, 5, dtype=torch.int64))
        loss_of(logits).backward()
    (delta,) = params.deltas.values()
    assert isinstance(logits, FakeTensor)
    assert logits.shape == (2, 5, V)
    assert delta.grad.shape == delta.shape


def test_a_real_model_among_fake_tensors():
    model, params = setting("tied")
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        assert called(model, params, mode.from_tensor(X)).shape == (*X.shape, V)


def test_fake_tensors_outside_of_their_mode_are_refused():
    with FakeTensorMode() as mode:
        model = make("tied").requires_grad_(False)
        params = init_deltas(model, IDS)
    with pytest.raises(AssertionError, match="Please convert all Tensors to FakeTensors first"):
        called(model, params, mode.from_tensor(X))


def test_fake_tables_are_not_kept():
    model, params = setting("tied")
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        called(model, params, mode.from_tensor(X))
    torch.testing.assert_close(called(model, params, X), edited(model, params)(X))


def test_on_meta():
    with torch.device("meta"):
        model = make("tied").requires_grad_(False)
    params = init_deltas(model, IDS, requires_grad=True)
    called(model, params, torch.zeros(2, 5, dtype=torch.int64, device="meta")).sum().backward()
    (delta,) = params.deltas.values()
    assert delta.grad.is_meta
    assert delta.grad.shape == (len(IDS), D)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("case", CASES + DENSE)
def test_make_fx_traces_the_logits_and_the_gradient(case: str, mode: str):
    model, params = setting(case)
    (rows,), spec = optree.tree_flatten(params)
    other = rows + 1

    def step(rows: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        rows = rows.detach().requires_grad_()
        logits = called(model, optree.tree_unflatten(spec, [rows]), x)
        return logits.detach(), torch.autograd.grad(loss_of(logits), rows)[0]

    graph = traced(step, rows, X, mode=mode)
    torch.testing.assert_close(graph(other, X), step(other, X))
    if case not in DENSE:
        assert copies(graph.graph, (V, D)) == []


# torch leaves a size of a wrapper in a symbolic graph of `grad`, also of the copy by hand.
@pytest.mark.parametrize("mode", ["real", "fake"])
@pytest.mark.parametrize("case", CASES + DENSE)
@pytest.mark.parametrize("transform", ["grad", "vmap of grad"])
def test_make_fx_traces_a_transform(case: str, mode: str, transform: str):
    if transform == "vmap of grad" and case == "function":
        return  # the head of that model has no rule for vmap
    model, params = setting(case)

    def gradient(params: TokenDeltas, x: Tensor) -> TokenDeltas:
        return grad(lambda p, x: loss_of(called(model, p, x)))(params, x)

    f = gradient if transform == "grad" else vmap(gradient, in_dims=(None, 0))
    x = X if transform == "grad" else X.unsqueeze(1)
    found = traced(f, params, x, mode=mode)(params, x)
    torch.testing.assert_close(optree.tree_leaves(found), optree.tree_leaves(f(params, x)))


@pytest.mark.parametrize("strict", [False, True], ids=["not strict", "strict"])
@pytest.mark.parametrize("case", CASES + DENSE)
def test_export_with_rows_as_an_input(case: str, strict: bool):
    model, params = setting(case)
    exported = of_a_batch(Of(called, model), (params, X), strict)
    other = random_rows(model, IDS, seed=5)
    expected = edited(model, other)(LONGER)
    for one in (exported, exported.run_decompositions()):
        torch.testing.assert_close(one.module()(other, LONGER), expected)
        assert constants(one, V * D) == []
    if case not in DENSE:
        assert copies(one.graph, (V, D)) == []


@pytest.mark.filterwarnings("ignore:While compiling, we found certain side effects")  # torch's own
@pytest.mark.parametrize("call", [functional_call, torch_functional_call], ids=["ttfunc", "torch"])
@pytest.mark.parametrize("strict", [False, True], ids=["not strict", "strict"])
@pytest.mark.parametrize("kind", ["deferred", "dense", "deferred logits", "mixed"])
def test_export_with_rows_as_constants(kind: str, strict: bool, call):
    model, params = setting("tied")
    each = adapters(model, IDS, [1, 2])
    make_weights = {
        "deferred": lambda: patch(params),
        "dense": lambda: patch(params, dense=True),
        "deferred logits": lambda: patch(params, deferred_logits=True),
        "mixed": lambda: patch_mixed(each, [0, 1, -1, 0, 1][: len(X)]),
    }[kind]
    module = Of(lambda model, x: call(model, make_weights(), (x,)), model)
    exported = torch.export.export(module, (X,), strict=strict)
    torch.testing.assert_close(exported.module()(X), module(X))
    assert constants(exported, V * D) == []
    for one in (exported, exported.run_decompositions()):
        assert (copies(one.graph, (V, D)) != []) == (kind == "dense")


@pytest.mark.parametrize("case", CASES)
def test_weights_that_were_made_before_the_export(case: str):
    model, params = setting(case)
    weights = patch(params)
    exported = torch.export.export(
        Of(lambda model, x: functional_call(model, weights, (x,)), model), (X,)
    )
    torch.testing.assert_close(exported.module()(X), edited(model, params)(X))
    assert constants(exported, V * D) == []


def test_the_model_in_a_wrapper_and_under_another_name():
    model, params = setting("tied")
    wrapper = nn.Sequential(model)

    def renamed(wrapper: nn.Module, x: Tensor) -> Tensor:
        weights = {f"0.{name}": weight for name, weight in patch(params).items()}
        return functional_call(wrapper, weights, (x,))

    exported = torch.export.export(Of(renamed, wrapper), (X,))
    torch.testing.assert_close(exported.module()(X), edited(model, params)(X))


def test_a_token_module_that_trains():
    model, params = setting("tied")
    module = TokenModule(model, optree.tree_map(torch.clone, params))
    torch.testing.assert_close(
        torch.export.export(module, (X,)).module()(X), edited(model, params)(X)
    )


def test_the_matrix_that_is_changed_in_the_exported_program():
    """The base is the program's parameter, not a constant."""
    model, params = setting("tied")
    module = torch.export.export(Of(called, model), (params, X)).module()
    with torch.no_grad():
        for one in (model, module):
            for parameter in one.parameters():
                parameter.copy_(parameter.detach().clone().fill_(0.25))
    torch.testing.assert_close(module(params, X), edited(model, params)(X))


def test_a_patch_of_another_model_is_refused():
    model, params = setting("tied")
    module = Of(lambda model, x: called(model, params, x), copy.deepcopy(model))
    with pytest.raises(ValueError, match="stale patch: .* this is another model"):
        torch.export.export(module, (X,))


def test_writing_to_a_traced_weight_is_refused():
    _, params = setting("tied")
    with FakeTensorMode(allow_non_fake_inputs=True):
        (weight,) = patch(params).values()
        with pytest.raises(RuntimeError, match="zero_ on a patched weight"):
            weight.zero_()
        with no_torch_function():
            with pytest.raises(RuntimeError, match="as_strided on a patched weight"):
                torch.as_strided(weight, (2,), (1,))
            assert (weight + 1).shape == (V, D)


def test_an_export_leaves_the_model_and_the_rows_as_they_are():
    model, params = setting("tied")
    before = called(model, params, X)
    for strict in (False, True):
        torch.export.export(Of(called, model), (params, X), strict=strict)
    assert torch.equal(called(model, params, X), before)


def test_other_modes_see_the_fused_product():
    model, params = setting("tied")
    with FlopCounterMode(display=False) as counted, torch.no_grad():
        called(model, params, X)
    with FlopCounterMode(display=False) as plain, torch.no_grad():
        model(X)
    more = 2 * X.numel() * len(IDS) * D
    assert counted.get_total_flops() == plain.get_total_flops() + more
