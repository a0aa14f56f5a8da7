"""Calls from several threads, and calls inside calls."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import nn

from tests.models import D, V, make, tokens
from tests.oracle import edited, snapshot
from ttfunc import functional_call, init_deltas, patch
from ttfunc.turns import turn

X = tokens(7, 3)


def adapters(model: nn.Module, count: int):
    return [
        init_deltas(model, [7, 3], init="normal", generator=torch.Generator().manual_seed(i))
        for i in range(count)
    ]


@pytest.mark.parametrize("case", ["tied", "untied", "encoder_decoder"])
def test_threads_with_different_adapters_never_mix(case: str):
    model = make(case).requires_grad_(False)
    before = snapshot(model)
    each = adapters(model, 4)
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


def test_a_wrapper_of_the_model_takes_its_turn_too():
    model = make("tied").requires_grad_(False)
    wrapper = nn.Sequential(model)
    a, b = (patch(params) for params in adapters(model, 2))
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


def test_a_call_waits_for_the_turn_of_another_thread():
    entered, leave = threading.Event(), threading.Event()

    def hold() -> None:
        with turn():
            entered.set()
            leave.wait(10)

    def wait() -> None:
        with turn():
            pass

    thread = threading.Thread(target=hold)
    thread.start()
    entered.wait(10)
    waiting = threading.Thread(target=wait)
    waiting.start()
    waiting.join(0.1)
    assert waiting.is_alive()
    leave.set()
    waiting.join(10)
    assert not waiting.is_alive()
    thread.join()


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


def test_two_names_of_one_tie_never_leave_the_model_swapped():
    model = make("tied").requires_grad_(False)
    before = snapshot(model)
    calls = [{"embed_tokens.weight": torch.zeros(V, D)}, {"lm_head.weight": torch.ones(V, D)}]

    def work(number: int) -> None:
        for _ in range(500):
            functional_call(model, calls[number], (X,))

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(work, range(2)))
    assert snapshot(model) == before


def test_parameters_are_not_made_from_weights_that_another_thread_has_swapped():
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
    weights = {model: patch(adapters(model, 1)[0]) for model in (a, b)}

    def work(model: nn.Module) -> bool:
        for _ in range(100):
            functional_call(model, weights[model], (X,))
        return True

    with ThreadPoolExecutor(2) as pool:
        assert list(pool.map(work, (a, b), timeout=60)) == [True, True]
    for handle in hooks:
        handle.remove()


def test_a_call_inside_a_call_has_weights_of_its_own():
    model = make("tied").requires_grad_(False)
    a, b = adapters(model, 2)
    inner, depth = [], [1, 2]

    def hook(module: nn.Module, args, out: torch.Tensor) -> None:
        if depth:
            depth.pop()
            inner.append(functional_call(model, patch(b), (X,)))

    handle = model.body.register_forward_hook(hook)
    before = snapshot(model)
    outer = functional_call(model, patch(a), (X,))
    handle.remove()
    torch.testing.assert_close(outer, edited(model, a)(X))
    torch.testing.assert_close(inner[0], edited(model, b)(X))
    torch.testing.assert_close(inner[1], edited(model, b)(X))
    assert snapshot(model) == before


def test_a_call_inside_a_call_that_swapped_a_plain_tensor_is_refused():
    model = make("tied").requires_grad_(False)
    params = adapters(model, 1)[0]
    handle = model.body.register_forward_hook(
        lambda *_: functional_call(model, patch(params), (X,))
    )
    before = snapshot(model)
    with pytest.raises(ValueError, match="stale patch"):
        functional_call(model, {"embed_tokens.weight": torch.zeros(V, 8)}, (X,))
    handle.remove()
    assert snapshot(model) == before


@pytest.mark.parametrize("inner", ["head", "nothing"])
def test_a_call_inside_a_call_on_other_matrices_is_refused(inner: str):
    model = make("untied").requires_grad_(False)
    head = patch(init_deltas(model, [7], targets="lm_head")) if inner == "head" else {}
    handle = model.body.register_forward_hook(lambda *_: functional_call(model, head, (X,)))
    before = snapshot(model)
    with pytest.raises(RuntimeError, match="a call inside a call: the outer one has swapped"):
        functional_call(model, patch(init_deltas(model, [7])), (X,))
    handle.remove()
    assert snapshot(model) == before
    functional_call(model, {}, (X,))


def test_parameters_made_inside_a_call_are_refused():
    model = make("tied").requires_grad_(False)
    handle = model.body.register_forward_hook(lambda *_: init_deltas(model, [3]))
    with pytest.raises(TypeError, match="is swapped by a functional call now"):
        functional_call(model, patch(init_deltas(model, [7])), (X,))
    handle.remove()
