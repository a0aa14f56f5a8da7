"""Train a few token rows of a frozen model, functionally."""

from ttfunc.call import functional_call
from ttfunc.deltas import TokenDeltas, combine
from ttfunc.init import init_deltas
from ttfunc.merge import merge, unmerge
from ttfunc.patch import patch
from ttfunc.summary import Summary, summary
from ttfunc.weight import PatchedWeight

__version__ = "0.1.0"

__all__ = [
    # the rows, and where they come from
    "TokenDeltas",
    "init_deltas",
    "combine",
    # the call
    "PatchedWeight",
    "patch",
    "functional_call",
    # state dicts
    "merge",
    "unmerge",
    # what is trained
    "Summary",
    "summary",
]
