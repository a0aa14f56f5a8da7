"""Files where the system has less, or is stricter: as on macOS and on Windows, by their rules.

Neither was tried. Here a Linux refuses what they refuse.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import ttfunc.peft.writer
from tests.helpers.checkpoints import contents, leftovers
from tests.helpers.llama import llama
from tests.helpers.oracle import same_bits
from tests.helpers.rows import random_rows
from tests.helpers.tokenizers import tokenizer
from ttfunc import (
    init_deltas,
    load,
    load_peft,
    merge_checkpoint,
    save,
    save_as_lora,
    save_peft,
    unmerge_checkpoint,
)
from ttfunc.disk import atomic, rows_file
from ttfunc.model.origin import Origin, Sample


@pytest.fixture
def macos(monkeypatch):
    """No renameat2, no copy in the kernel, no advice to it."""
    for name in ("copy_file_range", "posix_fadvise"):
        monkeypatch.delattr(os, name)
    monkeypatch.setattr(atomic.ctypes, "CDLL", lambda *_, **__: object())


@pytest.fixture
def windows(monkeypatch):
    """A folder cannot be opened, a file that is open or mapped not renamed, replaced or removed."""
    real = SimpleNamespace(**{name: getattr(os, name) for name in dir(os) if name[0] != "_"})

    def open_(path, flags, *rest, **options):
        if Path(path).is_dir():
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return real.open(path, flags, *rest, **options)

    def fsync(descriptor):
        if fcntl.fcntl(descriptor, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDONLY:
            raise OSError(errno.EBADF, "Bad file descriptor")
        real.fsync(descriptor)

    def check_closed(*paths):
        held = Path("/proc/self/maps").read_text()
        for one in Path("/proc/self/fd").iterdir():
            with contextlib.suppress(FileNotFoundError):
                held += f"\n{one.readlink()}"
        for path in map(os.path.realpath, paths):
            if f"{path}\n" in f"{held}\n" or f"{path}/" in held:
                raise PermissionError(errno.EACCES, "being used by another process", path)

    def rename(old, new):
        check_closed(old)
        if os.path.lexists(new):
            raise FileExistsError(errno.EEXIST, "File exists", str(old), None, str(new))
        real.rename(old, new)

    def replace(old, new):
        check_closed(old, new)
        real.replace(old, new)

    def unlink(path, **options):
        if "dir_fd" not in options:
            check_closed(path)
        real.unlink(path, **options)

    def library(name, **_):
        if name is None:
            raise TypeError("LoadLibrary() argument 1 must be str, not None")

    for name in ("copy_file_range", "posix_fadvise", "O_NONBLOCK", "O_DIRECTORY"):
        monkeypatch.delattr(os, name)
    patches = {"open": open_, "fsync": fsync, "rename": rename, "replace": replace}
    for name, function in {**patches, "unlink": unlink}.items():
        monkeypatch.setattr(os, name, function)
    monkeypatch.setattr(atomic.ctypes, "CDLL", library)
    monkeypatch.setattr(atomic, "_IS_POSIX", False)
    monkeypatch.setattr(ttfunc.peft.writer, "fcntl", None)
    monkeypatch.setattr(shutil, "_use_fd_functions", False)


@pytest.fixture(params=["macos", "windows"])
def system(request):
    return request.getfixturevalue(request.param)


def test_rows_replace_those_that_were_there(system, tmp_path):
    model, path = llama(), tmp_path / "rows.safetensors"
    save(init_deltas(model, [3, 7]), path)
    there, after = load(path, model), random_rows(model)
    save(after, path)
    assert same_bits(load(path, model).deltas, after.deltas)
    assert not same_bits(there.deltas, after.deltas)
    assert leftovers(tmp_path) == []


def test_an_adapter_replaces_the_one_that_was_there(system, tmp_path):
    model = llama()
    for _ in range(2):
        params = random_rows(model)
        save_peft(params, tmp_path / "adapter")
        assert same_bits(load_peft(tmp_path / "adapter", model).deltas, params.deltas)
    assert leftovers(tmp_path / "adapter") == []
    assert save_as_lora(params, tmp_path / "lora") > 0


@pytest.mark.parametrize("shards", [False, True])
def test_a_checkpoint_is_merged_and_unmerged(system, shards, tmp_path):
    before, after = tokenizer("byte-level BPE"), tokenizer("byte-level BPE")
    after.add_tokens(["<call>"])
    model = llama(vocabulary=len(before))
    model.save_pretrained(tmp_path / "model", max_shard_size="1KB" if shards else "1GB")
    for one, name in ((before, "model"), (after, "after")):
        one.save_pretrained(tmp_path / name)
    params = random_rows(model, [len(before)], grow=True)
    merge_checkpoint(tmp_path / "model", params, tmp_path / "merged", tokenizer=tmp_path / "after")
    unmerge_checkpoint(tmp_path / "merged", params, tmp_path / "back", tokenizer=before)
    merged, back, source = (contents(tmp_path / name) for name in ("merged", "back", "model"))
    weights = [name for name in source if name.endswith(".safetensors")]
    assert back == source
    assert any(merged[name] != source[name] for name in weights)
    assert leftovers(tmp_path) == []


def test_a_checkpoint_that_fails_leaves_nothing(system, tmp_path):
    model = llama()
    model.save_pretrained(tmp_path / "model")

    def stop(done, total):
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        merge_checkpoint(tmp_path / "model", random_rows(model), tmp_path / "merged", progress=stop)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_the_files_of_a_tokenizer_may_be_in_folders(system, tmp_path):
    model = llama()
    model.save_pretrained(tmp_path / "model")
    (tmp_path / "tokenizer" / "more").mkdir(parents=True)
    (tmp_path / "tokenizer" / "more" / "words.txt").write_text("a")
    merge_checkpoint(
        tmp_path / "model",
        random_rows(model),
        tmp_path / "merged",
        tokenizer=tmp_path / "tokenizer",
    )
    assert contents(tmp_path / "merged")["more/words.txt"] == b"a"


def test_a_temporary_name_is_of_whole_characters(tmp_path):
    made: list[str] = []
    name = f"x{'é' * 127}"
    with contextlib.suppress(FileNotFoundError):  # nothing is made
        atomic.stage(tmp_path / name, lambda path: made.append(path.name))
    assert made[0].encode().decode().startswith(".xééé")


def test_the_package_is_imported_where_fcntl_is_not():
    code = (
        "import sys; sys.modules['fcntl'] = None\n"
        "import ttfunc, ttfunc.__main__, ttfunc.peft.writer as writer\n"
        "assert writer.fcntl is None"
    )
    subprocess.run([sys.executable, "-c", code], check=True)  # noqa: S603


def test_a_sample_of_the_matrix_is_written_from_a_device_without_float64():
    """As Apple's GPUs: their tensors raise TypeError for it."""

    class OfMps(torch.Tensor):
        def double(self):
            raise TypeError("Cannot convert a MPS Tensor to float64 dtype")

        def cpu(self):
            return self.as_subclass(torch.Tensor)

    numbers = torch.ones(2).as_subclass(OfMps)
    written = rows_file._origin_as_json(Origin(sample=Sample((0, 1), numbers)))
    assert written["sample"]["numbers"] == [1.0, 1.0]
