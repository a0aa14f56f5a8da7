"""The patched weight: an `index_copy` that has not happened yet.

`base.index_copy(0, ids, rows)` copies a V×D matrix at each call, and its backward builds V×D
gradients to keep k rows of them. A deferred weight keeps `(base, ids, rows)` and gives the same
results where a model looks tokens up or multiplies by the matrix; for anything else it becomes
the copy.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ttfunc.model.matrix import Matrix
from ttfunc.model.memory import memory_of
from ttfunc.torch_private import is_fake, transforms_active, version_of
from ttfunc.weight.lazy import Lazy
from ttfunc.weight.overrides import ANSWERED_BY_PLACEHOLDER, SIZES, registry
from ttfunc.weight.placeholder import Reads, matrix_placeholder, wrapped
from ttfunc.weight.rows import Rows
from ttfunc.weight.source import Source, copied

# For each torch function that needs no copy, its handler (see handlers.py).
_HANDLERS, implements = registry()
# These are the functions that models read a matrix with.
READS = _HANDLERS.keys()


class PatchedWeight(Lazy):
    """A `(V, D)` weight with k rows replaced, or the `(D, V)` transpose of one; `patch` makes it.

    `source.uses()` is the set of the ways in which it was read: `"lookup"`, `"product"`, `"dense"`.
    """

    source: Source
    transposed: bool

    @property
    def deferred(self) -> bool:
        """Whether it reads the frozen matrix in place, and holds no copy."""
        return self.source.copy is None

    @property
    def frozen(self) -> Tensor:
        """The frozen matrix, which has its dtype, device and layout (and shape, but new tokens)."""
        return self.source.base.mT if self.transposed else self.source.base

    def with_source(self, source: Source) -> PatchedWeight:
        """The weight of another source, transposed if this one is."""
        return _wrap(source, self.transposed)

    def transposed_view(self) -> PatchedWeight:
        """The transpose."""
        source = self.source
        if torch.compiler.is_dynamo_compiling():  # Dynamo makes no subclass of a given tensor
            source = source.over(source.base, source.rows)
        return _wrap(source, not self.transposed)

    def _by_now(self, *, read: bool) -> PatchedWeight:
        """The weight over the matrix that an engine has gathered; any other weight unchanged."""
        by_now = self.source.gathered
        return self if by_now is None else self.with_source(by_now(self.source, read))

    def over(self, matrix: Tensor) -> PatchedWeight:
        """The same rows over the tensor that stands for the matrix while the model is exported."""
        source = self.source
        if source.copy is not None or is_fake(source.base):
            return self
        return self.with_source(source.over(matrix.detach(), source.rows))

    def with_own_reads(self) -> PatchedWeight:
        """A weight that notes its own reads: other calls may have the same one at the same time."""
        source = self.source._replace(reads=Reads(version_of(self.source.rows.values)))
        wants_grad = torch.is_grad_enabled() and source.rows.values.requires_grad
        # The placeholder may have been made under no_grad.
        stale = wants_grad and not source.placeholder.requires_grad
        # Under a transform the placeholder notes reads in the object that it was made with.
        if self.deferred and (stale or transforms_active()):
            if not (stale or self.source.uses()):
                return self
            source = source.over(source.base, source.rows)
        return _wrap(source, self.transposed)

    # What a Lazy does, of which this is a kind.

    def answering(self, question: Callable[..., Any]) -> Tensor:
        """The tensor that answers: the base for most questions, the NaN for autograd's history.

        With new tokens a tensor on meta answers for the size, which the base does not have.
        """
        if question in ANSWERED_BY_PLACEHOLDER:
            return self
        weight = self._by_now(read=False)
        source = weight.source
        if question not in SIZES or not source.new_tokens():
            return weight.frozen
        shape = source.height(), source.base.shape[1]
        sized = source.base.new_empty(shape, device=torch.device("meta"))
        return sized.mT if weight.transposed else sized

    def now(self) -> PatchedWeight:
        """The weight over what its engine has gathered, if one owns the matrix."""
        return self._by_now(read=True)

    def made(self) -> Tensor:
        """The patched matrix. It is not kept: the next read may be under another transform."""
        weight = self.now()
        source = weight.source
        source.check_and_note("dense")
        copy = source.rows.materialise(source.base) if source.copy is None else source.copy
        return copy.mT if self.transposed else copy

    def loses_writes(self) -> bool:
        """A deferred weight makes its matrix anew at each read: a write to it would be lost."""
        return self.deferred


class _TracedWeight(PatchedWeight):
    """A patched weight on fake tensors: a wrapper, whose `__torch_dispatch__` torch calls."""

    __torch_dispatch__ = Lazy._dispatched  # type: ignore[assignment]


def is_deferred(value: Any, *, transposed: bool = False) -> bool:
    """Whether `value` is a deferred weight, and the transpose of one exactly if `transposed`."""
    return isinstance(value, PatchedWeight) and value.deferred and value.transposed is transposed


def frozen(value: Any) -> Any:
    """The base of a patched weight; any other value as it is."""
    return value.frozen if isinstance(value, PatchedWeight) else value


def patched(
    base: Tensor,
    rows: Rows,
    matrix: Matrix | None,
    *,
    dense: bool,
    defers: bool = False,
    copied_from: Sequence[Tensor] = (),
) -> PatchedWeight:
    """The weight with `rows` in place, copied at once (`dense`) or deferred.

    If `rows` are copies of other tensors (`copied_from`), a write to these makes the weight stale.
    The memory of a deferred weight is one NaN, expanded. So even code that bypasses the dispatcher
    gets an error or NaN, and never the base.
    """
    reads = Reads()
    copy = rows.materialise(base) if dense else None
    placeholder = matrix_placeholder(rows, base, reads) if copy is None else copy
    memory = None
    # torch.compile cannot read data pointers: the place in memory is left out there.
    if matrix is not None and not torch.compiler.is_dynamo_compiling():
        memory = memory_of(matrix.tensor)
    made_from = copied(*copied_from)
    if copy is not None:
        made_from = (*copied(base), *(made_from or copied(rows.values)))
    source = Source(base, rows, matrix, placeholder, copy, memory, made_from, defers, reads)
    return _wrap(source, transposed=False)


def _wrap(source: Source, transposed: bool) -> PatchedWeight:
    # The class is written by its name: torch.compile cannot trace this for a class in a variable.
    plain = source.placeholder.mT if transposed else source.placeholder
    fake = not torch.compiler.is_dynamo_compiling() and is_fake(plain)
    weight = wrapped(plain, _TracedWeight) if fake else plain.as_subclass(PatchedWeight)
    weight.source, weight.transposed = source, transposed
    return weight


PatchedWeight.handlers = _HANDLERS
