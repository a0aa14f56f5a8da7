"""The placeholder of a matrix that no rank has whole: it refuses what reads it."""

from __future__ import annotations

from torch import Tensor

from ttfunc.weight.placeholder import NaNPlaceholder


class Unreadable(NaNPlaceholder):
    """A NaN whose gradient goes to the rows, and which no operation can read."""

    @staticmethod
    def matrix(rows: Tensor, base: Tensor, ids: Tensor, grown: int) -> Tensor:
        raise RuntimeError(
            "a transform reads the token matrix of a sharded model past its patch. Leave the "
            "matrix out of the sharding (ignored_params of fully_shard), or use loss.backward()."
        )
