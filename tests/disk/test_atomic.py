"""Copies that appear whole or not at all: on full disks, in folders that cannot be written."""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from tests.helpers.checkpoints import contents, names_in
from ttfunc.disk import atomic
from ttfunc.disk.atomic import copy_file, rename_new, stage


def copy(source: Path, destination: Path) -> None:
    for _ in copy_file(source, destination, []):
        pass


def failing(code: int):
    def fail(*arguments: object) -> int:
        raise OSError(code, os.strerror(code))

    return fail


KERNELS = {
    "as it is": None,
    "another file system": failing(errno.EXDEV),
    "an old kernel": failing(errno.ENOSYS),
    "nothing is copied": lambda *arguments: 0,
    "a little at a time": lambda a, b, n, i, j: os.pwrite(b, os.pread(a, min(n, 70_001), i), j),
}


@pytest.mark.parametrize("size", [0, 1, 2**20, 2**20 + 1, 3 * 2**20 + 5])
@pytest.mark.parametrize("kernel", KERNELS)
def test_a_copy_and_its_edits(kernel, size, tmp_path, monkeypatch):
    if KERNELS[kernel]:
        monkeypatch.setattr(os, "copy_file_range", KERNELS[kernel])
    raw = bytearray(os.urandom(size))
    (tmp_path / "a").write_bytes(raw)
    (tmp_path / "a").chmod(0o640)
    edits = [(size // 2, b"xyz"[:size]), (0, b"w"[:size])]
    told = list(copy_file(tmp_path / "a", tmp_path / "b", [(o, memoryview(e)) for o, e in edits]))
    for offset, edit in edits:
        raw[offset : offset + len(edit)] = edit
    assert (tmp_path / "b").read_bytes() == raw
    assert (tmp_path / "b").stat().st_mode & 0o777 == 0o640
    assert sum(told) == size


def test_without_the_call_of_linux(tmp_path, monkeypatch):
    monkeypatch.delattr(os, "copy_file_range")
    monkeypatch.delattr(os, "posix_fadvise")
    (tmp_path / "a").write_bytes(b"abc")
    copy(tmp_path / "a", tmp_path / "b")
    assert (tmp_path / "b").read_bytes() == b"abc"


def test_a_file_is_never_written_over(tmp_path):
    (tmp_path / "a").write_bytes(b"abc")
    (tmp_path / "b").write_bytes(b"mine")
    with pytest.raises(FileExistsError, match="File exists, while copying.*a'"):
        copy(tmp_path / "a", tmp_path / "b")
    assert (tmp_path / "b").read_bytes() == b"mine"


def test_a_file_that_became_shorter(tmp_path, monkeypatch):
    (tmp_path / "a").write_bytes(b"abc")
    size = os.fstat

    def larger(descriptor: int) -> os.stat_result:
        fields = list(size(descriptor))
        fields[6] += 10
        return os.stat_result(fields)

    monkeypatch.setattr(atomic.os, "fstat", larger)
    with pytest.raises(OSError, match="ends at 3 of 13 bytes, while copying"):
        copy(tmp_path / "a", tmp_path / "b")


@pytest.mark.parametrize("kind", ["file", "folder", "empty", "dangling"])
@pytest.mark.parametrize("old", [False, True])
def test_a_rename_never_replaces(kind, old, tmp_path, monkeypatch):
    if old:  # systems without renameat2
        monkeypatch.setattr(atomic.ctypes, "CDLL", lambda *_, **__: object())
    (tmp_path / "a").mkdir()
    rename_new(tmp_path / "a", tmp_path / "b")
    match kind:
        case "file":
            (tmp_path / "c").write_text("mine")
        case "folder":
            (tmp_path / "c" / "mine").mkdir(parents=True)
        case "empty":
            (tmp_path / "c").mkdir()
        case "dangling":
            (tmp_path / "c").symlink_to("nowhere")
    with pytest.raises(FileExistsError, match="File exists.*c'"):
        rename_new(tmp_path / "b", tmp_path / "c")
    assert names_in(tmp_path) == ["b", "c"]


def test_the_temporary_name_is_recognisable_and_short_enough(tmp_path):
    for name in ("merged", "x" * 255, "é" * 127):
        seen: list[Path] = []
        stage(tmp_path / name, lambda partial, seen=seen: seen.append(partial) or partial.mkdir())
        (partial,) = seen
        assert partial.parent == tmp_path
        assert partial.name.startswith(f".{name[:50]}")
        assert partial.match(".*.ttfunc-????????.partial")
        assert (tmp_path / name).is_dir()
    assert len(names_in(tmp_path)) == 3


def test_two_at_once_do_not_meet(tmp_path):
    def first(partial: Path) -> None:
        partial.write_text("the first to end")

    def second(partial: Path) -> None:
        partial.mkdir()
        stage(tmp_path / "b", first)

    with pytest.raises(FileExistsError, match="b'"):
        stage(tmp_path / "b", second)
    assert names_in(tmp_path) == ["b"]
    assert (tmp_path / "b").read_text() == "the first to end"


MERGE = """
import os, resource, sys
from pathlib import Path
from ttfunc.disk.checkpoint import merge_checkpoint
from tests.helpers.checkpoints import written
from tests.helpers.models import make
from tests.helpers.rows import random_rows
model = make("tied")
folder = Path(sys.argv[1])
if not (folder / "source").exists():
    written(folder / "source", {{n: t.clone() for n, t in model.state_dict().items()}})
    (folder / "source" / "large.bin").write_bytes(bytes(2**20))
{then}
try:
    merge_checkpoint(folder / "source", random_rows(model), {destination})
except OSError as error:
    print(error.errno, error)
"""


def merge_in_a_process(folder: Path, then: str, destination: str) -> str:
    code = MERGE.format(then=then, destination=destination)
    command = [sys.executable, "-c", code, str(folder)]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout  # noqa: S603


def test_a_file_size_limit(tmp_path):
    then = "resource.setrlimit(resource.RLIMIT_FSIZE, (2**19, 2**19))"
    out = merge_in_a_process(tmp_path, then, "folder / 'merged'")
    assert out.startswith(f"{errno.EFBIG} ")
    assert "File too large, while copying" in out
    assert "large.bin" in out
    assert names_in(tmp_path) == ["source"]


def test_a_full_disk(tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=512k", "none", str(disk)]
    mounted = (
        shutil.which("mount")
        and not subprocess.run(  # noqa: S603
            mount, check=False, capture_output=True
        ).returncode
    )
    # Who may mount nothing still has a device that is always full.
    full = "os.copy_file_range = lambda *_: os.write(os.open('/dev/full', os.O_WRONLY), b'x')"
    try:
        then = "" if mounted else full
        out = merge_in_a_process(tmp_path, then, "folder / 'disk' / 'merged'")
        assert names_in(disk) == []
    finally:
        if mounted:
            subprocess.run(["umount", str(disk)], check=True)  # noqa: S603, S607
    assert out.startswith(f"{errno.ENOSPC} ")
    assert "No space left on device, while copying" in out
    assert len(contents(tmp_path / "source")) == 2


def test_a_folder_that_cannot_be_written():
    # Not in pytest's own folder, which others may not enter.
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "locked").mkdir()
        (folder / "locked").chmod(0o555)
        folder.chmod(0o755)
        then = "os.geteuid() or os.seteuid(65534)"  # root may write anywhere
        out = merge_in_a_process(folder, then, "folder / 'locked' / 'merged'")
        assert out.startswith(f"{errno.EACCES} ")
        assert "Permission denied" in out
        assert names_in(folder / "locked") == []
