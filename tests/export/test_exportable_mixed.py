"""One exported program for a batch in which each example has its own adapter."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.export import Dim

from tests.helpers.llama import llama
from tests.helpers.models import D, V, make, tokens
from tests.helpers.oracle import edited
from tests.helpers.rows import adapters
from ttfunc import Exportable, functional_call, patch_mixed

pytestmark = [
    # torch's own, in run_decompositions, and of transformers' models under dynamo
    pytest.mark.filterwarnings("ignore:.isinstance.treespec, LeafSpec"),
    pytest.mark.filterwarnings("ignore:While compiling, we found certain side effects"),
]

K, N = 4, 3  # rows and adapters of the program
PLAIN = {"use_cache": False, "return_dict": False}
BATCH, LENGTH = Dim("batch"), Dim("length")


@pytest.mark.parametrize("strict", [False, True], ids=["not strict", "strict"])
@pytest.mark.parametrize("tie", [True, False])
def test_one_program_serves_a_mixed_batch(tie: bool, strict: bool):
    model = llama(tie=tie)
    program = Exportable(model, kwargs=PLAIN, assignment=True)
    each = adapters(model, [7, 3], [3, 20, 5], targets="embed_tokens")
    inputs = (
        *program.inputs(each, assignment=[1, -1, 0], rows=K, adapters=N),
        tokens(7, 3, batch=3),
    )
    shapes = (None, None, ({0: BATCH}, {0: BATCH, 1: LENGTH}))
    found = torch.export.export(program, inputs, dynamic_shapes=shapes, strict=strict).module()

    @settings(max_examples=10, deadline=None)
    @given(
        st.lists(
            st.lists(st.integers(0, V - 1), min_size=1, max_size=K, unique=True),
            min_size=1,
            max_size=N,
        ),
        st.data(),
    )
    def agrees(ids: list[list[int]], data: st.DataObject) -> None:
        numbers = st.integers(-1, len(ids) - 1)
        assignment = data.draw(st.lists(numbers, min_size=1, max_size=5))
        params = adapters(model, *ids, targets="embed_tokens")
        x = torch.randint(0, V, (len(assignment), data.draw(st.integers(1, 6))))
        inputs = program.inputs(params, assignment=assignment, rows=K, adapters=N)
        models = [*(edited(model, one) for one in params), model]
        expected = [models[a](x[i : i + 1], **PLAIN)[0] for i, a in enumerate(assignment)]
        torch.testing.assert_close(found(*inputs, x)[0], torch.cat(expected), rtol=1e-5, atol=1e-5)

    agrees()


def test_bad_assignments_are_refused():
    model = make("tied").requires_grad_(False)
    program = Exportable(model, assignment=True)
    rows, ids, assignment = program.inputs(
        adapters(model, [7], [3]), assignment=[0, 1], rows=2, adapters=3
    )
    program.check(rows, ids, assignment)
    with pytest.raises(IndexError, match="names adapter 3, but there are 3"):
        program.check(rows, ids, torch.tensor([0, 3]))
    with pytest.raises(TypeError, match=r"int64 tensor, got torch.int32"):
        program.check(rows, ids, assignment.int())
    with pytest.raises(ValueError, match=r"assignment must be \(B,\), got \(1, 2\)"):
        program.check(rows, ids, assignment.unsqueeze(0))
    with pytest.raises(ValueError, match=r"give 1 to 1 adapters .* got 2"):
        program.inputs(adapters(model, [7], [3]), assignment=[0, 1], rows=2, adapters=1)
    with pytest.raises(IndexError, match="names adapter 2, but there are 2"):
        program.inputs(adapters(model, [7], [3]), assignment=[0, 2], rows=2, adapters=3)


def test_the_number_of_adapters_may_be_dynamic():
    model = make("tied").requires_grad_(False)
    program = Exportable(model, assignment=True)
    each = adapters(model, [7, 3], [3, 20], [5])
    inputs = (
        *program.inputs(each, assignment=[1, -1, 2], rows=K, adapters=N),
        tokens(7, 3, batch=3),
    )
    count = {0: Dim("adapters", min=2)}
    shapes = (count, count, ({0: BATCH}, {0: BATCH, 1: LENGTH}))
    found = torch.export.export(program, inputs, dynamic_shapes=shapes).module()
    more = (*program.inputs(each, assignment=[0, 2], rows=K, adapters=N + 2), tokens(7, 3, batch=2))
    torch.testing.assert_close(found(*more), program(*more))


def test_a_program_is_for_one_adapter_or_for_one_of_each_example():
    model = make("untied").requires_grad_(False)
    mixed = Exportable(model, targets=["embed_tokens", "lm_head"], assignment=True)
    plain = Exportable(model)
    params = adapters(model, [7], [3, 20], targets=["embed_tokens", "lm_head"])
    rows, ids, assignment = mixed.inputs(params, assignment=[1, -1], rows=2)
    assert {name: tuple(one.shape) for name, one in rows.items()} == {
        "embed_tokens.weight": (2, 2, D),
        "lm_head.weight": (2, 2, D),
    }
    x = tokens(7, 3, 20, batch=2)
    expected = functional_call(model, patch_mixed(params, [1, -1]), x)
    for program in (mixed, copy.deepcopy(mixed)):
        torch.testing.assert_close(program(rows, ids, assignment, x), expected)
    (alone,) = mixed.inputs(params[1], assignment=[0], rows=2)[2:]  # one adapter, as a list of it
    assert alone.tolist() == [0]

    with pytest.raises(TypeError, match=r"assignment=\[0\]: give True .* inputs\(..., assignment="):
        Exportable(model, assignment=[0])  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"an adapter for each example: inputs\(\[a, b\]"):
        mixed.inputs(params[0], rows=2)
    with pytest.raises(TypeError, match=r"int64 tensor, got NoneType"):
        mixed.check(rows, ids)
    one = adapters(model, [7], targets="embed_tokens")
    for options in ({"assignment": [0]}, {"adapters": 2}):
        with pytest.raises(TypeError, match=r"one adapter in each call.*assignment=True"):
            plain.inputs(one[0], rows=2, **options)
    with pytest.raises(TypeError, match="one adapter in each call"):
        plain.check(torch.zeros(1, D), torch.tensor([7]), assignment)
    with pytest.raises(ValueError, match=r"must be \(k,\) and \(k, D\)"):
        plain(rows["embed_tokens.weight"], ids["embed_tokens.weight"], x)
    with pytest.raises(TypeError, match="got list where the parameters"):
        plain.inputs(one, rows=2)
