"""The patched weight: how it is read without a copy, and what happens where it cannot be."""

from ttfunc.weight import handlers as handlers  # the import registers them
