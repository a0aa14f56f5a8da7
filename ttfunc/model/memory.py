"""Where tensors lie in memory: whether two are the same, or share a part."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from ttfunc.engines.ownership import is_sharded
from ttfunc.torch_private import has_storage, is_wrapped, storage_key


def memory_of(tensor: Tensor) -> tuple[object, ...]:
    """Where a tensor lies in memory, and its layout; equal for two tensors over the same memory."""
    storage = storage_of(tensor)
    if storage is None:
        return (id(tensor),)
    return storage, tensor.storage_offset(), tensor.shape, tensor.stride(), tensor.dtype


def storage_of(tensor: Tensor) -> int | None:
    """The one storage that a tensor lies in, which another may share.

    None for a tensor that is the same only as itself: a sparse or nested one, one that a transform
    wraps, that is not yet made (LazyLinear), or that an engine has sharded.
    """
    if is_lazy(tensor) or is_wrapped(tensor) or tensor.is_nested or is_sharded(tensor):
        return None
    return storage_key(tensor) if has_storage(tensor) else None


def same_memory(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors have the same storage, offset, shape, strides and dtype."""
    return memory_of(a) == memory_of(b)


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors hold the same bytes, wherever they are."""
    if a is b:
        return True
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    if a.is_meta or b.is_meta:  # no values to compare
        return a.is_meta and b.is_meta
    # As bytes, so that a NaN equals itself.
    return torch.equal(a.cpu().view(torch.uint8), b.cpu().view(torch.uint8))


def overlaps(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors share bytes."""
    storage = storage_of(a)
    if storage is None or storage != storage_of(b):
        return False
    # A flat storage holds many parameters side by side, and these do not overlap.
    (start_a, end_a), (start_b, end_b) = _extent(a), _extent(b)
    return start_a < end_b and start_b < end_a


def _extent(tensor: Tensor) -> tuple[int, int]:
    start = int(tensor.storage_offset()) * tensor.element_size()
    if not tensor.numel():
        return start, start
    last = sum((n - 1) * int(s) for n, s in zip(tensor.shape, tensor.stride(), strict=True))
    return start, start + (last + 1) * tensor.element_size()


def addresses_of(tensor: Tensor) -> tuple[int, int] | None:
    """Where its bytes begin and end in memory, also of one that shares them in another storage.

    (As numpy's and DLPack's views do.) None for one without memory, or of another class.
    """
    if type(tensor) not in (Tensor, nn.Parameter) or storage_of(tensor) is None:
        return None
    try:
        start = tensor.data_ptr()
    except RuntimeError:  # a placeholder, whose memory is not to be read
        return None
    first, last = _extent(tensor)
    return (start, start + last - first) if start else None
