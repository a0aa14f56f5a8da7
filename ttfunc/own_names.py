"""Classes that list what ttfunc gives them, and not the hundreds of names that torch does.

`dir` of a class is what `help` shows of it, and an IDE of its name. `dir` of an instance lists all.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

_OF_TORCH = {*nn.Module.__mro__, *Tensor.__mro__}
_OF_TENSORS: Any = type(Tensor)


class OwnNames(type):
    """The metaclass of a class of modules."""

    def __dir__(cls) -> list[str]:
        own = {name for kind in cls.__mro__ if kind not in _OF_TORCH for name in vars(kind)}
        return sorted(name for name in own if not name.startswith("_"))


class OwnTensorNames(OwnNames, _OF_TENSORS):  # type: ignore[misc]
    """The metaclass of a class of tensors."""
