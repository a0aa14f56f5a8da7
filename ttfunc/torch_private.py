"""Every private name of torch and optree that the library uses, with the meaning it relies on.

The private names of torch.distributed are in torch_distributed_private.py. No other module reads an
attribute of theirs that begins with an underscore (except the dictionaries of an `nn.Module`).
Each meaning has its test in tests/test_torch_private.py: a torch that changes one fails that test,
before it gives a user a wrong gradient. Names of modules are read when ttfunc is imported, and a
torch that lacks one is refused then; attributes of tensors are read when they are needed.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from optree.registry import __GLOBAL_NAMESPACE
from torch import Tensor, overrides
from torch._C import _functorch as functorch
from torch._subclasses.fake_tensor import FakeTensor
from torch._subclasses.functional_tensor import FunctionalTensor
from torch.autograd import forward_ad
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree
from torch.utils._python_dispatch import (
    is_traceable_wrapper_subclass as is_traceable_wrapper_subclass,
)

_Call = TypeVar("_Call", bound=Callable[..., Any])

_TORCH = tuple(map(int, torch.__version__.split(".")[:2]))

# The base of torch.Tensor, whose attributes are the methods written in C++.
TensorBase = torch._C.TensorBase

# `F.linear` as torch has it; DeepSpeed puts a function of its own in that place.
LINEAR = torch._C._nn.linear

# `F.linear_cross_entropy`, which came with torch 2.13: the loss of a head by its weight.
LINEAR_CROSS_ENTROPY: tuple[Callable[..., Any], ...] = (
    (F.linear_cross_entropy,) if hasattr(F, "linear_cross_entropy") else ()
)

# Where optree registers a class that needs no namespace to be named.
OPTREE_GLOBAL = __GLOBAL_NAMESPACE

# torch's own pytree: it takes a registered class, such as TokenDeltas, apart and together again.
torch_pytree = _pytree
tree_map, tree_leaves = torch_pytree.tree_map, torch_pytree.tree_leaves

# Whether a functorch transform (grad, vmap, jvp, functionalize) is at work in this thread.
transforms_active: Callable[[], bool] = torch._C._are_functorch_transforms_active

# Whether a tensor is a functorch transform's wrapper of another: it has no memory of its own.
is_wrapped: Callable[[Tensor], bool] = functorch.is_functorch_wrapped_tensor

# Whether a tensor has a storage at all: sparse ones and the like have none.
has_storage: Callable[[Tensor], bool] = torch._C._has_storage

# `is_traceable_wrapper_subclass`: whether a tensor is made of others, which `__tensor_flatten__`
# names, as torchao's quantised ones are.

# Context managers. In the first no `__torch_function__` of a subclass is called.
no_torch_function = torch._C.DisableTorchFunctionSubclass
# A tensor made in these belongs to no transform, and no mode or class with `__torch_dispatch__`.
outside_of_transforms = torch._C._DisableFuncTorch
outside_of_dispatch = torch._C._DisableTorchDispatch

# The `__torch_function__` of a plain tensor, for a subclass to use.
plain_torch_function = torch._C._disabled_torch_function_impl

# Makes a tensor raise when a kernel, numpy or a DLPack consumer asks to write to its memory.
forbid_writes: Callable[[Tensor], None] = torch._C._set_throw_on_mutable_data_ptr

# What forward mode asks of a tangent and its primal: whether they are alike in size and storage.
COMPARISONS = {
    torch.ops.aten.is_same_size.default,
    torch.ops.aten._has_same_storage_numel.default,
}

# Whether a tensor is a view of another, for autograd: a method of Tensor.
IS_VIEW = Tensor._is_view

GRAD, VMAP = functorch.TransformType.Grad, functorch.TransformType.Vmap
JVP, FUNCTIONALIZE = functorch.TransformType.Jvp, functorch.TransformType.Functionalize

# How many modes with a `__torch_dispatch__` are at work, and which one there is of a kind.
_count_modes: Callable[[], int] = torch._C._len_torch_dispatch_stack
_mode_of: Callable[[Any], object] = torch._C._get_dispatch_mode

# What fake tensors, a graph that is written down, and functionalisation by torch.export each use.
_TRACING = tuple(torch._C._TorchDispatchModeKey.__members__.values())

# The transforms at work in this thread, the outermost first; and what such a wrapper is around.
_stack: Callable[[], list[Any] | None] = functorch.get_interpreter_stack
_unwrapped: Callable[[Tensor], Tensor] = functorch.get_unwrapped

# The number of the backward that is at work in this thread, -1 for none.
_task: Callable[[], int] = torch._C._current_graph_task_id

# Makes a tensor of a class, of a size and strides, and without memory.
_make_wrapper: Callable[..., Any] = Tensor._make_wrapper_subclass

# An overload of an operation, such as `aten.add.Tensor`, with its schema.
_Overload = torch._ops.OpOverload


def is_traced() -> bool:
    """Whether operations in this thread are on fake tensors, or are written down in a graph.

    By FakeTensorMode, make_fx or torch.export: what dynamo itself traces (torch.compile,
    `strict=True`) does not count.
    """
    if torch.compiler.is_dynamo_compiling() or not _count_modes():
        return False
    return any(_mode_of(key) is not None for key in _TRACING)


def is_exported() -> bool:
    """Whether operations are written down for another runtime, by dynamo too (`strict=True`)."""
    return torch.compiler.is_exporting() or is_traced()


def in_strict_export() -> bool:
    """Whether it is dynamo that writes an exported program down."""
    return torch.compiler.is_dynamo_compiling() and torch.compiler.is_exporting()


def is_fake(tensor: Tensor) -> bool:
    """Whether a tensor is fake, or torch.export's wrapper of a fake one.

    No alias of it can be of another class.
    """
    return isinstance(tensor, (FakeTensor, FunctionalTensor))


def wrapper_of(tensor: Tensor, kind: type[Tensor]) -> Any:
    """A tensor of class `kind` like another one, but without memory or a gradient."""
    return _make_wrapper(
        kind,
        tensor.shape,
        strides=tensor.stride(),
        dtype=tensor.dtype,
        layout=tensor.layout,
        device=tensor.device,
    )


def _layers() -> list[Any]:
    """The kinds of the transforms that are at work, from the outermost one."""
    return [layer.key() for layer in _stack() or []] if transforms_active() else []


def at_work(*kinds: Any) -> bool:
    """Whether a transform of one of these kinds is at work."""
    return any(layer in kinds for layer in _layers())


def transform_depth() -> int:
    """How many transforms are at work, one within the other."""
    return len(_layers())


def first_order(*tensors: Tensor) -> bool:
    """Whether at most one transform differentiates what is made of these, and that one backwards.

    A plain `backward` says only later whether its result will be differentiated again.
    """
    layers = _layers()
    if in_dual_level() or set(layers) - {GRAD, VMAP} or layers.count(GRAD) > 1:
        return False
    return GRAD not in layers or not any(_innermost(one).requires_grad for one in tensors)


def _innermost(tensor: Tensor) -> Tensor:
    """What the wrappers of transforms are around."""
    while is_wrapped(tensor):
        tensor = _unwrapped(tensor)
    return tensor


# The innermost mode of this thread that has a `__torch_function__`; None where there is none.
current_mode: Callable[[], TorchFunctionMode | None] = overrides._get_current_function_mode
_pop_mode: Callable[[], object] = overrides._pop_mode


def leave_mode(mode: TorchFunctionMode) -> None:
    """Leave a mode if it is the innermost one of this thread."""
    if current_mode() is mode:
        _pop_mode()


def in_dual_level() -> bool:
    """Whether a `torch.autograd.forward_ad.dual_level` has been entered."""
    return forward_ad._current_level >= 0


def in_backward() -> bool:
    """Whether autograd is at work on a backward in this thread."""
    return _task() != -1


def storage_key(tensor: Tensor) -> int:
    """Which storage a tensor lies in: equal for two that share one, while both are alive."""
    return int(tensor.untyped_storage()._cdata)


def version_of(tensor: Tensor) -> int | None:
    """A number that grows with each write in place to the tensor, or to one that shares it.

    None for a tensor without one: made in inference mode, or wrapped by a transform.
    """
    return None if tensor.is_inference() or is_wrapped(tensor) else tensor._version


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator] # for torch 2.10
def _has_autocast(device_type: str) -> bool:
    """Whether autocast knows a kind of device, as it does not know meta."""
    return torch.amp.is_autocast_available(device_type)


def autocast_dtype(device: torch.device) -> torch.dtype | None:
    """The dtype that autocast casts to on a device; None where it is off."""
    on = _has_autocast(device.type) and torch.is_autocast_enabled(device.type)
    return torch.get_autocast_dtype(device.type) if on else None


def mark_as_parameter(tensor: Tensor) -> None:
    """Make it an `nn.Parameter` for `isinstance`, as torch does for tensors of other classes."""
    tensor._is_param = True


def is_of_a_graph(func: Callable[..., Any]) -> bool:
    """Whether it is an ATen operation itself, as compiled code calls them and models do not."""
    return isinstance(func, _Overload) and func.namespace == "aten"


def writes_of(
    func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> list[Any] | None:
    """The arguments that an ATen operation writes to, by its schema; None for anything else."""
    if not isinstance(func, _Overload):
        return None
    arguments = func._schema.arguments
    named = dict(zip((a.name for a in arguments), args, strict=False)) | kwargs
    return [named.get(a.name) for a in arguments if a.is_write]


def keeps_signature(forward: Callable[..., Any]) -> Callable[..., Any]:
    """A `torch.autograd.Function.forward` whose signature is known.

    `apply` calls `inspect.signature` each time; for an unknown one that is a third of its cost.
    """
    forward.__signature__ = inspect.signature(forward)  # type: ignore[attr-defined]
    return forward


def is_compiled_in_vain() -> bool:
    """Whether a dynamo of before torch 2.13 is at work, which cannot trace a functional call."""
    return torch.compiler.is_dynamo_compiling() and _TORCH < (2, 13)


def outside_of_graphs(call: _Call) -> _Call:
    """The function, for which dynamo leaves the graph; with `fullgraph=True` it raises instead."""
    reason = "ttfunc.functional_call is compiled from torch 2.13 on. Before, compile a call of "
    reason += "torch.func.functional_call(model, patch(params), ...), and export with strict=False."
    return torch.compiler.disable(call, reason=reason)  # type: ignore[no-any-return]


@contextlib.contextmanager
def outside_of_modes() -> Iterator[None]:
    """Make tensors outside of any active mode or transform, because they outlive it."""
    if torch.compiler.is_dynamo_compiling():  # Dynamo keeps no tensor of its own
        yield
        return
    # Fake tensors are made by a dispatch mode.
    with torch.inference_mode(False), outside_of_transforms(), outside_of_dispatch():
        yield
