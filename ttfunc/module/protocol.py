"""A TokenModule, as the functions that serve it see it. Its class, which calls them, is above."""

from __future__ import annotations

from typing import Any, Protocol

from torch import Tensor, nn

from ttfunc.module.sizes import Sizes
from ttfunc.rows.deltas import TokenDeltas


class AnyTokenModule(Protocol):
    """What those functions use of a TokenModule. Its class says what each of these is."""

    base: nn.Module
    _modes: dict[nn.Module, bool] | None
    _sizes: Sizes

    def params(self) -> TokenDeltas: ...

    def state_dict(self) -> dict[str, Tensor]: ...

    def _replaced(self) -> dict[str, Tensor]: ...

    def _in_call(self) -> dict[int, Tensor]: ...

    def _call(self, args: Any, kwargs: Any, method: Any, at: nn.Module | None = None) -> Any: ...
