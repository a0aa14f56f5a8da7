"""Arguments in another order: the error shows the right one, and nothing is written."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import ttfunc
from tests.helpers.checkpoints import contents, written
from tests.helpers.models import make, tokens
from tests.helpers.rows import random_rows
from ttfunc.__main__ import main

MERGE = "merge_checkpoint(source, params, destination)"
CASES: dict[str, tuple[str, Callable[[Any], object]]] = {
    "init_deltas": ("init_deltas(model, idx)", lambda a: ttfunc.init_deltas([1], a.model)),
    "functional_call": (
        "functional_call(model, patch(params), args)",
        lambda a: ttfunc.functional_call(a.weights, a.model, a.x),
    ),
    "functional_call, inputs first": (
        "functional_call(model, patch(params), args)",
        lambda a: ttfunc.functional_call(a.model, a.x, a.weights),
    ),
    "functional_call, no model": (
        "functional_call(model, patch(params), args)",
        lambda a: ttfunc.functional_call(a.x, a.weights, a.model),
    ),
    "patch": ("patch(params)", lambda a: ttfunc.patch(a.model, a.params)),
    "patch_mixed": (
        "patch_mixed(adapters, assignment)",
        lambda a: ttfunc.patch_mixed([0], [a.params]),
    ),
    "TokenModule": ("TokenModule(model, params)", lambda a: ttfunc.TokenModule(a.params, a.model)),
    "Exportable": ("Exportable(model)", lambda a: ttfunc.Exportable(a.params)),
    "summary": ("summary(model, params)", lambda a: ttfunc.summary(a.params, a.model)),
    "merge": ("merge(state_dict, params)", lambda a: ttfunc.merge(a.params, a.state)),
    "unmerge": ("merge(state_dict, params)", lambda a: ttfunc.unmerge(a.params, a.state)),
    "save": ("save(params, path)", lambda a: ttfunc.save(a.rows, a.params)),
    "save, a model": ("save(params, path)", lambda a: ttfunc.save(a.model, a.rows)),
    "load": ("load(path, model)", lambda a: ttfunc.load(a.model, a.rows)),
    "save_peft": (
        "save_peft(params, directory)",
        lambda a: ttfunc.save_peft(a.model, a.folder / "new"),
    ),
    "load_peft": ("load_peft(directory, model)", lambda a: ttfunc.load_peft(a.model, a.folder)),
    "save_as_lora": (
        "save_as_lora(params, directory)",
        lambda a: ttfunc.save_as_lora(a.model, a.folder / "new"),
    ),
    "rows, model, merged": (
        MERGE,
        lambda a: ttfunc.merge_checkpoint(a.rows, a.source, a.folder / "new"),
    ),
    "params, model, merged": (
        MERGE,
        lambda a: ttfunc.merge_checkpoint(a.params, a.source, a.folder / "new"),
    ),
    "model, merged, rows": (
        MERGE,
        lambda a: ttfunc.merge_checkpoint(a.source, a.folder / "new", a.rows),
    ),
    "rows, merged, model": (
        MERGE,
        lambda a: ttfunc.unmerge_checkpoint(a.rows, a.folder / "new", a.source),
    ),
    "model, model, merged": (
        MERGE,
        lambda a: ttfunc.merge_checkpoint(a.source, a.model, a.folder / "new"),
    ),
}


@pytest.fixture
def a(tmp_path: Path) -> SimpleNamespace:
    model = make("tied")
    params, state = random_rows(model), model.state_dict()
    source = written(tmp_path / "source", {n: t.clone() for n, t in state.items()})
    ttfunc.save(params, tmp_path / "rows.safetensors")
    return SimpleNamespace(
        **{"model": model, "params": params, "weights": ttfunc.patch(params), "x": tokens(7)},
        **{"state": state, "source": source, "folder": tmp_path},
        rows=tmp_path / "rows.safetensors",
    )


@pytest.mark.parametrize("case", CASES)
def test_the_order_is_told(case: str, a: SimpleNamespace):
    order, call = CASES[case]
    before = contents(a.folder)
    with pytest.raises((TypeError, ValueError, OSError), match=f"order is .*{re.escape(order)}"):
        call(a)
    assert contents(a.folder) == before


@pytest.mark.parametrize(
    ("arguments", "order"),
    [
        (["merge", "rows.safetensors", "source", "new"], "MODEL ROWS MERGED"),
        (["merge", "rows.safetensors", "new", "source"], "MODEL ROWS MERGED"),
        (["merge", "source", "new", "rows.safetensors"], "MODEL ROWS MERGED"),
        (["merge", "new", "source", "rows.safetensors"], "MODEL ROWS MERGED"),
        (["unmerge", "rows.safetensors", "source", "new"], "MODEL ROWS MERGED"),
        (["info", "tokenizer"], "info ROWS --tokenizer FOLDER"),
        (["info", "source", "--model", "rows.safetensors"], "info ROWS --model FOLDER"),
    ],
)
def test_the_order_is_told_on_the_command_line(
    arguments: list[str], order: str, a: SimpleNamespace, monkeypatch, capsys
):
    monkeypatch.chdir(a.folder)
    (a.folder / "tokenizer").mkdir()
    (a.folder / "tokenizer" / "tokenizer.json").write_text("{}")
    before = contents(a.folder)
    assert main(arguments) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert f"order is {order}" in line or f"{order} on the command line" in line
    assert contents(a.folder) == before


def test_other_files_are_not_taken_for_rows(a: SimpleNamespace, tmp_path: Path):
    """What is no file of rows gets the error that it had."""
    (tmp_path / "text").write_text("no rows")
    with pytest.raises(FileExistsError, match=r"never overwritten. Give a new name, or remove it"):
        ttfunc.merge_checkpoint(a.source, a.rows, tmp_path / "text")
    with pytest.raises(ValueError, match="'.*text' is no safetensors file"):
        ttfunc.merge_checkpoint(tmp_path / "text", a.rows, tmp_path / "new")


def test_a_model_of_another_class_is_told_of():
    with pytest.raises(TypeError, match=r"must be a torch.nn.Module, got Tensor. The order is Tok"):
        ttfunc.TokenModule(torch.ones(1), None)  # type: ignore[arg-type]
