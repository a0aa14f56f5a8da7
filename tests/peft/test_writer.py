"""Replacing an adapter: beside neighbours, over an interrupt's remains, over what is no file."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from tests.helpers.checkpoints import names_in
from ttfunc import init_deltas, load_peft, save_peft
from ttfunc.peft import writer

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
FILES = [CONFIG, WEIGHTS]
ALL = ["README.md", *FILES]


@pytest.fixture
def model() -> nn.Module:
    return nn.ModuleDict({"embed": nn.Embedding(20, 4)})


@pytest.fixture
def saved(model, tmp_path) -> Path:
    save_peft(init_deltas(model, [1, 2]), tmp_path / "adapter")
    return tmp_path / "adapter"


def ids_in(directory: Path, model: nn.Module) -> list[int]:
    return load_peft(directory, model).token_indices["embed.weight"].tolist()


def test_what_an_interrupted_save_left_is_replaced(model, saved):
    """Of a killed one: rows without a config. Of one by an older ttfunc: halves that do not fit."""
    params = init_deltas(model, [5, 6, 7])
    (saved / CONFIG).unlink()
    save_peft(params, saved)
    assert ids_in(saved, model) == [5, 6, 7]
    config = json.loads((saved / CONFIG).read_text())
    (saved / CONFIG).write_text(json.dumps({**config, "token_indices": [1]}))
    with pytest.raises(ValueError, match=r"shape \(3, 4\), and \(1, 4\) is needed"):
        load_peft(saved, model)
    save_peft(params, saved)
    assert ids_in(saved, model) == [5, 6, 7]
    (saved / WEIGHTS).unlink()
    save_peft(params, saved)
    assert ids_in(saved, model) == [5, 6, 7]
    assert names_in(saved) == ALL


def test_what_cannot_be_read_is_kept_and_said_so(model, saved):
    for name in FILES:
        whole = (saved / name).read_bytes()
        (saved / name).write_bytes(whole[:-1])
        with pytest.raises(FileExistsError, match=rf"cannot be read, and would be lost: .*{name}"):
            save_peft(init_deltas(model, [3]), saved)
        assert (saved / name).read_bytes() == whole[:-1]
        (saved / name).write_bytes(whole)
    assert ids_in(saved, model) == [1, 2]


def test_weights_of_another_kind_without_a_config_are_kept(model, tmp_path):
    save_file({"base_model.model.a.lora_A.weight": torch.zeros(2)}, tmp_path / WEIGHTS)
    before = (tmp_path / WEIGHTS).read_bytes()
    with pytest.raises(FileExistsError, match="not of token rows alone, and would be lost"):
        save_peft(init_deltas(model, [3]), tmp_path)
    assert (tmp_path / WEIGHTS).read_bytes() == before
    (tmp_path / WEIGHTS).rename(tmp_path / "adapter_model.bin")
    with pytest.raises(FileExistsError, match="not of token rows alone, and would be lost"):
        save_peft(init_deltas(model, [3]), tmp_path)
    assert names_in(tmp_path) == ["adapter_model.bin"]


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("alone", [True, False], ids=["alone", "in an adapter"])
def test_a_pipe_is_not_waited_for(name: str, alone: bool, model, saved, tmp_path):
    directory = tmp_path / "new" if alone else saved
    directory.mkdir(exist_ok=True)
    (directory / name).unlink(missing_ok=True)
    os.mkfifo(directory / name)
    before = names_in(directory)
    with pytest.raises(FileExistsError, match=f"{name}' is no regular file, and is not replaced"):
        save_peft(init_deltas(model, [3]), directory)
    assert names_in(directory) == before
    assert (directory / name).is_fifo()
    with pytest.raises((ValueError, FileNotFoundError), match="is no file|no file of JSON|there i"):
        load_peft(directory, model)


def test_a_neighbour_who_saves_is_waited_for(model, saved, monkeypatch):
    """Whatever the directory holds meanwhile is not looked at."""
    neighbour = os.open(saved, os.O_RDONLY)
    fcntl.flock(neighbour, fcntl.LOCK_EX)
    whole = (saved / WEIGHTS).read_bytes()
    (saved / WEIGHTS).write_bytes(b"half")
    waited = []

    def finish(seconds: float) -> None:
        waited.append(seconds)
        if len(waited) == 3:
            (saved / WEIGHTS).write_bytes(whole)
            os.close(neighbour)

    monkeypatch.setattr(writer.time, "sleep", finish)
    save_peft(init_deltas(model, [5, 6, 7]), saved)
    assert len(waited) == 3
    assert ids_in(saved, model) == [5, 6, 7]


def test_a_wait_for_a_neighbour_can_be_interrupted(model, saved, monkeypatch):
    neighbour = os.open(saved, os.O_RDONLY)
    fcntl.flock(neighbour, fcntl.LOCK_EX)

    def interrupt(seconds: float) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(writer.time, "sleep", interrupt)
    with pytest.raises(KeyboardInterrupt, match="^$"):
        save_peft(init_deltas(model, [3]), saved)
    os.close(neighbour)
    assert ids_in(saved, model) == [1, 2]
    assert names_in(saved) == ALL


def test_a_directory_that_its_maker_removed_is_made_again(model, tmp_path, monkeypatch):
    """The maker fails while the other one has opened the directory, and waits."""
    flock, directory = fcntl.flock, tmp_path / "adapter"

    def removed(descriptor: int, how: int) -> None:
        monkeypatch.undo()
        directory.rmdir()
        flock(descriptor, how)

    monkeypatch.setattr(fcntl, "flock", removed)
    save_peft(init_deltas(model, [3]), directory)
    assert ids_in(directory, model) == [3]


CALLS = ("rename", "replace", "unlink")


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("there", [True, False], ids=["replaced", "new"])
def test_a_failure_at_each_step_leaves_the_old_or_the_new(call, there, model, saved, monkeypatch):
    """And where nothing was, nothing or the new."""
    directory = saved if there else saved.with_name("new")
    original, calls, step = getattr(Path, call), [], 0

    def act(path: Path, *args, **kwargs):
        calls.append(path)
        if len(calls) == step:
            raise OSError(errno.EIO, "Input/output error")
        return original(path, *args, **kwargs)

    while len(calls) >= step:
        calls.clear()
        step += 1
        with monkeypatch.context() as patched:
            patched.setattr(Path, call, act)
            with contextlib.suppress(OSError):
                save_peft(init_deltas(model, [5, 6, 7]), directory)
        if len(calls) < step or call == "unlink":
            assert ids_in(directory, model) == [5, 6, 7]
        else:
            assert (ids_in(directory, model) == [1, 2]) if there else not directory.exists()
            assert not there or names_in(directory) == ALL
        if there:
            save_peft(init_deltas(model, [1, 2]), directory)
    assert step > (there or call != "rename")  # where nothing was, nothing is set aside


def test_a_kill_leaves_one_adapter_or_none():
    """In a process of its own, which forks: see tests/kills.py."""
    out = subprocess.run(
        [sys.executable, "-m", "tests.helpers.kills", "150", "save_peft"],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert out.returncode == 0, out.stdout + out.stderr
    outcomes = json.loads(out.stdout.splitlines()[-1])
    assert sum(outcomes.values()) == 150
    assert outcomes["old"] >= 4 <= outcomes["new"]
