"""What each private name of torch and optree is taken to mean."""

from __future__ import annotations

import ast
import inspect
import re
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any, ClassVar

import optree
import pytest
import torch
import torch.nn.functional as F
from packaging.version import Version
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.autograd import forward_ad
from torch.func import functionalize, grad, jvp, vmap
from torch.fx.experimental.proxy_tensor import make_fx
from torch.overrides import TorchFunctionMode
from torch.utils.flop_counter import FlopCounterMode

import ttfunc
from tests.helpers.mesh import mesh_of_one
from ttfunc import TokenDeltas, torch_private
from ttfunc.torch_distributed_private import (
    fsdp_gathered,
    fsdp_manages,
    is_dtensor,
    is_fsdp1,
    offset_of_shard,
)
from ttfunc.torch_private import (
    COMPARISONS,
    FUNCTIONALIZE,
    GRAD,
    IS_VIEW,
    JVP,
    LINEAR,
    LINEAR_CROSS_ENTROPY,
    OPTREE_GLOBAL,
    at_work,
    autocast_dtype,
    current_mode,
    first_order,
    forbid_writes,
    has_storage,
    in_backward,
    in_dual_level,
    in_strict_export,
    is_compiled_in_vain,
    is_exported,
    is_fake,
    is_of_a_graph,
    is_traceable_wrapper_subclass,
    is_traced,
    is_wrapped,
    keeps_signature,
    leave_mode,
    mark_as_parameter,
    no_torch_function,
    outside_of_dispatch,
    outside_of_graphs,
    outside_of_modes,
    outside_of_transforms,
    plain_torch_function,
    storage_key,
    transforms_active,
    tree_leaves,
    tree_map,
    version_of,
    wrapper_of,
    writes_of,
)

ONES = torch.ones(3)
TRANSFORMS = {
    "grad": lambda f: grad(lambda x: (f(x), x.sum())[1])(ONES),
    "vmap": lambda f: vmap(lambda x: (f(x), x)[1])(ONES),
    "jvp": lambda f: jvp(lambda x: (f(x), x)[1], (ONES,), (ONES,)),
    "functionalize": lambda f: functionalize(lambda x: (f(x), x)[1])(ONES),
}


def within(transform: str, what) -> object:
    """What `what` of the transform's argument is in it."""
    found = []
    TRANSFORMS[transform](lambda x: found.append(what(x)))
    return found[0]


@pytest.mark.parametrize("transform", TRANSFORMS)
def test_transforms_are_told_of_while_they_are_at_work(transform: str):
    assert not transforms_active()
    assert within(transform, lambda x: transforms_active())
    assert not transforms_active()
    assert within(transform, lambda x: at_work(JVP)) == (transform == "jvp")
    assert within(transform, lambda x: at_work(FUNCTIONALIZE)) == (transform == "functionalize")
    assert not at_work(JVP, FUNCTIONALIZE)


def test_transforms_tell_how_often_they_differentiate():
    asked = torch.ones(3, requires_grad=True)

    def known(x: Tensor) -> bool:
        return first_order(x)

    assert first_order(asked)  # a backward says it later
    assert within("grad", known)
    assert within("vmap", known)
    assert not within("jvp", known)
    assert not within("functionalize", known)
    found = []
    grad(lambda x: (found.append(first_order(x)), x.sum())[1])(asked)
    grad(lambda x: grad(lambda y: (found.append(first_order(y)), y.sum())[1])(x).sum())(ONES)
    assert found == [False, False]
    vmap(grad(lambda x: (found.append((first_order(x), at_work(GRAD))), x.sum())[1]))(ONES)
    assert found[-1] == (True, True)
    with forward_ad.dual_level():
        assert not first_order(ONES)


def test_a_transform_of_another_thread_is_not_this_ones():
    found = []

    def other(x: Tensor) -> Tensor:
        thread = threading.Thread(target=lambda: found.append(transforms_active()))
        thread.start()
        thread.join()
        return x.sum()

    grad(other)(ONES)
    assert found == [False]


def test_an_outer_transform_is_on_the_stack_as_well():
    found = []
    jvp(
        lambda x: grad(lambda y: (found.append(at_work(JVP)), (x * y).sum())[1])(x),
        (ONES,),
        (ONES,),
    )
    assert found == [True]


@pytest.mark.parametrize("transform", TRANSFORMS)
def test_what_a_transform_wraps(transform: str):
    assert within(transform, is_wrapped)
    assert not within(transform, lambda x: is_wrapped(ONES))
    assert not is_wrapped(ONES)


def test_a_backward_is_told_of():
    told = []
    x = torch.ones(2, requires_grad=True)
    x.register_hook(lambda grad: told.append(in_backward()))
    x.sum().backward()
    assert told == [True]
    assert not in_backward()


def test_dual_numbers_are_told_of():
    assert not in_dual_level()
    with forward_ad.dual_level():
        assert in_dual_level()
    assert not in_dual_level()


@pytest.mark.parametrize("transform", TRANSFORMS)
def test_what_is_made_outside_of_modes_outlives_them(transform: str):
    def made(x: Tensor) -> Tensor:
        with outside_of_modes():
            return ONES + 1

    assert not is_wrapped(within(transform, made))
    with torch.inference_mode():
        with outside_of_modes():
            kept = torch.ones(2)
        assert torch.ones(2).is_inference()
    assert not kept.is_inference()
    with torch._subclasses.FakeTensorMode(), outside_of_modes():
        assert type(torch.ones(2)) is Tensor
    kept.requires_grad_().sum().backward()


def test_no_transform_sees_what_is_done_outside_of_them():
    found = []

    def f(x: Tensor) -> Tensor:
        with outside_of_transforms():
            found.append((ONES * 2).sum())
        return x.sum()

    grad(f)(ONES)
    assert found[0].item() == 6
    assert not is_wrapped(found[0])


class Loud(Tensor):
    """Tells of what comes to it, by which way."""

    ways: list[str]

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        cls.ways.append("function")
        return super().__torch_function__(func, types, args, kwargs)

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        cls.ways.append("dispatch")
        with outside_of_dispatch():
            return func(*args, **(kwargs or {}))


class Quiet(Loud):
    __torch_function__ = plain_torch_function


def test_who_is_asked_about_a_subclass():
    for kind, ways in ((Loud, ["function", "dispatch"]), (Quiet, ["dispatch"])):
        one = torch.ones(2).as_subclass(kind)
        kind.ways = []
        _ = one + 1
        assert kind.ways[: len(ways)] == ways
        kind.ways = []
        with no_torch_function():
            _ = one + 1
        assert kind.ways == ["dispatch"]


def test_which_tensors_have_a_storage():
    assert has_storage(ONES)
    assert not has_storage(torch.eye(3).to_sparse())
    assert not has_storage(torch.ones(3, 3).to_mkldnn())


class Pair(Tensor):
    """A tensor that is made of two others."""

    @staticmethod
    def __new__(cls, a: Tensor, b: Tensor):
        made = Tensor._make_wrapper_subclass(cls, a.shape)
        made.a, made.b = a, b
        return made

    def __tensor_flatten__(self):
        return ["a", "b"], None

    @classmethod
    def __tensor_unflatten__(cls, inner, context, size, stride):
        return cls(inner["a"], inner["b"])

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        raise AssertionError(func)


def test_what_forward_mode_asks_of_a_tangent():
    seen = []

    class Noting(Tensor):
        @classmethod
        def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
            seen.append(func)
            with outside_of_dispatch():
                return func(*args, **(kwargs or {}))

    tangent = torch.ones(3).as_subclass(Noting)
    with forward_ad.dual_level():
        forward_ad.make_dual(ONES.clone(), tangent)
    assert seen
    assert set(seen) <= COMPARISONS


def test_what_a_tensor_is_made_of():
    pair = Pair(torch.ones(2), torch.zeros(2))
    assert is_traceable_wrapper_subclass(pair)
    assert pair.__tensor_flatten__()[0] == ["a", "b"]
    assert not is_traceable_wrapper_subclass(ONES)


def test_which_tensors_are_views():
    assert IS_VIEW(ONES[1:])
    assert not IS_VIEW(ONES)
    assert not IS_VIEW(ONES.detach())


def test_one_storage_has_one_key():
    other = torch.ones(3)
    assert storage_key(ONES) == storage_key(ONES[1:]) == storage_key(ONES.view(1, 3).detach())
    assert storage_key(ONES) != storage_key(other)
    parameter = torch.nn.Parameter(other)
    assert storage_key(parameter) == storage_key(other) == storage_key(parameter.data)


def test_each_write_makes_a_new_version_for_all_who_share():
    one = torch.ones(3)
    alias, view, apart = one.detach(), one[1:], one.clone()
    before = version_of(one)
    one.mul_(2)
    assert version_of(one) == version_of(alias) == version_of(view) > before
    assert version_of(apart) == 0
    with torch.no_grad():
        alias.copy_(apart)
    assert version_of(one) > before + 1
    _ = one + 1
    assert version_of(one) == version_of(alias)
    with torch.inference_mode():
        assert version_of(torch.ones(2)) is None
    assert within("grad", version_of) is None


def test_memory_that_is_not_to_be_written_to():
    one = torch.ones(())
    forbid_writes(one)
    with pytest.raises(RuntimeError, match="Cannot access data pointer"):
        one.add_(1)
    with pytest.raises(RuntimeError, match="Cannot access data pointer"):
        one.data_ptr()
    assert torch.equal(one.expand(2) + 0, torch.ones(2))


def test_what_an_operation_writes_to():
    aten = torch.ops.aten
    assert writes_of(aten.add_.Tensor, ("a", "b"), {}) == ["a"]
    assert writes_of(aten.add.out, ("a", "b"), {"out": "c"}) == ["c"]
    assert writes_of(aten.add.Tensor, ("a", "b"), {}) == []
    assert writes_of(torch.add, ("a", "b"), {}) is None


def test_the_base_of_tensors_has_their_methods():
    assert issubclass(Tensor, torch_private.TensorBase)
    assert "add_" in vars(torch_private.TensorBase)
    assert "add_" not in vars(Tensor)


def test_a_class_in_the_global_namespace_needs_none_to_be_named():
    class Pair:
        def __init__(self, a: int, b: int) -> None:
            self.pair = (a, b)

    optree.register_pytree_node(
        Pair, lambda p: (p.pair, None, None), lambda _, c: Pair(*c), namespace=OPTREE_GLOBAL
    )
    assert optree.tree_leaves([Pair(1, 2)]) == [1, 2]


def test_torchs_pytree_takes_containers_and_deltas_apart():
    params = ttfunc.init_deltas(torch.nn.Embedding(5, 2), [1])
    doubled = tree_map(lambda t: t * 2, {"a": [params]})["a"][0]
    assert isinstance(doubled, TokenDeltas)
    assert torch.equal(doubled.deltas["weight"], params.deltas["weight"] * 2)
    assert tree_leaves({"b": 1, "a": (2, None)})[:2] == [1, 2]


@pytest.mark.parametrize("name", ["_C._are_functorch_transforms_active", "overrides._pop_mode"])
def test_a_torch_that_lacks_one_is_refused_at_import(name: str):
    script = f"import torch; del torch.{name}; import ttfunc"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)  # noqa: S603
    assert done.returncode
    message = f"ImportError: ttfunc relies on an internal of torch.*{name.rpartition('.')[2]}"
    assert re.search(message + ".*tested with torch 2.10 to 2.15", done.stderr), done.stderr


def test_no_other_module_uses_a_private_name():
    package = Path(ttfunc.__file__).parent
    allowed = {"_parameters", "_buffers", "_modules", "_non_persistent_buffers_set"}
    for path in package.rglob("*.py"):
        if path.name in {"torch_private.py", "torch_distributed_private.py"}:
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, (ast.Import, ast.ImportFrom)):
                module = getattr(node, "module", None) or node.names[0].name
                if module.partition(".")[0] not in {"torch", "optree"}:
                    continue
                assert "._" not in module, (path, module)
                private = [n.name for n in node.names if n.name.startswith("_")]
                assert not private, (path, private)
            elif isinstance(node, ast.Attribute) and re.match(r"_(?!.*__$)", node.attr):
                root = node
                while isinstance(root, ast.Attribute):
                    root = root.value
                if isinstance(root, ast.Name) and root.id in {
                    "torch",
                    "F",
                    "nn",
                    "optree",
                    "Tensor",
                }:
                    assert node.attr in allowed, (path, ast.unparse(node))


def test_apply_asks_for_a_signature_that_may_be_known():
    """Whoever sets `__signature__` is believed, and the arguments are bound to it."""

    class Doubled(torch.autograd.Function):
        @staticmethod
        @keeps_signature
        def forward(x: Tensor, factor: float = 2.0) -> Tensor:
            return x * factor

        @staticmethod
        def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
            _, ctx.factor = inputs

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
            return grad * ctx.factor, None

    x = torch.ones(3, requires_grad=True)
    Doubled.apply(x).sum().backward()
    assert x.grad is not None
    assert x.grad.tolist() == [2.0, 2.0, 2.0]
    assert list(inspect.signature(Doubled.forward).parameters) == ["x", "factor"]
    with pytest.raises(TypeError, match="too many positional arguments"):
        Doubled.apply(x, 2.0, 3.0)


# Sharded engines


def test_a_dtensor_is_known_and_where_its_part_begins():
    assert not is_dtensor(torch.ones(2))
    with mesh_of_one() as mesh:
        matrix = torch.distributed.tensor.distribute_tensor(torch.ones(4, 3), mesh)
        assert is_dtensor(matrix)
        assert tuple(offset_of_shard(matrix)) == (0, 0)


def test_fsdp_tells_what_it_manages_and_keeps():
    with mesh_of_one() as mesh:
        model = torch.nn.Sequential(torch.nn.Embedding(5, 3), torch.nn.Linear(3, 5, bias=False))
        model[1].weight = model[0].weight
        assert not fsdp_manages(model[0])
        torch.distributed.fsdp.fully_shard(model, mesh=mesh)
        shards = model[0].weight
        places = {(id(one), "weight") for one in model}
        assert not places & fsdp_gathered().keys()  # the modules have the shards themselves
        model(torch.tensor([1]))
        assert fsdp_manages(model[0])
        assert model[0].weight is not shards
        found = fsdp_gathered()
        assert all(found[place] is shards for place in places)  # a tied one is there twice
        assert not is_fsdp1(model)


def test_torch_s_own_linear_is_known():
    assert torch.nn.functional.linear is LINEAR


def test_what_traces_is_known():
    """Fake tensors, a graph of make_fx, and torch.export, which also wraps the fakes."""
    seen = []

    def look(x: Tensor) -> Tensor:
        seen.append((is_traced(), is_exported(), is_fake(x)))
        return x + 1

    look(ONES)
    with FakeTensorMode() as mode:
        look(mode.from_tensor(ONES))
    look(mode.from_tensor(ONES))
    make_fx(look)(ONES)
    make_fx(look, tracing_mode="fake")(ONES)
    assert seen == [
        (False, False, False),
        (True, True, True),
        (False, False, True),
        (True, True, False),
        (True, True, True),
    ]
    for strict in (False, True):
        torch.export.export(Looking(), (ONES,), strict=strict)
    assert Looking.seen == [(True, True, True), (False, True, True)]
    with FlopCounterMode(display=False):
        assert not is_traced()


class Looking(torch.nn.Module):
    seen: ClassVar[list[tuple[bool, ...]]] = []

    def forward(self, x: Tensor) -> Tensor:
        if torch.compiler.is_dynamo_compiling():
            note_of_dynamo(is_traced(), is_exported(), in_strict_export())
        else:
            assert not in_strict_export()
            Looking.seen.append((is_traced(), is_exported(), is_fake(x)))
        return x + 1


@torch._dynamo.assume_constant_result
def note_of_dynamo(*flags: bool) -> int:
    Looking.seen.append(flags)
    return 0


def test_a_wrapper_has_the_size_of_a_tensor_and_no_memory():
    class Seen(Tensor):
        @classmethod
        def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
            seen.append(func)
            return torch.ones(1)

    seen: list[Any] = []
    wrapper = wrapper_of(torch.zeros(3, 2, dtype=torch.float64).mT, Seen)
    assert isinstance(wrapper, Seen)
    assert (wrapper.shape, wrapper.stride(), wrapper.dtype) == ((2, 3), (1, 2), torch.float64)
    assert not wrapper.requires_grad
    assert wrapper + 1 == 1
    assert seen == [torch.ops.aten.add.Tensor]


def test_the_innermost_mode_is_known_and_left_once():
    class Mode(TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            return func(*args, **(kwargs or {}))

    outer, inner = Mode(), Mode()
    assert current_mode() is None
    with outer:
        inner.__enter__()
        assert current_mode() is inner
        leave_mode(outer)  # not the innermost one
        leave_mode(inner)
        leave_mode(inner)
        assert current_mode() is outer
    assert current_mode() is None


def test_operations_of_a_graph_are_told_from_those_of_a_model():
    assert is_of_a_graph(torch.ops.aten.detach.default)
    assert not any(map(is_of_a_graph, (torch.mm, torch.Tensor.matmul, F.linear)))


def test_a_tensor_of_another_class_is_a_parameter_once_it_is_marked():
    one = torch.ones(2).as_subclass(Loud)
    assert not isinstance(one, torch.nn.Parameter)
    mark_as_parameter(one)
    assert isinstance(one, torch.nn.Parameter)
    assert type(one) is Loud


def test_the_dtype_that_autocast_casts_to():
    cpu, meta = torch.device("cpu"), torch.device("meta")
    assert autocast_dtype(cpu) is None
    with torch.autocast("cpu", torch.float16):
        assert autocast_dtype(cpu) is torch.float16
        assert autocast_dtype(meta) is None
        with torch.autocast("cpu", enabled=False):
            assert autocast_dtype(cpu) is None


def test_the_loss_of_a_head_by_its_weight():
    hidden, weight, labels = torch.randn(5, 3), torch.randn(7, 3), torch.arange(5)
    assert len(LINEAR_CROSS_ENTROPY) == hasattr(F, "linear_cross_entropy")
    for loss in LINEAR_CROSS_ENTROPY:
        wanted = F.cross_entropy(hidden @ weight.T, labels)
        torch.testing.assert_close(loss(hidden, weight, labels), wanted)


def test_only_an_older_dynamo_compiles_a_functional_call_in_vain():
    assert not is_compiled_in_vain()
    found = []

    @torch._dynamo.assume_constant_result
    def note(flag: bool) -> int:
        found.append(flag)
        return 0

    @torch.compile(backend="eager")
    def asked(x: Tensor) -> Tensor:
        note(is_compiled_in_vain())
        return x + 1

    asked(ONES)
    assert set(found) == {Version(torch.__version__) < Version("2.13")}


def test_dynamo_leaves_the_graph_for_a_function_outside_of_it():
    compiled = []

    @outside_of_graphs
    def outside(x: Tensor) -> Tensor:
        compiled.append(torch.compiler.is_dynamo_compiling())
        return x + 1

    def around(x: Tensor) -> Tensor:
        return outside(x * 2) * 2

    assert torch.equal(torch.compile(around, backend="eager")(ONES), around(ONES))
    assert not any(compiled)
    torch.compiler.reset()
    with pytest.raises(Exception, match="ttfunc.functional_call is compiled from torch 2.13 on"):
        torch.compile(around, backend="eager", fullgraph=True)(ONES)
