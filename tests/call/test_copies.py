"""The copies that a call runs on: what is copied, what is shared, what is carried over."""

from __future__ import annotations

import copy
import functools
import gc
import types
import weakref
from collections import defaultdict, deque
from typing import NamedTuple

import pytest
import torch
from torch import Tensor, nn

from tests.helpers.llama import llama
from tests.helpers.models import D, Language, V, make, tokens
from tests.helpers.oracle import edited, snapshot
from tests.helpers.rows import random_rows
from ttfunc import functional_call, init_deltas, patch
from ttfunc.weight.deferred import PatchedWeight

NAME = "embed_tokens.weight"
X = tokens(7, 3)


class ByList(Language):
    """Its head lies in a list, which registers nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.heads = [self.lm_head]
        del self.lm_head

    def head(self, h: Tensor) -> Tensor:
        return self.heads[0](h)


class ByHiding(ByList):
    def __init__(self) -> None:
        super().__init__()
        self.__dict__["hidden"] = self.heads.pop()

    def head(self, h: Tensor) -> Tensor:
        return self.hidden(h)


class ByTensor(Language):
    """Keeps the matrix itself in a dict."""

    def __init__(self) -> None:
        super().__init__()
        self.kept = {"weight": self.embed_tokens.weight}

    def head(self, h: Tensor) -> Tensor:
        return h @ self.kept["weight"].T


class ByClosure(Language):
    def __init__(self) -> None:
        super().__init__()
        lm_head = self.lm_head
        self.project = lambda h: lm_head(h)

    def head(self, h: Tensor) -> Tensor:
        return self.project(h)


class Block(nn.Module):
    """A part of a model that knows the whole."""

    def __init__(self, whole: nn.Module, weak: bool) -> None:
        super().__init__()
        self.__dict__["whole"] = weakref.ref(whole) if weak else [whole]

    def forward(self, h: Tensor) -> Tensor:
        whole = self.whole() if callable(self.whole) else self.whole[0]
        return whole.lm_head(h)


class ByParent(Language):
    def __init__(self, weak: bool) -> None:
        super().__init__()
        self.block = Block(self, weak)

    def head(self, h: Tensor) -> Tensor:
        return self.block(h)


def hooked(model: nn.Module) -> None:
    """The model's own method on a part of it, which reads the matrix."""
    model.body.register_forward_hook(types.MethodType(reading_hook, model))


def reading_hook(self: nn.Module, module: nn.Module, args, out: Tensor) -> Tensor:
    return out + self.embed_tokens.weight[7].sum()


def bound(model: nn.Module) -> None:
    model.forward = types.MethodType(type(model).forward, model)


def wrapped(model: nn.Module) -> None:
    plain = model.forward

    @functools.wraps(plain)
    def forward(*args, **kwargs):
        return plain(*args, **kwargs) * 2

    model.forward = forward


def partially(model: nn.Module) -> None:
    """As accelerate's hooks do it."""
    model.old_forward = model.forward
    model.forward = functools.partial(lambda module, x: module.old_forward(x) * 2, model)


def of_the_head(model: nn.Module) -> None:
    plain = model.lm_head.forward
    model.lm_head.forward = lambda h: plain(h) * 3


MODELS = {"list": ByList, "hidden": ByHiding, "tensor": ByTensor, "closure": ByClosure}
MODELS |= {"parent": lambda: ByParent(False), "weak": lambda: ByParent(True)}
TOOLS = [hooked, bound, wrapped, partially, of_the_head]


def reference(model: nn.Module, params, x: Tensor) -> Tensor:
    """The model itself with the rows in it, and then as it was."""
    weight = model.get_parameter(NAME)
    with torch.no_grad():
        before = weight.clone()
        weight[params.token_indices[NAME]] = params.deltas[NAME]
        out = model(x)
        weight.copy_(before)
    return out


@pytest.mark.parametrize("case", MODELS)
def test_holders_outside_of_the_submodules_are_found(case: str):
    torch.manual_seed(0)
    model = MODELS[case]().requires_grad_(False)
    params, before = random_rows(model), snapshot(model)
    expected = reference(model, params, X)
    assert not torch.allclose(expected, model(X))
    torch.testing.assert_close(functional_call(model, patch(params), (X,)), expected)
    assert snapshot(model) == before


@pytest.mark.parametrize("later", [False, True])
@pytest.mark.parametrize("tool", TOOLS)
def test_what_a_tool_sets_on_a_module_runs_on_the_copy(tool, later: bool):
    model = make("tied").requires_grad_(False)
    if not later:
        tool(model)
    params = random_rows(model)
    if later:  # after the path was found; a hook's own path is found with the parameters
        if tool is hooked:
            params = None
        tool(model)
        params = params or random_rows(model)
    expected, own = reference(model, params, X), dict(vars(model))
    for _ in range(2):
        torch.testing.assert_close(functional_call(model, patch(params), (X,)), expected)
    assert vars(model) == own


class Helper:
    def __init__(self, model: nn.Module) -> None:
        self.model = model

    def project(self, h: Tensor) -> Tensor:
        return self.model.lm_head(h)


class ByHelper(Language):
    def __init__(self) -> None:
        super().__init__()
        self.helper = Helper(self)
        self.with_helper = True

    def head(self, h: Tensor) -> Tensor:
        return self.helper.project(h) if self.with_helper else super().head(h)


def test_a_matrix_read_through_another_object_is_refused_and_not_the_models_own():
    model = ByHelper().requires_grad_(False)
    params, before = random_rows(model), snapshot(model)
    with pytest.raises(
        RuntimeError, match=r"own 'lm_head.weight' was given to linear.*ByHelper.helper"
    ):
        functional_call(model, patch(params), (X,))
    assert snapshot(model) == before
    expected = reference(model, params, X)
    swapped = torch.func.functional_call(model, patch(params), (X,))  # the way out
    torch.testing.assert_close(swapped, expected)
    model.with_helper = False  # an object that holds the model and is not used is no fault
    torch.testing.assert_close(functional_call(model, patch(params), (X,)), expected)


GLOBAL = make("tied").requires_grad_(False)


def test_a_matrix_read_through_a_global_is_refused():
    params = random_rows(GLOBAL)
    GLOBAL.forward = lambda x: GLOBAL.head(GLOBAL.mix(GLOBAL.embed(x)))
    try:
        with pytest.raises(RuntimeError, match="was given to embedding during"):
            functional_call(GLOBAL, patch(params), (X,))
    finally:
        del GLOBAL.forward


class Noting(Language):
    def __init__(self) -> None:
        super().__init__()
        self.calls, self.last = 0, None
        self.register_buffer("running", torch.zeros(D))
        self.stale = "there"

    def forward(self, x: Tensor, error: bool = False) -> Tensor:
        self.calls += 1
        self.used = [self.embed_tokens, self]
        self.last = self.embed_tokens.weight
        h = self.embed(x)
        self.running = 0.9 * self.running + h.mean((0, 1)).detach()
        self.embed_tokens.note = "embedded"
        self.extra = nn.Linear(D, D).requires_grad_(False)
        if hasattr(self, "stale"):
            del self.stale
        if error:
            raise ZeroDivisionError("at the end of the call")
        return self.head(h)


def test_what_a_model_notes_on_itself_is_there_afterwards():
    model, same = Noting().requires_grad_(False), Noting()
    same.load_state_dict(model.state_dict())
    params = random_rows(model)
    with torch.no_grad():
        same.embed_tokens.weight[params.token_indices[NAME]] = params.deltas[NAME]
    weight = model.embed_tokens.weight
    for _ in range(2):
        functional_call(model, patch(params), (X,))
        same(X)
        assert model.calls == same.calls
        torch.testing.assert_close(model.running, same.running)
    assert model.used == [model.embed_tokens, model]
    assert model.last is weight is model.embed_tokens.weight is model.lm_head.weight
    assert model.embed_tokens.note == "embedded"
    assert isinstance(model.extra, nn.Linear)
    assert "extra" in dict(model.named_children())
    assert not hasattr(model, "stale")


def test_a_call_that_raises_notes_what_any_call_notes():
    model = Noting().requires_grad_(False)
    weight = model.embed_tokens.weight
    with pytest.raises(ZeroDivisionError, match="at the end of the call"):
        functional_call(model, patch(random_rows(model, [7, 3])), (X, True))
    assert model.calls == 1
    assert model.last is weight is model.embed_tokens.weight
    assert model.used == [model.embed_tokens, model]


def test_the_hidden_states_of_transformers_after_a_call_that_raised():
    """Its hooks go to modules that are shared, and the flag that they are there to the model."""
    model = llama()
    params = init_deltas(model, [7])
    x = torch.tensor([[1, 7, 3]])
    options = {"input_ids": x, "output_hidden_states": True}
    with pytest.raises(ValueError, match="batch_size"):
        functional_call(model, patch(params), kwargs={**options, "labels": x[:, :2]})
    expected = len(copy.deepcopy(llama())(**options).hidden_states)
    assert len(model(**options).hidden_states) == expected
    assert len(functional_call(model, patch(params), kwargs=options).hidden_states) == expected


def test_what_is_set_in_the_place_of_a_patched_weight_is_not_kept():
    class Setting(Language):
        def forward(self, x: Tensor) -> Tensor:
            out = super().forward(x)
            self.embed_tokens.weight = nn.Parameter(torch.zeros(V, D))
            return out

    model = Setting().requires_grad_(False)
    before = snapshot(model)
    functional_call(model, patch(random_rows(model)), (X,))
    assert snapshot(model) == before


def test_rope_deltas_of_a_call_are_read_by_the_next():
    class Rope(Language):
        rope_deltas = None

        def forward(self, x: Tensor) -> Tensor:
            if self.rope_deltas is None:
                self.rope_deltas = x.float().mean()
            return super().forward(x) + self.rope_deltas

    model = Rope().requires_grad_(False)
    params = random_rows(model)
    first = functional_call(model, patch(params), (X,))
    second = functional_call(model, patch(params), (X + 1 - 1,))
    assert model.rope_deltas == X.float().mean()
    assert torch.equal(first, second)


def test_the_parameters_do_not_keep_a_model_alive():
    model = make("tied").requires_grad_(False)
    params = random_rows(model)
    functional_call(model, patch(params), (X,))
    kept = weakref.ref(model.body)
    del model
    gc.collect()
    assert kept() is None
    assert params.deltas[NAME].shape == (2, D)


def test_the_copies_are_gone_after_the_call():
    model, seen = make("tied").requires_grad_(False), []
    model.register_forward_hook(lambda module, args, out: seen.append(weakref.ref(module)))
    functional_call(model, patch(random_rows(model)), (X,))
    gc.collect()
    assert seen[0]() is None


def test_a_part_of_the_way_that_was_replaced_is_found_anew():
    model = nn.Sequential(nn.Sequential(make("tied"))).requires_grad_(False)
    params = init_deltas(model, [7, 3], init="mean")
    expected = functional_call(model, patch(params), (X,))
    model[0] = nn.Sequential(model[0][0])  # the same names, another module
    assert torch.equal(functional_call(model, patch(params), (X,)), expected)


class Finalised(Language):
    ended = 0

    def __del__(self) -> None:
        type(self).ended += 1


def test_a_module_that_cannot_be_copied_is_refused():
    finalised = Finalised().requires_grad_(False)
    for model in (finalised, nn.DataParallel(make("tied").requires_grad_(False))):
        weights = patch(init_deltas(model, [7]))
        with pytest.raises(TypeError, match="cannot be copied.*torch.func.functional_call"):
            functional_call(model, weights, (X,))
    gc.collect()
    assert Finalised.ended == 0


def test_the_oracle_agrees():
    model = make("tied").requires_grad_(False)
    params = random_rows(model)
    torch.testing.assert_close(reference(model, params, X), edited(model, params)(X))


def caching(how: str):
    class Caching(Language):
        def __init__(self) -> None:
            super().__init__()
            self.kept: dict = {}
            self.pair = None
            self.helper = None

        @functools.cached_property
        def weight(self) -> Tensor:
            return self.lm_head.weight

        def head(self, h: Tensor) -> Tensor:
            if how == "property":
                return h @ self.weight.T
            if how == "transposed":
                self.turned = self.lm_head.weight.T
                return h @ self.turned
            if how == "tuple":
                self.pair = self.pair or (self.lm_head,)
                return self.pair[0](h)
            if how == "dict":
                return self.kept.setdefault("head", self.lm_head)(h)
            self.helper = self.helper or Helper(self)
            return self.helper.project(h)

    return Caching().requires_grad_(False)


@pytest.mark.parametrize("how", ["property", "transposed", "tuple", "dict", "helper"])
def test_what_a_first_call_has_cached_is_the_models_own(how: str):
    model = caching(how)
    plain = copy.deepcopy(model)(X)
    for seed in range(2):
        params = init_deltas(model, [7, 3], init=torch.full((2, D), float(seed)))
        expected = reference(copy.deepcopy(model), params, X)
        if how == "helper" and seed:  # by now it is known to hold the model
            with pytest.raises(RuntimeError, match="the model's own 'lm_head.weight'"):
                functional_call(model, patch(params), (X,))
        else:
            torch.testing.assert_close(functional_call(model, patch(params), (X,)), expected)
        torch.testing.assert_close(model(X), plain)
        for name in ("embed_tokens", "lm_head"):
            assert type(getattr(model, name).weight) is nn.Parameter
    assert not any(isinstance(one, PatchedWeight) for one in vars(model).values())


def test_what_is_put_into_a_container_that_holds_a_module_too():
    class Counting(Language):
        def __init__(self) -> None:
            super().__init__()
            self.stats = {"head": self.lm_head, "calls": 0}
            self.log = deque([self.embed_tokens], maxlen=2)

        def head(self, h: Tensor) -> Tensor:
            self.stats["calls"] += 1
            self.log.append(self.lm_head)
            return self.stats["head"](h)

    model = Counting().requires_grad_(False)
    params, stats = random_rows(model, [7, 3]), model.stats
    for calls in (1, 2):
        functional_call(model, patch(params), (X,))
        assert model.stats is stats == {"head": model.lm_head, "calls": calls}
    assert list(model.log) == [model.lm_head] * 2
    assert model.log.maxlen == 2


def test_slots_and_a_class_that_changes_are_kept():
    class Other(Language):
        pass

    class Slotted(Language):
        __slots__ = ("scale",)

        def forward(self, x: Tensor) -> Tensor:
            out = super().forward(x) * getattr(self, "scale", 1.0)
            self.__class__ = Changed
            return out

    class Changed(Slotted):
        __slots__ = ()

    model = Slotted().requires_grad_(False)
    model.scale = 3.0
    params = random_rows(model, [7, 3])
    weight = model.embed_tokens.weight
    found = functional_call(model, patch(params), (X,))
    assert type(model) is Changed
    model.__class__ = Slotted
    torch.testing.assert_close(found, reference(model, params, X))
    assert model.embed_tokens.weight is weight


class Deep(NamedTuple):
    head: nn.Module


# What a model keeps, and how it gets at the weight in it.
HOLDERS = {
    "named tuple": (lambda m: Deep(m.lm_head), lambda kept: kept.head.weight),
    "default dict": (lambda m: defaultdict(list, a=[m.lm_head]), lambda kept: kept["a"][0].weight),
    "object": (lambda m: Helper(Helper(m.lm_head)), lambda kept: kept.model.model.weight),
    "built-in method": (lambda m: m.lm_head.weight.matmul, lambda kept: kept.__self__),
}
READS = {
    "transposed": lambda w, h: h @ w.T,
    "in a list": lambda w, h: nn.functional.linear(h, torch.cat([w])),
    "data": lambda w, h: nn.functional.linear(h, w.data),
}


class Keeping(Language):
    def head(self, h: Tensor) -> Tensor:
        return self.read(self.found(self.kept), h)


@pytest.mark.parametrize("holder", HOLDERS)
@pytest.mark.parametrize("read", READS)
def test_no_other_holder_is_read_in_silence(holder: str, read: str):
    model = Keeping().requires_grad_(False)
    model.kept, model.found, model.read = HOLDERS[holder][0](model), HOLDERS[holder][1], READS[read]
    params = random_rows(model)
    with pytest.raises(RuntimeError, match=r"the model's own 'lm_head.weight' was given to"):
        functional_call(model, patch(params), (X,))
    torch._dynamo.reset()
    compiled = torch.compile(lambda p: functional_call(model, patch(p), (X,)), backend="eager")
    with pytest.raises(RuntimeError, match="the model's own .* during a functional call"):
        compiled(params)


def test_parameters_and_hooks_beside_an_object_are_no_fault():
    model = ByHelper().requires_grad_(False)
    model.with_helper = False
    model.params = random_rows(make("tied"), [7, 3])
    params, inner = random_rows(model, [7, 3]), []

    def hook(*_: object) -> None:
        if not inner:
            inner.append(None)
            inner[0] = functional_call(model, patch(params), (X,))

    handle = model.body.register_forward_hook(hook)
    outer = functional_call(model, patch(params), (X,))
    handle.remove()
    assert torch.equal(outer, inner[0])
