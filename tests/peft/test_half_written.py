"""What a save leaves in a folder that has an adapter: that one or the new one, never two halves."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from tests.helpers.oracle import same_bits
from tests.helpers.peft_folders import files_of, save_with_peft
from tests.helpers.peft_reference import IDX, peft_of, toy
from tests.helpers.rows import random_rows
from ttfunc import load_peft, save_peft


def test_another_adapter_is_not_lost(saved: Path, tmp_path):
    model = toy("llama_tied")
    (saved / "tokenizer.json").write_text("{}")
    params = random_rows(model, [1, 2], seed=1)
    save_peft(params, saved)
    assert same_bits(load_peft(saved, model).deltas, params.deltas)
    assert sorted(files_of(saved)) == [
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
        "tokenizer.json",
    ]
    lora = save_with_peft(peft_of(model, IDX, lora=True), tmp_path / "lora")
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    (foreign / "adapter_config.json").write_text("{}")
    for directory in (lora, foreign):
        before = files_of(directory)
        with pytest.raises(FileExistsError, match="not of token rows alone, and would be lost"):
            save_peft(params, directory)
        assert files_of(directory) == before
    with pytest.raises(FileExistsError, match="is a file. Name a directory"):
        save_peft(params, foreign / "adapter_config.json")


@pytest.mark.parametrize("there", [True, False], ids=["replaced", "new"])
@pytest.mark.parametrize("step", [1, 2], ids=["weights", "config"])
def test_no_half_adapter_is_left(step: int, there: bool, saved: Path, tmp_path, monkeypatch):
    directory = saved if there else tmp_path / "new"
    before, fsync, calls = files_of(saved), os.fsync, []

    def full(descriptor: int) -> None:
        calls.append(descriptor)
        if len(calls) == step:
            raise OSError(errno.ENOSPC, "No space left on device")
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        save_peft(random_rows(toy("llama_tied"), [1, 2]), directory)
    assert files_of(saved) == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter"]


def test_an_interruption_between_the_files_leaves_the_old_adapter(saved: Path, monkeypatch):
    before = files_of(saved)
    replaced, replace_file = [], Path.replace

    def killed(path: Path, target: Path) -> None:
        if replaced:
            raise KeyboardInterrupt
        replaced.append(replace_file(path, target))

    monkeypatch.setattr(Path, "replace", killed)
    params = random_rows(toy("llama_tied"), [1, 2, 3])
    with pytest.raises(KeyboardInterrupt):
        save_peft(params, saved)
    monkeypatch.undo()
    assert files_of(saved) == before
    save_peft(params, saved)
    assert same_bits(load_peft(saved, toy("llama_tied")).deltas, params.deltas)
