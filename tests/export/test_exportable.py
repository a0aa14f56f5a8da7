"""A model whose rows and ids are inputs: against the edited model, exported once for any rows."""

from __future__ import annotations

import copy

import optree
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.export import Dim
from torch.fx.experimental.proxy_tensor import make_fx

from tests.helpers.graphs import constants, copies
from tests.helpers.llama import llama
from tests.helpers.models import D, Language, V, loss_of, make, tokens
from tests.helpers.oracle import edited
from tests.helpers.rows import random_rows
from ttfunc import Exportable, TokenDeltas, functional_call, init_deltas, patch

pytestmark = [
    # torch's own, in run_decompositions, and of transformers' models under dynamo
    pytest.mark.filterwarnings("ignore:.isinstance.treespec, LeafSpec"),
    pytest.mark.filterwarnings("ignore:While compiling, we found certain side effects"),
]

K = 4  # rows of the programs
PLAIN = {"use_cache": False, "return_dict": False}
BATCH = {0: Dim("batch"), 1: Dim("length")}
MODELS = {
    "llama": lambda: (llama(), {"kwargs": PLAIN}),
    "llama, untied": lambda: (
        llama(tie=False),
        {"kwargs": PLAIN, "targets": ["embed_tokens", "lm_head"]},
    ),
    **{
        case: lambda case=case: (make(case).requires_grad_(False), {})
        for case in ("tied", "biased", "scaled", "padding", "storage_tied", "transpose", "function")
    },
}
BOTH = pytest.mark.parametrize("strict", [False, True], ids=["not strict", "strict"])


def logits(out) -> Tensor:
    return out[0] if isinstance(out, tuple) else out


def spec_of(tensors) -> object:
    """No dynamic dimension, in one tensor or a dict of them."""
    return dict.fromkeys(tensors) if isinstance(tensors, dict) else None


def exported(program: Exportable, inputs: tuple, x: Tensor, strict: bool = False):
    shapes = (*map(spec_of, inputs), (BATCH,))
    return torch.export.export(program, (*inputs, x), dynamic_shapes=shapes, strict=strict)


def check_any(name: str, module, program: Exportable, targets=None) -> None:
    """The exported module agrees with an edited model for random rows, ids, batches, lengths."""

    @settings(max_examples=10, deadline=None)
    @given(
        st.lists(st.integers(0, V - 1), min_size=1, max_size=K, unique=True),
        st.integers(1, 4),
        st.integers(1, 9),
        st.integers(0, 99),
    )
    def agrees(ids: list[int], batch: int, length: int, seed: int) -> None:
        params = random_rows(program.model, ids, seed, targets=targets)
        generator = torch.Generator().manual_seed(seed)
        x = torch.randint(0, V, (batch, length), generator=generator)
        x[0, 0] = ids[0]
        expected = logits(edited(program.model, params)(x, **program.kwargs))
        found = logits(module(*program.inputs(params, rows=K), x))
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)

    agrees()


@BOTH
@pytest.mark.parametrize("name", MODELS)
def test_one_program_serves_any_rows(name: str, strict: bool):
    model, options = MODELS[name]()
    program = Exportable(model, **options)
    targets = options.get("targets")
    inputs = program.inputs(random_rows(model, [7, 3], targets=targets), rows=K)
    found = exported(program, inputs, tokens(7, 3), strict)
    plain = found.run_decompositions()
    check_any(name, plain.module(), program, targets)
    assert constants(found, V * D) == constants(plain, V * D) == []
    if name != "function":  # whose head multiplies by the matrix itself
        assert copies(found.graph, (V, D)) == copies(plain.graph, (V, D)) == []


def test_the_bytes_of_the_graph_are_those_of_the_logits():
    """No node but the parameters and the logits grows with the vocabulary."""
    vocabulary = 5000
    model = llama(vocabulary=vocabulary)
    program = Exportable(model, kwargs=PLAIN)
    inputs = program.inputs(random_rows(model, [7, 3]), rows=K)
    graph = exported(program, inputs, tokens(7, 3)).run_decompositions().graph
    nodes = [n for n in graph.nodes if n.op == "call_function" and "val" in n.meta]
    large = [n for n in nodes if vocabulary in getattr(n.meta["val"], "shape", ())]
    made = {n.target._schema.name for n in large} - {"aten::alias", "aten::permute", "aten::view"}
    assert made <= {"aten::mm", "aten::scatter", "aten::_unsafe_view"}
    assert len(graph.nodes) < 500
    small = [n for n in nodes if n not in large]
    assert all(
        one.numel() <= 2 * K * max(D, 2 * K)
        for n in small
        if isinstance(one := n.meta["val"], Tensor) and not one.is_floating_point()
        if not any(isinstance(size, torch.SymInt) for size in one.shape)
    )


def test_ids_that_a_program_cannot_check_are_harmless_or_the_first_counts():
    model = make("tied").requires_grad_(False)
    program = Exportable(model)
    x = tokens(7, 3)
    rows, ids = program.inputs(random_rows(model, [7, 3]), rows=K)
    module = exported(program, (rows, ids), x).module()
    beyond = torch.tensor([7, V, -5, 2**40])
    expected = module(rows, torch.tensor([7, -1, -1, -1]), x)
    assert torch.equal(module(rows, beyond, x), expected)
    assert torch.equal(module(rows, torch.tensor([7, 7, 7, -1]), x), expected)


def test_a_training_step_is_exported():
    model = llama(attn_implementation="eager")
    program = Exportable(model, kwargs=PLAIN)
    params = random_rows(model, [7, 3])
    inputs, x = program.inputs(params, rows=K), tokens(7, 3)

    def step(rows: Tensor, ids: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        rows = rows.detach().requires_grad_()
        loss = program(rows, ids, x, labels=x)[0]
        return loss.detach(), torch.autograd.grad(loss, rows)[0]

    graph = make_fx(step, tracing_mode="symbolic", _allow_non_fake_inputs=True)(*inputs, x)
    shapes = (None, None, {0: Dim("batch", min=2), 1: Dim("length", min=2)})
    found = torch.export.export(graph, (*inputs, x), dynamic_shapes=shapes).module()
    other = optree.tree_map(lambda t: t.requires_grad_(), random_rows(model, [5, 9, 1], 4))
    longer = tokens(5, 9, 1, batch=5)
    loss, gradient = found(*program.inputs(other, rows=K), longer)
    expected = functional_call(
        model, patch(other), kwargs={"input_ids": longer, "labels": longer}
    ).loss
    expected.backward()
    (delta,) = other.deltas.values()
    torch.testing.assert_close(loss, expected.detach())
    torch.testing.assert_close(gradient[:3], delta.grad)
    assert gradient[3:].eq(0).all()


def test_gradients_in_eager_mode():
    model = make("tied").requires_grad_(False).double()
    program, params = Exportable(model), random_rows(model, [7, 3], requires_grad=True)
    x = tokens(7, 3)
    loss_of(functional_call(model, patch(params), (x,))).backward()
    rows, ids = program.inputs(params, rows=K)
    loss_of(program(rows.requires_grad_(), ids, x)).backward()
    (delta,) = params.deltas.values()
    torch.testing.assert_close(rows.grad[:2], delta.grad)


def test_it_holds_the_model_and_changes_nothing():
    model = make("tied")
    program = Exportable(model)
    assert program.model is model
    assert [name for name, _ in program.named_parameters()] == [
        f"model.{name}" for name, _ in model.named_parameters()
    ]


def test_only_one_of_two_matrices_has_rows():
    model = make("untied").requires_grad_(False)
    program = Exportable(model, targets=["embed_tokens", "lm_head"])
    params = random_rows(model, [7, 3], targets=["lm_head"])
    rows, ids = program.inputs(params, rows=K)
    assert ids["embed_tokens.weight"].eq(-1).all()
    torch.testing.assert_close(program(rows, ids, tokens(7)), edited(model, params)(tokens(7)))


def bad_inputs() -> dict[str, tuple]:
    rows, ids = torch.zeros(2, D), torch.tensor([7, 3])
    return {
        "repeated": (rows, torch.tensor([7, 7]), ValueError, r"\[7\] .* more than once"),
        "past the end": (rows, torch.tensor([7, V]), IndexError, rf"\[{V}\] are no tokens"),
        "negative": (rows, torch.tensor([7, -2]), IndexError, r"\[-2\] are no tokens .* or -1"),
        "int32": (rows, ids.int(), TypeError, "int64 tensor, got torch.int32"),
        "a list": (rows, [7, 3], TypeError, "rows of .* got list"),
        "whole rows": (rows.long(), ids, TypeError, "float tensor, got torch.int64"),
        "fewer ids": (rows, ids[:1], ValueError, r"got \(1,\) and \(2, 8\)"),
        "narrow": (rows[:, 1:], ids, ValueError, r"got \(2,\) and \(2, 7\)"),
        "another name": ({"a": rows}, {"a": ids}, TypeError, r"rows of \['embed.*got \['a'\]"),
        "too many": (
            torch.zeros(V + 1, D),
            torch.full((V + 1,), -1),
            ValueError,
            f"k from 1 to {V}",
        ),
    }


@pytest.mark.parametrize("name", bad_inputs())
def test_bad_rows_and_ids_are_refused(name: str):
    rows, ids, error, message = bad_inputs()[name]
    program = Exportable(make("tied").requires_grad_(False))
    with pytest.raises(error, match=message):
        program.check(rows, ids)
    with pytest.raises(error, match=message):
        program(rows, ids, tokens(7))


def test_params_that_the_program_does_not_take():
    model = make("untied").requires_grad_(False)
    program = Exportable(model)
    with pytest.raises(ValueError, match=r"params have 2 of the 23 rows .* rows=1\."):
        program.inputs(random_rows(model, [7, 3]), rows=1)
    with pytest.raises(ValueError, match=r"rows of 'lm_head.weight' .* program has .*embed_tokens"):
        program.inputs(random_rows(model, [7], targets=["lm_head"]), rows=1)
    new = init_deltas(model, [V, V + 1], grow=True)
    program_of_both = Exportable(model, targets=["embed_tokens", "lm_head"])
    with pytest.raises(ValueError, match="2 new tokens for .*model.resize_token_embeddings"):
        program_of_both.inputs(new, rows=2)
    with pytest.raises(TypeError, match="TokenDeltas"):
        program.inputs({"embed_tokens.weight": torch.zeros(1, D)}, rows=1)


def test_models_that_are_no_program():
    with pytest.raises(TypeError, match="torch.nn.Module, got function"):
        Exportable(make)
    with pytest.raises(ValueError, match="max_norm"):
        Exportable(make("max_norm"))


def test_a_module_under_several_names_is_exported_strictly():
    """Otherwise torch.export shows other modules of such a model at each look."""
    model = make("encoder_decoder").requires_grad_(False)
    program, params, x = Exportable(model), random_rows(model), tokens(7, 3)
    inputs = program.inputs(params, rows=K)
    with pytest.raises(RuntimeError, match=r"under several names. Export it with strict=True"):
        torch.export.export(program, (*inputs, x), strict=False)
    found = torch.export.export(program, (*inputs, x), strict=True).module()(*inputs, x)
    torch.testing.assert_close(found, edited(model, params)(x))


def test_a_model_that_has_changed_since_is_refused():
    model = Language().requires_grad_(False)
    program, params = Exportable(model), random_rows(model, [7])
    model.embed_tokens.weight = nn.Parameter(torch.zeros(V, D), requires_grad=False)
    with pytest.raises(ValueError, match="tied or replaced since"):
        program(*program.inputs(params, rows=1), tokens(7))
    assert isinstance(params, TokenDeltas)


def test_a_copy_has_matrices_of_its_own():
    model = llama(tie=False)
    targets = ["model.embed_tokens", "lm_head"]
    program = Exportable(model, targets=targets, kwargs=PLAIN).eval()
    copied = copy.deepcopy(program)
    assert copied.model is not model
    assert copied.kwargs == PLAIN
    assert not copied.training
    params = random_rows(copied.model, [7, 3], targets=targets)
    inputs, x = copied.inputs(params, rows=K), tokens(7, 3)
    expected = edited(copied.model, params)(x, **PLAIN)[0]
    torch.testing.assert_close(copied(*inputs, x)[0], expected)
    torch.testing.assert_close(exported(copied, inputs, x).module()(*inputs, x)[0], expected)


def test_ties_that_changed_since_are_refused_before_and_in_an_export():
    model = llama()
    program, params = Exportable(model, kwargs=PLAIN), random_rows(model, [7])
    inputs = program.inputs(params, rows=K)
    model.lm_head.weight = nn.Parameter(torch.randn(V, D), requires_grad=False)
    with pytest.raises(ValueError, match=r"tied or replaced since .*Exportable\(model\) anew"):
        program.inputs(params, rows=K)
    with pytest.raises(ValueError, match="stale patch"):
        exported(program, inputs, tokens(7))
    model = llama(tie=False)
    program = Exportable(model, kwargs=PLAIN)
    params = random_rows(model, [7], targets="embed_tokens")
    model.lm_head.weight = model.model.embed_tokens.weight
    with pytest.raises(ValueError, match="tied or replaced since"):
        program.inputs(params, rows=K)
