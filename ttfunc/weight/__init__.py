"""The patched weight: how it is read without a copy, and what happens where it cannot be."""

# The imports register them.
from ttfunc.weight import handlers as handlers
from ttfunc.weight import logit_handlers as logit_handlers
