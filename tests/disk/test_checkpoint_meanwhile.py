"""A merge on disk while something else happens: changes, interruptions, kills."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers.checkpoints import names_in, saved
from tests.helpers.llama import llama
from ttfunc.disk.checkpoint import merge_checkpoint


def test_a_destination_that_appears_meanwhile_is_kept(tied, tmp_path):
    source, params = tied

    def meddle(done: int, total: int) -> None:
        if done == total:
            (tmp_path / "b").mkdir()

    with pytest.raises(FileExistsError, match="b'"):
        merge_checkpoint(source, params, tmp_path / "b", progress=meddle)
    assert names_in(tmp_path / "b") == []
    assert names_in(tmp_path) == ["b", "source"]


def test_a_source_that_changes_meanwhile(tied, tmp_path):
    source, params = tied
    other = saved(llama(tie=False), tmp_path / "other")

    def meddle(done: int, total: int) -> None:
        if (other / "model.safetensors").exists():
            (other / "model.safetensors").replace(source / "model.safetensors")

    with pytest.raises(ValueError, match=r"model.safetensors' was changed while it was copied"):
        merge_checkpoint(source, params, tmp_path / "b", progress=meddle)
    assert names_in(tmp_path) == ["other", "source"]


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit, RuntimeError, BrokenPipeError])
def test_an_interruption_leaves_nothing(error, tied, tmp_path):
    source, params = tied

    def stop(done: int, total: int) -> None:
        if done > total // 2:
            raise error("stop")

    with pytest.raises(error, match="^stop$"):
        merge_checkpoint(source, params, tmp_path / "b", progress=stop)
    assert names_in(tmp_path) == ["source"]


def test_a_thousand_kills():
    """In a process of its own, which forks: see tests/kills.py."""
    out = subprocess.run(
        [sys.executable, "-m", "tests.helpers.kills", "1000"],
        capture_output=True,
        text=True,
        check=False,
    )
    print(out.stdout)
    assert out.returncode == 0, out.stdout + out.stderr
    outcomes = json.loads(out.stdout.splitlines()[-1])
    assert sum(outcomes.values()) == 1000
    # They hit every stage: half of them die at lines of the source, which no slow machine moves.
    for stage in ("before", "copying", "writing", "complete", "after"):
        assert outcomes[stage] >= 4, stage


SOURCE = "model.safetensors"


def rewritten(path: Path) -> None:
    """Bytes in its middle change, and neither its size nor its header, nor its time."""
    status = path.stat()
    with path.open("r+b") as file:
        file.seek(-8, 2)
        file.write(b"rewrite!")
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


@pytest.mark.parametrize("when", ["before", "during", "after"])
@pytest.mark.parametrize("name", [SOURCE, "config.json", "later.json"])
def test_a_source_that_is_rewritten_meanwhile(name, when, tied, tmp_path):
    """In place; before, during or after the copy of the file."""
    source, params = tied
    (source / "a_first").write_bytes(b"12345678")
    (source / "z_last").write_bytes(b"12345678")
    told = []

    def meddle(done: int, total: int) -> None:
        told.append(done)
        moment = {"before": len(told) == 1, "during": len(told) == 2, "after": done == total}
        if moment[when]:
            (rewritten if (source / name).exists() else Path.touch)(source / name)

    with pytest.raises(ValueError, match=f"source(/{name})?' was changed while it was copied"):
        merge_checkpoint(source, params, tmp_path / "b", progress=meddle)
    assert names_in(tmp_path) == ["source"]


def test_a_file_alone_that_is_rewritten(tied, tmp_path):
    source, params = tied
    match = "model.safetensors' was changed while it was copied"
    with pytest.raises(ValueError, match=match):
        merge_checkpoint(
            source / SOURCE, params, tmp_path / "b", progress=lambda *_: rewritten(source / SOURCE)
        )
    assert names_in(tmp_path) == ["source"]
