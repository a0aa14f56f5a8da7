"""What a patched weight is made of, how it was read, and whether its parts were written to."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ttfunc.model.matrix import Matrix
from ttfunc.model.memory import same_bits
from ttfunc.torch_private import in_backward, is_traced, transforms_active, version_of
from ttfunc.weight.placeholder import Reads, matrix_placeholder
from ttfunc.weight.rows import Rows

# At most this many tensors, and bytes of them in all, are compared with their copies at each read.
MOST_TENSORS, MOST_BYTES = 64, 1 << 20


class Copied(NamedTuple):
    """Tensors that were copied to make a weight, with their versions and values at that time.

    values: copies of all of them; empty if they are too many to compare at each read.
    """

    tensors: tuple[Tensor, ...]
    versions: tuple[int | None, ...]
    values: tuple[Tensor, ...]

    def written(self) -> bool:
        """Whether one was written to since, as far as versions and values show.

        Versions do not count writes to `tensor.data`, as some optimizers make, or through numpy.
        """
        if any(map(operator.ne, map(version_of, self.tensors), self.versions)):
            return True
        if not self.values or not _can_compare(*self.tensors):
            return False
        pairs = zip(self.tensors, self.values, strict=True)
        return any(one.dtype != was.dtype or _differs(one, was) for one, was in pairs)


class Source(NamedTuple):
    """What a patched weight is made of: a `(V, D)` base, and rows that are cast to it when read.

    placeholder: the `(V, D)` tensor that code gets if it bypasses `__torch_function__`. copy: the
    patched matrix, if the weight is dense. memory: where the model's matrix lay when the weight was
    made. made_from: the tensors that were copied to make it. defers: whether its products may be
    deferred logits. reads: how the weight was read. gathered: for a matrix that an engine owns, a
    function that returns the source over what the engine has gathered; its second argument says
    whether that is for a read, or for a question.
    """

    base: Tensor
    rows: Rows
    matrix: Matrix | None
    placeholder: Tensor
    copy: Tensor | None
    memory: tuple[object, ...] | None
    made_from: tuple[Copied, ...]
    defers: bool
    reads: Reads
    gathered: Callable[[Source, bool], Source] | None = None

    def over(self, base: Tensor, rows: Rows) -> Source:
        """The source with another base and other rows, and their placeholder."""
        placeholder = matrix_placeholder(rows, base, self.reads)
        return self._replace(base=base, rows=rows, placeholder=placeholder)

    def height(self) -> int:
        """The number of rows of the matrix, with new tokens."""
        return self.rows.height(self.base)

    def new_tokens(self) -> int:
        """The number of rows that the matrix has and its base does not."""
        return self.rows.new_tokens(self.base)

    def uses(self) -> set[str]:
        """The ways in which it was read: `"lookup"`, `"product"`, `"dense"`."""
        return {how for how, read in vars(self.reads).items() if read is True}

    def check_and_note(self, how: str) -> None:
        """Note a read.

        Raises ValueError if a tensor that the weight copied was written to since. Raises
        RuntimeError if the backward of a call (an autograd.Function, a checkpoint) reads rows that
        were written to since the call.
        """
        if not torch.compiler.is_dynamo_compiling():  # Dynamo does not trace versions
            if any(one.written() for one in self.made_from):
                raise _stale()
            since = self.reads.version
            if since is not None and version_of(self.rows.values) != since and in_backward():
                raise _late()
            if how == "lookup" and self.matrix is not None:
                self.matrix.looked_up = True
        setattr(self.reads, how, True)


def copied(*tensors: Tensor) -> tuple[Copied, ...]:
    """A record of the tensors as they are now; empty without tensors, and under torch.compile.

    It keeps their values if they are no more than `MOST_TENSORS` and `MOST_BYTES`.
    """
    if not tensors or torch.compiler.is_dynamo_compiling():
        return ()
    few = len(tensors) <= MOST_TENSORS and sum(one.nbytes for one in tensors) <= MOST_BYTES
    kept = tensors if few and _can_compare(*tensors) else ()
    values = tuple(one.detach().clone() for one in kept)
    return (Copied(tensors, tuple(map(version_of, tensors)), values),)


def _differs(now: Tensor, was: Tensor) -> bool:
    same = now.device == was.device and torch.equal(now, was)
    return not (same or same_bits(now, was))  # a NaN equals itself


def _can_compare(*tensors: Tensor) -> bool:
    """Whether the values can be read here, and no graph would contain that read."""
    if is_traced() or transforms_active():
        return False
    if any(type(one) not in (Tensor, nn.Parameter) or one.is_meta for one in tensors):
        return False
    return not (tensors[0].is_cuda and torch.cuda.is_current_stream_capturing())


def _stale() -> ValueError:
    return ValueError(
        "stale patch: its rows, or the matrix, were written to since it was made (by a step of an "
        "optimizer, load_state_dict, or an embedding with max_norm), but it holds copies from "
        "before. Call patch (or patch_mixed) again for each step. A deferred patch of one adapter "
        "does not need this: it reads the current rows."
    )


def _late() -> RuntimeError:
    return RuntimeError(
        "the backward of a call reads the rows, and they have been modified by an inplace "
        "operation since the call (a step of an optimizer, a clamp). Call backward before that, or "
        "call the model anew."
    )
