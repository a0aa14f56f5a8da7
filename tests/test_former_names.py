"""Names that version 0.1.0 had: an error says what replaces each."""

from __future__ import annotations

import pytest

import ttfunc
from tests.helpers.models import make
from ttfunc import init_deltas

REPLACED = {
    "ExportableMixed": r"Exportable\(model, assignment=True\)",
    "lora_bytes": "save_as_lora",
}


@pytest.mark.parametrize("name", REPLACED)
def test_a_former_name_says_what_replaces_it(name: str):
    match = f"ttfunc.{name} is no longer there. .*{REPLACED[name]}"
    with pytest.raises(AttributeError, match=match):
        getattr(ttfunc, name)
    with pytest.raises(ImportError, match=match):
        exec(f"from ttfunc import {name}")  # noqa: S102
    assert not hasattr(ttfunc, name)
    assert name not in ttfunc.__all__


def test_other_names_are_unknown_as_in_any_module():
    with pytest.raises(AttributeError, match="module 'ttfunc' has no attribute 'nothing'"):
        ttfunc.nothing  # noqa: B018
    with pytest.raises(ImportError, match="cannot import name 'nothing'"):
        exec("from ttfunc import nothing")  # noqa: S102
    assert all(hasattr(ttfunc, name) for name in ttfunc.__all__)


def test_the_rows_of_token_deltas_are_in_its_specs():
    params = init_deltas(make("tied"), [3])
    with pytest.raises(AttributeError, match=r"'rows'.* params.deltas, .* params.specs"):
        params.rows  # noqa: B018
    assert not hasattr(params, "rows")
