"""How a patched weight was read in a call."""

from __future__ import annotations


class Reads:
    """How a weight was read, with a flag for each way.

    Compiled code sets a flag without reading it first, so that it also serves another weight.
    version: the version of the rows when the call began; None for a weight outside of a call.
    """

    def __init__(self, version: int | None = None) -> None:
        self.lookup = self.product = self.dense = False
        self.version = version
