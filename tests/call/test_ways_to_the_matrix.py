"""Ways to a matrix outside of the modules: each is right or refused, and leaves nothing behind."""

from __future__ import annotations

import collections
import contextlib
import contextvars
import functools
import sys
import threading
import types
import weakref
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ttfunc import TokenModule, functional_call, init_deltas, patch
from ttfunc.torch_private import current_mode

X = torch.tensor([2, 5])
KNOWN: dict[str, Any] = {}
VARIABLE: contextvars.ContextVar[Any] = contextvars.ContextVar("head")
LOCAL = threading.local()
Named = collections.namedtuple("Named", "f")


class Model(nn.Module):
    """A tied model whose head is found in `way`, a function of the model; at first it is plain."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(9, 4)
        self.way: Callable[[Any], Any] | None = None
        self.things: list[Any] = [None]
        self.table: dict[str, Any] = {"head": None}
        self.space = SimpleNamespace(head=None)
        self.child = nn.Identity()
        self.child.cache = {}

    def forward(self, x: Tensor) -> Tensor:
        h = self.embed(x)
        weight = self.embed.weight if Model.how is None else Model.how(self)
        return weight(h) if callable(weight) else F.linear(h, weight)

    how: Callable[[Any], Any] | None = None


class Tied(nn.Module):
    def __init__(self, embed: nn.Module) -> None:
        super().__init__()
        self.embed = embed

    def forward(self, h: Tensor) -> Tensor:
        return F.linear(h, self.embed.weight)


class Hidden(nn.Module):
    """Holds a module that is not one of its submodules."""

    def __init__(self, embed: nn.Module) -> None:
        super().__init__()
        self.held = [embed]

    def forward(self, h: Tensor) -> Tensor:
        return F.linear(h, self.held[0].weight)


class Computed:
    """Its attribute is nowhere until it is read."""

    def __init__(self, embed: nn.Module) -> None:
        self._embed = weakref.ref(embed)

    def __getattr__(self, name: str) -> Any:
        return self._embed().weight


def head_of(embed: nn.Module) -> Callable[[Tensor], Tensor]:
    return lambda h: F.linear(h, embed.weight)


def with_attribute(embed: nn.Module) -> Any:
    def head(h: Tensor) -> Tensor:
        return head.inner(h)

    head.inner = head_of(embed)
    return head


def generator(embed: nn.Module) -> Iterator[Tensor]:
    while True:
        yield embed.weight


def attribute(made: Callable[[nn.Module], Any]) -> Callable[[Model], None]:
    return lambda m: vars(m).update(a=made(m.embed))


# How each is put into a model, and how its forward finds the head there.
WAYS: dict[str, tuple[Callable[[Model], Any], Callable[[Any], Any]]] = {
    "an item of a list": (lambda m: m.things.__setitem__(0, m.embed), lambda m: m.things[0].weight),
    "an item of a dict": (lambda m: m.table.update(head=m.embed.weight), lambda m: m.table["head"]),
    "a nested list": (attribute(lambda e: {"a": [(e,)]}), lambda m: m.a["a"][0][0].weight),
    "a module in a list": (lambda m: m.things.append(Tied(m.embed)), lambda m: m.things[-1]),
    "a submodule": (lambda m: setattr(m, "head", Tied(m.embed)), lambda m: m.head),
    "a hidden module": (lambda m: setattr(m, "head", Hidden(m.embed)), lambda m: m.head),
    "a method": (attribute(lambda e: types.MethodType(Tied.forward, Tied(e))), lambda m: m.a),
    "a partial": (attribute(lambda e: functools.partial(Tied.forward, Tied(e))), lambda m: m.a),
    "a closure": (attribute(head_of), lambda m: m.a),
    "a default": (attribute(lambda e: lambda h, w=e.weight: F.linear(h, w)), lambda m: m.a),
    "a weak reference": (attribute(weakref.ref), lambda m: m.a().weight),
    "a namespace": (lambda m: setattr(m.space, "head", m.embed.weight), lambda m: m.space.head),
    "a function in a namespace": (
        attribute(lambda e: SimpleNamespace(f=head_of(e))),
        lambda m: m.a.f,
    ),
    "a named tuple": (attribute(lambda e: Named(head_of(e))), lambda m: m.a.f),
    "a default dict": (
        attribute(lambda e: collections.defaultdict(list, f=[e])),
        lambda m: m.a["f"][0].weight,
    ),
    "a set": (attribute(lambda e: {e}), lambda m: next(iter(m.a)).weight),
    "a deque": (attribute(lambda e: collections.deque([e])), lambda m: m.a[0].weight),
    "a weak dict": (
        attribute(lambda e: weakref.WeakValueDictionary(f=e)),
        lambda m: m.a["f"].weight,
    ),
    "a weak proxy": (attribute(weakref.proxy), lambda m: m.a.weight),
    "an attribute of a class": (
        attribute(lambda e: type("K", (), {"f": e})),
        lambda m: m.a.f.weight,
    ),
    "an attribute of a function": (attribute(with_attribute), lambda m: m.a),
    "lru_cache": (attribute(lambda e: functools.lru_cache(lambda: e.weight)), lambda m: m.a()),
    "a global": (lambda m: KNOWN.update(m=m.embed), lambda m: KNOWN["m"].weight),
    "the transpose": (attribute(lambda e: e.weight.t()), lambda m: m.a.t()),
    "data": (attribute(lambda e: e.weight.data), lambda m: m.a),
    "detached": (attribute(lambda e: e.weight.detach()), lambda m: m.a),
    "slices": (attribute(lambda e: [*e.weight.detach().split(3)]), lambda m: torch.cat(m.a)),
    "a Parameter over its memory": (
        attribute(lambda e: nn.Parameter(e.weight.data)),
        lambda m: m.a,
    ),
    "a closure over data": (
        attribute(lambda e: (lambda d: lambda h: F.linear(h, d))(e.weight.data)),
        lambda m: m.a,
    ),
    # Ways of which no script knew.
    "a context variable": (lambda m: VARIABLE.set(m.embed), lambda m: VARIABLE.get().weight),
    "a thread's own": (lambda m: setattr(LOCAL, "head", m.embed), lambda m: LOCAL.head.weight),
    "a generator": (attribute(generator), lambda m: next(m.a)),
    "a property": (attribute(Computed), lambda m: m.a.weight),
    "a module of Python": (
        lambda m: setattr(sys.modules[__name__], "HEAD", m.embed),
        lambda m: sys.modules[__name__].HEAD.weight,
    ),
    "as_strided": (
        attribute(lambda e: torch.as_strided(e.weight.detach(), (9, 4), (4, 1))),
        lambda m: m.a,
    ),
    "numpy": (attribute(lambda e: e.weight.detach().numpy()), lambda m: torch.from_numpy(m.a)),
    "dlpack": (
        attribute(lambda e: torch.utils.dlpack.from_dlpack(e.weight.detach())),
        lambda m: m.a,
    ),
    "a built-in method": (attribute(lambda e: e.weight.matmul), lambda m: m.a.__self__),
    "an iterator": (attribute(lambda e: iter([e.weight] * 9)), lambda m: next(m.a)),
    "an off-path module": (
        lambda m: m.child.cache.update(head=m.embed),
        lambda m: m.child.cache["head"].weight,
    ),
    "the referents of a module": (
        attribute(lambda e: e.parameters),
        lambda m: next(iter(m.a())),
    ),
}
FOLLOWED = list(WAYS)[:11]


@pytest.fixture(autouse=True)
def plain(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(Model, "how", None)
    yield
    KNOWN.clear()


def outcome(call: Callable[[], Tensor], right: Tensor) -> str:
    try:
        found = call()
    except RuntimeError as error:
        return "refused" if "the model's own 'embed.weight'" in str(error) else str(error)
    torch.testing.assert_close(found, right)
    return "right"


@pytest.mark.parametrize("kind", ["call", "module"])
@pytest.mark.parametrize("when", ["before the rows", "after the rows", "after a call"])
@pytest.mark.parametrize("way", WAYS)
def test_each_way_is_right_or_refused(way: str, when: str, kind: str, monkeypatch):
    torch.manual_seed(0)
    before = current_mode()
    setup, how = WAYS[way]
    model = Model().requires_grad_(False)
    own = model.embed.weight
    if when == "before the rows":
        setup(model)
    params = init_deltas(model, [2], init=torch.ones(1, 4))
    module = TokenModule(model, params).eval()

    def call() -> Tensor:
        return functional_call(model, patch(params), X) if kind == "call" else module(X)

    rows = own.index_copy(0, torch.tensor([2]), torch.ones(1, 4))
    right = F.linear(F.embedding(X, rows), rows)
    if when == "after a call":
        torch.testing.assert_close(call(), right)
    if when != "before the rows":
        setup(model)
    hidden = when == "after a call" and way not in SEEN_LATER
    monkeypatch.setattr(Model, "how", staticmethod(how))
    if hidden:  # what only a later call reaches, with nothing on the path that has changed
        return
    for _ in range(2):
        found = outcome(call, right)
        assert found == "right" or (found == "refused" and way not in FOLLOWED)
    assert model.embed.weight is own
    assert current_mode() is before


# What the path looks at.
SEEN_LATER = [*FOLLOWED, "a namespace", "the transpose", "data", "detached", "slices", "a set"]


def test_a_plain_call_of_the_model_in_a_hook_is_as_it_is():
    model = Model().requires_grad_(False)
    params, seen = init_deltas(model, [2], init=torch.ones(1, 4)), []
    plain = model(X)

    def hook(*_: object) -> None:
        if not seen:
            seen.append(None)
            seen[0] = model(X), init_deltas(model, [2]), functional_call(model, patch(params), X)

    model.child.register_forward_hook(hook)
    model.way = None
    Model.how = staticmethod(lambda m: m.child(m.embed.weight))
    found = functional_call(model, patch(params), X)
    assert torch.equal(seen[0][0], plain)
    assert torch.equal(seen[0][1].originals["embed.weight"], model.embed.weight[[2]])
    assert torch.equal(seen[0][2], found)


def keep(kind: str) -> Callable[[Any], Any]:
    """A forward that keeps the weight that it has read, and reads it from there afterwards."""

    def how(m: Any) -> Any:
        w = m.embed.weight
        if kind == "namespace":
            m.space.head = w if m.space.head is None else m.space.head
            return m.space.head
        if kind == "nested dict":
            return m.table.setdefault("in", {}).setdefault("head", w)
        if kind == "off-path module":
            return m.child.cache.setdefault("head", w)
        if kind == "tuples in a list":
            if len(m.things) == 1:
                m.things.append((w,))
            return m.things[1][0]
        if kind == "transposed":
            return m.child.cache.setdefault("t", w.t()).t()
        if kind == "object in a dict":
            return m.child.cache.setdefault("o", SimpleNamespace(e=m.embed)).e.weight
        if kind == "closure":
            return m.child.cache.setdefault("f", head_of(m.embed))
        return m.child.cache.setdefault("d", collections.deque([m])).copy()[0].embed.weight

    return how


KEPT = ("namespace", "nested dict", "off-path module", "tuples in a list", "transposed")
KEPT += ("object in a dict", "closure", "deque")


@pytest.mark.parametrize("kind", KEPT)
@pytest.mark.parametrize("fails", [False, True])
def test_what_a_call_keeps_anywhere_is_the_models_own(kind: str, fails: bool):
    torch.manual_seed(0)
    model = Model().requires_grad_(False)
    right = model(X)
    for seed in (1.0, 2.0):
        params = init_deltas(model, [2], init=torch.full((1, 4), seed))
        how = keep(kind)

        def failing(m: Any, how: Any = how) -> Any:
            how(m)
            raise ZeroDivisionError

        Model.how = staticmethod(failing if fails else how)
        # The second call finds what the first one kept, and is refused.
        with contextlib.suppress(ZeroDivisionError, RuntimeError):
            functional_call(model, patch(params), X)
        Model.how = staticmethod(how)
        assert torch.equal(model(X), right)


class Noting(nn.Module):
    def __init__(self, kind: str) -> None:
        super().__init__()
        self.embed, self.kind = nn.Embedding(9, 4), kind
        self.seen: list[Any] = []
        self.cache: Any = None

    def forward(self, x: Tensor) -> Tensor:
        if self.kind == "object":
            self.cache = SimpleNamespace(embed=self.embed)
        else:
            self.seen.append(self.embed)
        return self.embed(x)


@pytest.mark.parametrize("kind", ["object", "list"])
def test_an_interrupt_at_any_line_leaves_no_copy_and_no_mode(kind: str):
    """After the first call, whose search is long and writes nothing."""
    step, fired, before = 0, True, current_mode()
    while fired:
        torch.manual_seed(0)
        model = Noting(kind).requires_grad_(False)
        weights = patch(init_deltas(model, [2], init=torch.ones(1, 4)))
        left, fired = step, False

        def trace(frame, event, argument):
            nonlocal left, fired
            name = frame.f_code.co_filename
            if "/ttfunc/call/" not in name or name.endswith(("path.py", "known_paths.py")):
                return None
            if event == "line":
                left -= 1
                if left < 0 and not fired:
                    fired = True
                    raise KeyboardInterrupt
            return trace

        sys.settrace(trace)
        try:
            functional_call(model, weights, X)
        except KeyboardInterrupt:
            pass
        finally:
            sys.settrace(None)
        assert current_mode() is before
        kept = [model.cache.embed] if model.cache is not None else model.seen
        assert all(one is model.embed for one in kept)
        step += 1
    assert step > 100
