"""Rows in safetensors files: what may be written, and what can be read back safely."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ttfunc.disk.header import FLOATS
from ttfunc.rows.deltas import GATHER
from ttfunc.torch_distributed_private import is_dtensor
from ttfunc.torch_private import is_wrapped, outside_of_modes


def path_of(given: object, order: str) -> Path:
    """The path that the user gave. Raises TypeError for anything else, and shows the `order`."""
    if not isinstance(given, (str, os.PathLike)):
        raise TypeError(f"a path is needed, got {type(given).__name__}. The order is {order}.")
    return Path(given)


def differing(a: Tensor, b: Tensor) -> list[int]:
    """The rows in which two `(n, D)` tensors differ, in the coarser of their dtypes."""
    # So a checkpoint that was loaded in half precision has the same rows.
    coarse = max(a.dtype, b.dtype, key=lambda dtype: torch.finfo(dtype).eps)
    a, b = (rows.to(coarse).contiguous().view(torch.uint8) for rows in (a, b))
    return (a != b).any(1).nonzero().ravel().tolist()


def check_rows(tensor: Tensor, k: int, width: int, what: str) -> None:
    """Raise ValueError unless these are `(k, D)` rows of a float dtype."""
    if tuple(tensor.shape) != (k, width):
        raise ValueError(
            f"{what} have shape {tuple(tensor.shape)}, and {(k, width)} is needed: a row for each "
            "token index. Save or merge stacked adapters one at a time."
        )
    if tensor.dtype not in FLOATS.values():
        raise ValueError(f"{what} are {tensor.dtype}, and a float dtype of safetensors is needed.")


def cpu_copy(tensor: Tensor, what: str) -> Tensor:
    """A contiguous copy on the CPU. Raises ValueError where there are no values to write."""
    if is_wrapped(tensor):
        raise ValueError(f"{what} are traced by a transform. Save what the transform returns")
    if is_dtensor(tensor):
        raise ValueError(f"{what} are in parts on several ranks. {GATHER}")
    if tensor.is_meta:
        raise ValueError(f"{what} are on the meta device, without values. Load the values first")
    with outside_of_modes():
        return tensor.detach().cpu().clone(memory_format=torch.contiguous_format)


def tensor_of(file: Any, key: str) -> Tensor:
    """A tensor of an open safetensors file, in memory of its own."""
    dtype = file.get_slice(key).get_dtype()
    if dtype not in FLOATS and dtype != "I64":
        raise ValueError(f"{key!r} has dtype {dtype}, and a float dtype or I64 is needed")
    with outside_of_modes():
        return file.get_tensor(key).clone()  # type: ignore[no-any-return]


@contextlib.contextmanager
def opened(path: Path) -> Iterator[Any]:
    """An open safetensors file. Raises FileNotFoundError, or ValueError where it is damaged."""
    if not path.exists():
        raise FileNotFoundError(f"there is no file {str(path)!r}.")
    if not path.is_file():
        raise ValueError(
            f"{str(path)!r} is no file. For a folder of a PEFT adapter use load_peft, and for the "
            "folder of a TokenModule that a trainer saved, load(path, model)."
        )
    try:
        file = safe_open(path, "pt")
    except SafetensorError as error:
        raise ValueError(f"{str(path)!r} is no safetensors file, or damaged: {error}.") from None
    with file:
        yield file


@contextlib.contextmanager
def prefix_errors(what: str) -> Iterator[None]:
    """Put `what` before the message of an error; each of these becomes a ValueError."""
    try:
        yield
    except (ValueError, TypeError, IndexError) as error:
        raise ValueError(f"{what}: {str(error).rstrip('.')}.") from None
