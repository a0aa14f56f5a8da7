"""What a patched weight is made of, and how it was read."""

from __future__ import annotations

from typing import Any, NamedTuple, Protocol, Self

import torch
from torch import Tensor

from ttfunc.model.matrix import Matrix
from ttfunc.torch_private import version_of


class Reads:
    """How a weight was read, with a flag for each way.

    Compiled code sets a flag without reading it first, so that it also serves another weight.
    """

    def __init__(self) -> None:
        self.lookup = self.product = self.dense = False


class RowPatch(Protocol):
    """Replacement rows for a `(V, D)` base, and how to read the two as one matrix.

    grown: how many of the rows are new ones, behind the last of the base. by_example: each example
    of a batch has its own; the first dimension is the batch.
    """

    @property
    def values(self) -> Tensor: ...

    @property
    def grown(self) -> int: ...

    @property
    def by_example(self) -> bool: ...

    def lookup(self, tokens: Tensor, base: Tensor, padding_idx: int | None = None) -> Tensor:
        """`F.embedding` of the patched matrix."""

    def product(self, hidden: Tensor, base: Tensor, bias: Tensor | None = None) -> Tensor:
        """`F.linear` with the patched matrix."""

    def materialise(self, base: Tensor) -> Tensor:
        """The patched matrix itself. Raises RuntimeError if there is no single matrix."""

    def piece(self, base: Tensor, start: int, stop: int) -> Tensor:
        """The rows of the patched matrix from `start` to `stop`. Raises as `materialise`."""

    def placeholder(self, base: Tensor, reads: Reads) -> Tensor:
        """A NaN in the shape of the base, for code that bypasses `__torch_function__`.

        Such a read is noted in `reads`.
        """

    def map(self, func: Any) -> Self:
        """The rows after `func`, which acts on each row separately."""


class Source(NamedTuple):
    """What a patched weight is made of: a `(V, D)` base, and rows, cast to it when they are read.

    placeholder: the `(V, D)` tensor that code gets if it bypasses `__torch_function__`. copy: the
    patched matrix, if the weight is dense. memory: where the model's own matrix lay. made_from: the
    tensors that were copied to make the weight, each with its version then. defers: whether its
    products may wait, as deferred logits. reads: how the weight was read.
    """

    base: Tensor
    rows: RowPatch
    matrix: Matrix | None
    placeholder: Tensor
    copy: Tensor | None
    memory: tuple[object, ...] | None
    made_from: tuple[tuple[Tensor, int | None], ...]
    defers: bool
    reads: Reads

    @property
    def uses(self) -> set[str]:
        """The ways in which it was read: `"lookup"`, `"product"`, `"dense"`."""
        return {how for how, read in vars(self.reads).items() if read}

    def check_and_note(self, how: str) -> None:
        """Note a read. Raises ValueError where what was copied has been written to since."""
        traced = torch.compiler.is_dynamo_compiling()  # Dynamo does not trace versions
        if not traced and any(version_of(tensor) != known for tensor, known in self.made_from):
            raise ValueError(
                "stale patch: its rows, or the matrix, were written to since it was made (by a "
                "step of an optimizer, load_state_dict, or an embedding with max_norm), but it "
                "holds copies from before. Call patch (or patch_mixed) again for each step. A "
                "deferred patch of one adapter does not need this: it reads the current rows."
            )
        setattr(self.reads, how, True)
        if how == "lookup" and self.matrix is not None and not traced:
            self.matrix.looked_up = True


def versions(*tensors: Tensor) -> tuple[tuple[Tensor, int | None], ...]:
    """Each with its version; none under torch.compile."""
    if torch.compiler.is_dynamo_compiling():
        return ()
    return tuple((tensor, version_of(tensor)) for tensor in tensors)
