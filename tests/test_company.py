"""Law 8: no call changes what others see: threads, processes, interrupts, compiled calls."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import nn
from torch.autograd import forward_ad

from tests.helpers.crowd import crowd
from tests.helpers.models import D, Language, V, make, tokens
from tests.helpers.oracle import edited, snapshot
from tests.helpers.rows import adapters, random_rows
from ttfunc import TokenDeltas, functional_call, init_deltas, patch

NAME, NAMES = "embed_tokens.weight", ("embed_tokens", "lm_head")
X = tokens(7, 3)


@pytest.mark.parametrize("case", ["tied", "untied", "encoder_decoder"])
def test_threads_with_different_adapters_never_mix(case: str):
    model = make(case).requires_grad_(False)
    before = snapshot(model)
    each = adapters(model, *[[7, 3]] * 4)
    expected = [functional_call(model, patch(params), (X,)) for params in each]

    def work(number: int) -> int:
        wrong = 0
        for _ in range(1000):
            found = functional_call(model, patch(each[number]), (X,))
            wrong += not torch.equal(found, expected[number])
        return wrong

    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(work, range(4))) == [0, 0, 0, 0]
    assert snapshot(model) == before


def test_threads_of_which_some_compile_never_mix():
    done = crowd(4000)
    assert done["eager"] == 4000
    assert done["compilations"] >= 2
    assert done["compiled"] >= 200


def test_calls_of_a_wrapper_of_the_model_do_not_mix_with_its_own():
    model = make("tied").requires_grad_(False)
    wrapper = nn.Sequential(model)
    a, b = (patch(params) for params in adapters(model, [7, 3], [7, 3]))
    b = {f"0.{name}": weight for name, weight in b.items()}
    expected = functional_call(model, a, (X,)), functional_call(wrapper, b, (X,))

    def work(number: int) -> bool:
        called, weights = [(model, a), (wrapper, b)][number]
        return all(
            torch.equal(functional_call(called, weights, (X,)), expected[number])
            for _ in range(300)
        )

    with ThreadPoolExecutor(2) as pool:
        assert list(pool.map(work, range(2))) == [True, True]


def test_calls_on_different_names_of_one_model_never_mix():
    model = make("untied").requires_grad_(False)
    before = snapshot(model)
    calls = [
        patch(init_deltas(model, [7], init="mean")),
        patch(init_deltas(model, [7], targets="lm_head", init="mean")),
        {"body.bias": torch.ones(D)},
        {},
    ]
    expected = [functional_call(model, weights, (X,)) for weights in calls]

    def work(number: int) -> int:
        return sum(
            not torch.equal(functional_call(model, calls[number], (X,)), expected[number])
            for _ in range(500)
        )

    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(work, range(4))) == [0, 0, 0, 0]
    assert snapshot(model) == before


def test_two_names_of_one_tie_never_change_the_model():
    model = make("tied").requires_grad_(False)
    before = snapshot(model)
    calls = [{"embed_tokens.weight": torch.zeros(V, D)}, {"lm_head.weight": torch.ones(V, D)}]

    def work(number: int) -> None:
        for _ in range(500):
            functional_call(model, calls[number], (X,))

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(work, range(2)))
    assert snapshot(model) == before


def test_parameters_made_during_the_call_of_another_thread_are_those_of_the_model():
    model = make("tied").requires_grad_(False)
    made = []
    thread = threading.Thread(target=lambda: made.append(init_deltas(model, [7])))

    def hook(*_: object) -> None:
        thread.start()
        thread.join(0.1)

    handle = model.body.register_forward_hook(hook)
    functional_call(model, {"embed_tokens.weight": nn.Parameter(torch.zeros(V, D))}, (X,))
    handle.remove()
    thread.join(10)
    assert torch.equal(made[0].originals["embed_tokens.weight"], model.embed_tokens.weight[[7]])


def test_models_that_call_one_another_do_not_wait_for_one_another():
    a, b = (make("tied").requires_grad_(False) for _ in range(2))
    depth = threading.local()

    def calling(other: nn.Module):
        def hook(*_: object) -> None:
            if not getattr(depth, "inside", False):
                depth.inside = True
                functional_call(other, {}, (X,))
                depth.inside = False

        return hook

    hooks = [x.body.register_forward_hook(calling(y)) for x, y in ((a, b), (b, a))]
    weights = {model: patch(random_rows(model)) for model in (a, b)}

    def work(model: nn.Module) -> bool:
        for _ in range(100):
            functional_call(model, weights[model], (X,))
        return True

    with ThreadPoolExecutor(2) as pool:
        assert list(pool.map(work, (a, b), timeout=60)) == [True, True]
    for handle in hooks:
        handle.remove()


def test_eager_calls_beside_a_compilation_are_those_alone():
    """torch.compiler.is_compiling() is one flag of the process."""
    model = make("function").requires_grad_(False)
    params = init_deltas(model, [7, 3], init="mean", requires_grad=True)
    tied = make("tied").requires_grad_(False)
    other = init_deltas(tied, [7, 3], init="mean")
    compiling, done = threading.Event(), threading.Event()

    def backend(graph, _):
        compiling.set()
        done.wait(30)
        return graph.forward

    def results():
        out = functional_call(model, patch(params), (X,))
        (grad,) = torch.autograd.grad(out.sin().sum(), params.deltas[NAME])
        with forward_ad.dual_level():
            rows = forward_ad.make_dual(other.deltas[NAME], torch.ones(2, D))
            dual = functional_call(tied, patch(TokenDeltas({NAME: rows}, other.specs)), (X,))
            tangent = forward_ad.unpack_dual(dual).tangent
        return out, grad, tangent

    expected = results()
    thread = threading.Thread(
        target=lambda: torch.compile(torch.sin, backend=backend)(torch.ones(2))
    )
    thread.start()
    try:
        assert compiling.wait(30)
        assert torch.compiler.is_compiling()
        found = results()
        with ThreadPoolExecutor(2) as pool:
            a, b = adapters(model, [7, 3], [7, 3])
            outs = list(pool.map(lambda p: functional_call(model, patch(p), (X,)), [a, b] * 20))
    finally:
        done.set()
        thread.join()
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other)
    for out, params in zip(outs, [a, b] * 20, strict=True):
        torch.testing.assert_close(out, edited(model, params)(X))


@pytest.mark.parametrize("breaks", [False, True])
def test_compiled_calls_beside_and_inside_eager_ones(breaks: bool):
    class Model(Language):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            if breaks:
                torch._dynamo.graph_break()
            return super().forward(x)

    torch._dynamo.reset()
    model = Model().requires_grad_(False)
    before = snapshot(model)
    a, b = adapters(model, [7, 3], [7, 3])
    compiled = torch.compile(
        lambda p, x: functional_call(model, patch(p), (x,)), backend="aot_eager"
    )
    expected = {id(p): edited(model, p)(X) for p in (a, b)}
    torch.testing.assert_close(compiled(a, X), expected[id(a)])

    def hook(*_: object) -> None:
        if depth:
            depth.pop()
            inner.append(compiled(a, X))

    inner, depth = [], []
    handle = model.body.register_forward_hook(hook)
    torch._dynamo.reset()
    depth.append(1)
    outer = functional_call(model, patch(b), (X,))
    handle.remove()
    torch.testing.assert_close(inner[0], expected[id(a)])
    torch.testing.assert_close(outer, expected[id(b)])

    torch._dynamo.reset()
    compiled(a, X)

    def work(number: int) -> int:
        call = compiled if number % 2 else lambda p, x: functional_call(model, patch(p), (x,))
        params = (a, b)[number // 2]
        return sum(
            not torch.allclose(call(params, X), expected[id(params)], atol=1e-5) for _ in range(100)
        )

    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(work, range(4))) == [0, 0, 0, 0]
    assert snapshot(model) == before


@pytest.mark.parametrize("script", ["300", "fork"])
def test_interrupts_and_forks(script: str):
    """In a process of its own, with as many threads as it likes.

    Signals go to the main thread, and a fork has only one.
    """
    command = [sys.executable, "-m", "tests.helpers.interrupted_calls", *script.split()]
    plain = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
    done = subprocess.run(  # noqa: S603
        command, env=plain, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
