"""The examples in docstrings run, and each of the central functions has one."""

from __future__ import annotations

import doctest
import importlib
from pathlib import Path

import pytest
import torch

import ttfunc
from ttfunc.weight.product import product
from ttfunc.weight.rows import Rows

PACKAGE = Path(ttfunc.__file__).parent
MODULES = [
    "ttfunc." + ".".join(path.relative_to(PACKAGE).with_suffix("").parts)
    for path in sorted(PACKAGE.rglob("*.py"))
    if path.name not in {"__init__.py", "__main__.py"}
]
CENTRAL = [
    ttfunc.init_deltas,
    ttfunc.patch,
    ttfunc.functional_call,
    ttfunc.merge,
    ttfunc.stack,
    ttfunc.patch_mixed,
    ttfunc.TokenModule,
    Rows.lookup,
    product,
]


@pytest.mark.parametrize("name", MODULES)
def test_examples_give_what_they_say(name: str):
    module = importlib.import_module(name)
    names = {**vars(module), "torch": torch, "ttfunc": ttfunc}
    failed, _ = doctest.testmod(module, globs=names, raise_on_error=False)
    assert failed == 0


@pytest.mark.parametrize("function", CENTRAL, ids=lambda f: f.__qualname__)
def test_central_functions_show_an_example(function):
    assert ">>> " in function.__doc__
