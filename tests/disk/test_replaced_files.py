"""What becomes of the file that was there: whole or as it was, with its permissions and links."""

from __future__ import annotations

import errno
import os
import resource
import stat
from pathlib import Path

import pytest

from tests.helpers.checkpoints import names_in
from tests.helpers.models import make
from tests.helpers.rows import random_rows
from tests.helpers.rows_files import IDX, same
from ttfunc.disk.load import load
from ttfunc.disk.rows_file import read, save


def test_the_file_is_made_with_the_usual_permissions(tmp_path):
    (tmp_path / "any").touch()
    save(random_rows(make("tied"), IDX), tmp_path / "rows")
    assert (tmp_path / "rows").stat().st_mode == (tmp_path / "any").stat().st_mode


def test_a_file_that_is_replaced_keeps_its_permissions_and_the_links_to_it(tmp_path):
    model = make("tied")
    file, link = tmp_path / "rows.safetensors", tmp_path / "latest"
    save(random_rows(model, IDX), file)
    file.chmod(0o640)
    link.symlink_to(file.name)
    params = random_rows(model, IDX)
    save(params, link)
    assert link.is_symlink()
    assert stat.S_IMODE(file.stat().st_mode) == 0o640
    assert same(load(file, model), params)
    assert names_in(tmp_path) == ["latest", "rows.safetensors"]


@pytest.mark.parametrize("where", ["nowhere/rows", ".", "blocked/rows"])
def test_a_place_that_cannot_be_written(where: str, tmp_path):
    (tmp_path / "blocked").touch()
    with pytest.raises(OSError, match=r"is no place for a file: it is a folder, or"):
        save(random_rows(make("tied"), IDX), tmp_path / where)
    assert names_in(tmp_path) == ["blocked"]


@pytest.mark.parametrize("fails", ["fsync", "replace", "size"])
def test_the_old_file_outlives_a_failure(fails: str, tmp_path, monkeypatch):
    path = tmp_path / "rows"
    save(random_rows(make("tied"), IDX), path)
    before = path.read_bytes()

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    if fails == "size":
        resource.setrlimit(resource.RLIMIT_FSIZE, (200, limits[1]))
    else:
        monkeypatch.setattr(*{"fsync": (os, "fsync"), "replace": (Path, "replace")}[fails], full)
    try:
        with pytest.raises(OSError, match="No space left|File too large"):
            save(random_rows(make("tied", seed=1), IDX), path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert path.read_bytes() == before
    assert names_in(tmp_path) == ["rows"]


def test_a_device_or_a_pipe_is_not_replaced(tmp_path):
    """A terminal of this test's own, and not /dev/null, which root could really replace."""
    params, ends = random_rows(make("tied"), IDX), os.openpty()
    terminal = Path(os.ttyname(ends[1]))
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "to_pipe").symlink_to("pipe")
    (tmp_path / "to_terminal").symlink_to(terminal)
    (tmp_path / "loop").symlink_to("loop")
    before, mode = names_in(tmp_path), terminal.stat().st_mode
    for path in (terminal, *(tmp_path / name for name in before)):
        with pytest.raises(FileExistsError, match=r"is no place for a file: it is a (device|loop)"):
            save(params, path)
    assert names_in(tmp_path) == before
    assert (tmp_path / "pipe").is_fifo()
    assert (tmp_path / "loop").is_symlink()
    assert terminal.stat().st_mode == mode
    for end in ends:
        os.close(end)
    for name in before:
        with pytest.raises((ValueError, FileNotFoundError), match="is no file|there is no file"):
            read(tmp_path / name)


def test_a_symlink_to_what_is_not_there_yet_is_kept(tmp_path):
    (tmp_path / "link").symlink_to("rows")
    save(random_rows(make("tied"), IDX), tmp_path / "link")
    assert (tmp_path / "link").is_symlink()
    assert names_in(tmp_path) == ["link", "rows"]
    (tmp_path / "far").symlink_to("nowhere/rows")
    with pytest.raises(FileNotFoundError, match="there is no .*nowhere"):
        save(random_rows(make("tied"), IDX), tmp_path / "far")
