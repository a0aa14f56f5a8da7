"""The patched weight: an `index_copy` that has not happened yet.

`base.index_copy(0, ids, rows)` copies a V×D matrix at each call, and its backward builds V×D
gradients to keep k rows of them. A deferred weight keeps `(base, ids, rows)` and gives the same
results where a model looks tokens up or multiplies by the matrix; for anything else it becomes
the copy.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from ttfunc.handlers import HANDLERS, frozen
from ttfunc.overrides import ABOUT, BENEATH, written_by
from ttfunc.source import Reads, Rows, Source, Sourced, versions
from ttfunc.targets import Matrix, memory_of


class PatchedWeight(Sourced):
    """A `(V, D)` weight with k of its rows replaced, or the `(D, V)` transpose of one.

    Made by `patch`. `source.uses` tells how it was read: `"lookup"`, `"product"`, `"dense"`.
    """

    def like(self, source: Source) -> PatchedWeight:
        """The same for another source, turned as this one is."""
        return _wrap(source, self.transposed)

    def turned(self) -> PatchedWeight:
        """The transpose."""
        return _wrap(self.source, not self.transposed)

    def unread(self) -> PatchedWeight:
        """The same, with no use noted yet."""
        return _wrap(self.source._replace(reads=Reads()), self.transposed)

    @classmethod
    def __torch_function__(
        cls,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if func in ABOUT:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*tree_map(frozen, args), **tree_map(frozen, kwargs))
        if func in BENEATH:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **kwargs)
        handler = HANDLERS.get(func)
        if handler is not None:
            result = handler(*args, **kwargs)
            if result is not NotImplemented:
                return result
        _refuse(func, args, kwargs)
        with torch._C.DisableTorchFunctionSubclass():
            return func(*tree_map(_dense, args), **tree_map(_dense, kwargs))


def patched(base: Tensor, rows: Rows, matrix: Matrix | None, *, dense: bool) -> PatchedWeight:
    """The weight with `rows` in place, copied at once (`dense`) or deferred.

    The memory beneath a deferred weight is one NaN, expanded: whatever gets past
    `__torch_function__` sees NaN, never the base.
    """
    copy = rows.copied(base) if dense else None
    beneath = rows.beneath(base) if copy is None else copy
    memory = None
    if matrix is not None and not torch.compiler.is_dynamo_compiling():  # which reads no pointers
        memory = memory_of(matrix.tensor)
    made_from = () if copy is None else versions(base, rows.values)
    source = Source(base, rows, matrix, beneath, copy, memory, made_from, Reads())
    return _wrap(source, transposed=False)


def _wrap(source: Source, transposed: bool) -> PatchedWeight:
    # By its name: torch.compile cannot trace this for a class that it is handed.
    weight = (source.beneath.mT if transposed else source.beneath).as_subclass(PatchedWeight)
    weight.source, weight.transposed = source, transposed
    return weight


def _dense(value: Any) -> Any:
    """In place of a patched weight the matrix itself."""
    if not isinstance(value, PatchedWeight):
        return value
    source = value.source
    source.note("dense")
    # The copy is not kept for the next read, which may be under another grad mode or transform.
    copy = source.rows.copied(source.base) if source.copy is None else source.copy
    return copy.mT if value.transposed else copy


def _refuse(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Raise where the copy would be written to, or outlived by a pointer: both would be lost."""
    written = written_by(func, args, kwargs)
    if any(isinstance(value, PatchedWeight) and value.deferred for value in written):
        raise RuntimeError(
            f"{func.__name__} on a patched weight: the weight is made anew for each call, so what "
            "is written to it (or read through a pointer to it) would be lost. Write to the model "
            "or to the deltas before the call, or use patch(params, dense=True)."
        )
