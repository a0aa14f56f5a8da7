"""The patched weight: an `index_copy` that has not happened yet."""

from ttfunc.weight import handlers as handlers  # the import registers them
