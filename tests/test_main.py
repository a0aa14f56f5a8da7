"""The command line: what it prints, and how it fails."""

from __future__ import annotations

import os
import pty
import signal
import subprocess
import sys
import termios
from pathlib import Path

import peft
import pytest

from tests.helpers.checkpoints import contents, expected, names_in, written
from tests.helpers.llama import llama
from tests.helpers.models import make
from tests.helpers.rows import random_rows
from ttfunc import __main__, init_deltas
from ttfunc.__main__ import main
from ttfunc.disk.rows_file import read, save


@pytest.fixture
def folder(tmp_path) -> Path:
    model = make("tied")
    written(tmp_path / "source", {n: t.clone() for n, t in model.state_dict().items()})
    save(random_rows(model), tmp_path / "rows.safetensors")
    return tmp_path


def call(folder: Path, *arguments: str) -> int:
    """`main`, its arguments relative to `folder`."""
    first, *paths = arguments
    return main([first, *(p if p.startswith("-") else str(folder / p) for p in paths)])


def test_merge_and_unmerge(folder, capsys):
    assert call(folder, "merge", "source", "rows.safetensors", "merged") == 0
    out, err = capsys.readouterr()
    assert "merged into" in out
    assert "embed_tokens.weight = lm_head.weight" in out
    assert "2 of 23 × 8: 7, 3" in out
    assert err == ""
    assert call(folder, "unmerge", "merged", "rows.safetensors", "back") == 0
    assert "unmerged into" in capsys.readouterr().out
    params = read(folder / "rows.safetensors")
    assert contents(folder / "merged") == expected(folder / "source", params)
    assert contents(folder / "back") == contents(folder / "source")


def test_quiet(folder, capsys):
    assert call(folder, "merge", "source", "rows.safetensors", "merged", "--quiet") == 0
    assert capsys.readouterr() == ("", "")


def test_info_of_rows(folder, capsys):
    assert call(folder, "info", "rows.safetensors") == 0
    out = capsys.readouterr().out
    assert "2 trained rows" in out
    assert "embed_tokens.weight = lm_head.weight" in out
    assert "deltas    float32, 64 B" in out
    assert "originals float32, 64 B" in out


@pytest.mark.parametrize("path", ["source", "source/model.safetensors"])
def test_info_of_a_checkpoint(path, folder, capsys):
    assert call(folder, "info", path) == 0
    out = capsys.readouterr().out
    assert "4 tensors in 1 .safetensors files" in out
    assert "F32        1.7 KiB" in out
    assert "embed_tokens.weight  23 × 8 F32, 736 B" in out
    assert "body.weight" not in out


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")  # transformers
@pytest.mark.parametrize("lora", [False, True])
def test_info_of_an_adapter(lora, folder, capsys):
    kind = {"r": 1, "target_modules": ["q_proj"], "trainable_token_indices": [7, 3]}
    config = peft.LoraConfig(**kind) if lora else peft.TrainableTokensConfig(token_indices=[7, 3])
    peft.get_peft_model(llama(), config).save_pretrained(folder / "adapter")
    assert call(folder, "info", "adapter") == 0
    out = capsys.readouterr().out
    assert f"an adapter of PEFT's, {'LORA' if lora else 'TRAINABLE_TOKENS'}" in out
    assert "model.embed_tokens\n    rows      2 × 8: 7, 3\n    deltas    float32, 64 B" in out
    assert ("other tensors, such as" in out) == lora


WRONG = {
    "no source": (["merge", "nope", "rows.safetensors", "b"], "no checkpoint at"),
    "no rows": (["merge", "source", "nope", "b"], "there is no file"),
    "rows that are none": (["merge", "source", "source/model.safetensors", "b"], "cannot be"),
    "it exists": (["merge", "source", "rows.safetensors", "source"], "exists, and is never"),
    "names": (["merge", "other", "rows.safetensors", "b"], "none of the names"),
    "not finite": (["merge", "source", "nan.safetensors", "b"], "not finite"),
    "info of nothing": (["info", "nope"], "no checkpoint at"),
    "info of another adapter": (["info", "ia3"], "only ['TRAINABLE_TOKENS', 'LORA'] have"),
    "info of a broken file": (["info", "broken.safetensors"], "no safetensors file"),
}


@pytest.mark.parametrize("case", WRONG)
def test_an_error_is_one_line(case, folder, capsys):
    written(folder / "other", {})
    (folder / "broken.safetensors").write_bytes(b"123")
    params = random_rows(make("tied"))
    params.deltas["embed_tokens.weight"].fill_(float("nan"))
    save(params, folder / "nan.safetensors")
    (folder / "ia3").mkdir()
    (folder / "ia3" / "adapter_config.json").write_text('{"peft_type": "IA3"}')
    before = names_in(folder)
    arguments, reason = WRONG[case]
    assert call(folder, *arguments) == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("ttfunc: error: ")
    assert err.count("\n") == 1
    assert reason in err
    assert names_in(folder) == before


def test_a_warning_is_one_line(folder, capsys):
    (folder / "source" / "pytorch_model.bin").write_bytes(b"x")
    assert call(folder, "merge", "source", "rows.safetensors", "merged") == 0
    err = capsys.readouterr().err
    assert err.startswith("ttfunc: warning: ['pytorch_model.bin']")
    assert err.count("\n") == 1


@pytest.mark.parametrize("arguments", [[], ["merge"], ["melt"], ["info", "a", "b"]])
def test_wrong_usage(arguments, capsys):
    with pytest.raises(SystemExit, match="2"):
        main(arguments)
    assert "usage: ttfunc" in capsys.readouterr().err


def test_an_interruption(folder, capsys, monkeypatch):
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setitem(__main__.COMMANDS, "merge", interrupted)
    assert call(folder, "merge", "source", "rows.safetensors", "merged") == 130
    assert capsys.readouterr().err == "ttfunc: interrupted\n"


def test_without_tqdm(folder, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "tqdm", None)
    assert call(folder, "merge", "source", "rows.safetensors", "merged") == 0
    assert capsys.readouterr().err == ""


def test_as_a_program_on_a_terminal(folder):
    leader, follower = pty.openpty()
    termios.tcsetwinsize(follower, (24, 80))
    command = [sys.executable, "-m", "ttfunc", "merge", "source", "rows.safetensors", "merged"]
    root = str(Path(__file__).parents[1])
    done = subprocess.run(  # noqa: S603
        command,
        cwd=folder,
        stderr=follower,
        stdout=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": root},
        check=False,
    )
    os.close(follower)
    shown = os.read(leader, 10_000).decode()
    os.close(leader)
    assert done.returncode == 0
    assert "100%" in shown  # the bar
    failed = subprocess.run(  # noqa: S603
        command, cwd=folder, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": root}
    )
    assert failed.returncode == 1
    assert "Traceback" not in failed.stderr


@pytest.mark.parametrize("encoding", ["ascii", "latin-1"])
def test_an_output_that_knows_few_characters(encoding, folder):
    save(init_deltas(make("tied"), range(12)), folder / "many.safetensors")
    command = [sys.executable, "-m", "ttfunc", "merge", "source", "many.safetensors", "merged"]
    done = subprocess.run(  # noqa: S603
        command, cwd=folder, capture_output=True, check=False,
        env={**os.environ, "PYTHONIOENCODING": encoding, "PYTHONPATH": str(Path.cwd())},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert b"merged into merged" in done.stdout


def test_sigterm_cleans_up(folder, monkeypatch):
    def terminated(*_, **__):
        os.kill(os.getpid(), signal.SIGTERM)

    before, handler = names_in(folder), signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr("ttfunc.disk.checkpoint.copy_file", terminated)
    with pytest.raises(SystemExit, match="143"):
        call(folder, "merge", "source", "rows.safetensors", "merged")
    assert names_in(folder) == before
    assert signal.getsignal(signal.SIGTERM) is handler


def test_a_name_that_is_given_twice_is_wrong_usage(folder, capsys):
    before = names_in(folder)
    for other in ("w1", "w0"):
        options = ["--name=0.weight=w0", f"--name=0.weight={other}"]
        with pytest.raises(SystemExit, match="2"):
            call(folder, "merge", "source", "rows.safetensors", "merged", *options)
        assert f"'0.weight' is given twice, as 'w0' and '{other}'" in capsys.readouterr().err
    assert names_in(folder) == before


def test_a_loop_of_symlinks_is_an_error_of_one_line(folder, capsys):
    (folder / "loop").symlink_to("loop")
    before = names_in(folder)
    for arguments in (
        ("merge", "loop", "rows.safetensors", "merged"),
        ("merge", "source", "loop", "merged"),
        ("merge", "source", "rows.safetensors", "loop"),
        ("merge", "source", "rows.safetensors", "loop/merged"),
        ("unmerge", "loop/deep", "rows.safetensors", "merged"),
        ("info", "loop"),
        ("info", "loop/deep"),
    ):
        assert call(folder, *arguments) == 1
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith("ttfunc: error: ")
        assert "loop" in line
    assert names_in(folder) == before
