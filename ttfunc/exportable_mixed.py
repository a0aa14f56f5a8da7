"""An exported program for batches in which each example has its own adapter."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ttfunc.deltas import TokenDeltas
from ttfunc.exportable import Each, Exportable, has_values, kind_of
from ttfunc.mixing import adapter_numbers


class ExportableMixed(Exportable):
    """An `Exportable` for batches in which each example has its own adapter.

    >>> model = torch.nn.Embedding(100, 8)
    >>> program = ttfunc.ExportableMixed(model)
    >>> params = ttfunc.init_deltas(model, [3], init=torch.ones(1, 8))
    >>> rows, ids, assignment = program.inputs([params], [0, -1], rows=2, adapters=4)
    >>> program(rows, ids, assignment, torch.tensor([[3], [4]])).shape
    torch.Size([2, 1, 8])

    `forward(rows, ids, assignment, *args, **kwargs)`: `(n, k, D)` rows, `(n, k)` ids and `(B,)`
    int64, the adapter of each example; -1 is the plain model. As in `patch_mixed`, the examples are
    the first dimension of the batch. In a compiled program, an adapter that is not there is the
    plain model too.
    """

    _each_has_own = True

    def forward(self, rows: Each, ids: Each, assignment: Tensor, *args: Any, **kwargs: Any) -> Any:
        """What the model gives with these rows for each example. Raises as `check`."""
        self.check(rows, ids, assignment)
        named_rows, named_ids = self._by_name(rows), self._by_name(ids)
        count = next(iter(named_ids.values())).shape[0]
        plain = (assignment < 0) | (assignment >= count)
        number = torch.where(plain, 0, assignment)
        chosen = {name: one.index_select(0, number) for name, one in named_rows.items()}
        tokens = {
            name: torch.where(plain.unsqueeze(-1), -1, one.index_select(0, number))
            for name, one in named_ids.items()
        }
        return self._call(chosen, tokens, args, kwargs)

    def inputs(  # type: ignore[override]
        self,
        params: Sequence[TokenDeltas],
        assignment: Iterable[int] | Tensor,
        *,
        rows: int,
        adapters: int,
    ) -> tuple[Any, Any, Tensor]:
        """The rows and ids of up to so many adapters, and the assignment, each made up.

        Returns `(adapters, rows, D)` deltas, `(adapters, rows)` ids and the `(B,)` assignment.
        Raises as `Exportable.inputs`, and as `patch_mixed` for the assignment.
        """
        given = [params] if isinstance(params, TokenDeltas) else list(params)
        if not 0 < len(given) <= adapters:
            raise ValueError(
                f"give 1 to {adapters} adapters (adapters={adapters}), got {len(given)}."
            )
        for one in given:
            self._check_params(one, rows)
        numbers = adapter_numbers(assignment, len(given))
        values, ids = [], []
        for name in self.matrices:
            both = [self._padded(one, name, rows) for one in given]
            more = adapters - len(given)
            together = torch.stack([row for row, _ in both])
            values.append(nn.functional.pad(together, (0, 0, 0, 0, 0, more)))
            each = torch.stack([one for _, one in both])
            ids.append(nn.functional.pad(each, (0, 0, 0, more), value=-1))
        plain = [-1 if number == len(given) else number for number in numbers]
        return self._in_one(values), self._in_one(ids), ids[0].new_tensor(plain)

    def check(self, rows: Each, ids: Each, assignment: object) -> None:  # type: ignore[override]
        """As `Exportable.check`; also IndexError for an adapter that is not there."""
        super().check(rows, ids)
        counts = {name: one.shape[0] for name, one in self._by_name(ids).items()}
        first, *others = counts.values()
        if any(count != first for count in others):  # sizes in a trace have no hash
            raise ValueError(f"the ids have other numbers of adapters: {counts}. Give the same.")
        if not isinstance(assignment, Tensor) or assignment.dtype != torch.int64:
            raise TypeError(f"assignment must be an int64 tensor, got {kind_of(assignment)}.")
        if assignment.ndim != 1:
            raise ValueError(f"assignment must be (B,), got {tuple(assignment.shape)}.")
        if has_values(assignment):
            adapter_numbers(assignment, first)
