"""`ttfunc info` with a tokenizer and a model, of every kind of file that has trained rows."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import optree
import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from tests.helpers.checkpoints import written
from tests.helpers.llama import llama
from tests.helpers.models import D, V, make
from tests.helpers.rows import random_rows
from tests.helpers.tokenizers import tokenizer
from tests.rows.test_inspecting import cells, slowly
from ttfunc import TokenModule, __version__, load, merge_checkpoint, save, save_peft
from ttfunc.__main__ import main
from ttfunc.disk import inspected
from ttfunc.rows.inspecting import text_with

NAME = "embed_tokens.weight"
IDS = [V, 7, 3]


def stored(model: nn.Module) -> dict[str, Tensor]:
    """As transformers saves a model: what is tied, once."""
    distinct = {
        id(one): (name, one) for name, one in reversed(model.state_dict(keep_vars=True).items())
    }
    return {name: one.detach().clone() for name, one in distinct.values()}


def called(capsys, *arguments: object) -> list[list[str]]:
    """The tables that `info` prints, each with its header."""
    capsys.readouterr()  # what saving a model printed
    assert main(["info", *map(str, arguments)]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    found: list[list[str]] = []
    for line in out.splitlines():
        if line.split()[:1] == ["id"]:
            found.append([line])
        elif found and line.startswith("    ") and line.split()[0].isdigit():
            found[-1].append(line)
    return found


@pytest.mark.parametrize("case", ["tied", "untied", "biased"])
@pytest.mark.parametrize("sharded", [False, True])
def test_of_a_file_of_rows(case: str, sharded: bool, tmp_path: Path, capsys, monkeypatch):
    model = make(case)
    params = optree.tree_map(lambda row: row + 1, random_rows(model, IDS, grow=True))
    save(params, tmp_path / "rows")
    state = stored(model)
    source = written(tmp_path / "model", {} if sharded else state)
    for number, (name, one) in enumerate(state.items() if sharded else ()):
        save_file({name: one}, source / f"model-{number}.safetensors")
    opened, real = [], inspected.opened
    monkeypatch.setattr(inspected, "opened", lambda path: opened.append(path) or real(path))
    found = called(capsys, tmp_path / "rows", "--model", source)
    assert len(found) == len(opened) == len(params.deltas)  # no file but those of the matrices
    for lines, (name, delta) in zip(found, params.deltas.items(), strict=True):
        matrix = model.get_parameter(name).detach()
        expected = slowly(IDS, delta, params.originals[name], matrix)
        assert [row[1:] for row in cells(lines)] == expected


@pytest.fixture
def known(tmp_path: Path) -> Path:
    """The folder of a tokenizer."""
    tokenizer("byte-level BPE").save_pretrained(tmp_path / "tokenizer")
    return tmp_path / "tokenizer"


def test_of_a_file_from_before_starts_were_kept(known: Path, capsys):
    file = Path(__file__).parent / "disk" / "rows_of_0_1_0" / "new_tied.safetensors"
    (lines,) = called(capsys, file, "--tokenizer", known)
    moved = {int(row[0]): row[2] for row in cells(lines)}
    assert moved[6] == moved[7] == "?"  # new ones
    rows, kept = (load_file(file)[f"{part}/{NAME}"][1] for part in ("deltas", "originals"))
    assert moved[2] == f"{float((rows - kept).norm() / kept.norm()):.2f}"


def test_the_text_is_that_of_the_tokenizer(known: Path, tmp_path: Path, capsys):
    model = llama(vocabulary=330)
    save(random_rows(model, [300, 330], grow=True), tmp_path / "rows")
    model.save_pretrained(tmp_path / "model")
    text = tokenizer("byte-level BPE").decode([300])
    (lines,) = called(capsys, tmp_path / "rows", "--tokenizer", known)
    assert [row[1] for row in cells(lines)] == [repr(text), "(no token)"]
    (lines,) = called(capsys, tmp_path / "rows", "--model", tmp_path / "model")
    assert "text" not in lines[0]
    assert re.match(r"\d+ -?\d\.\d\d, ", cells(lines)[0][4])
    other = tokenizer("byte-level BPE")
    other.add_tokens(["<new>"])
    other.save_pretrained(tmp_path / "model")
    (lines,) = called(capsys, tmp_path / "rows", "--model", tmp_path / "model")  # it has its own
    assert cells(lines)[1][1] == "'<new>'"
    (lines,) = called(
        capsys, tmp_path / "rows", "--model", tmp_path / "model", "--tokenizer", known
    )
    assert cells(lines)[1][1] == "(no token)"


def test_of_rows_alone_the_last_line_says_what_each_option_adds(known: Path, tmp_path, capsys):
    save(random_rows(make("tied")), tmp_path / "rows")
    assert main(["info", str(tmp_path / "rows")]) == 0
    last = capsys.readouterr().out.splitlines()[-1]
    assert re.search(r"--tokenizer FOLDER .*text.*moved.*--model FOLDER .*nearest", last)
    assert main(["info", str(tmp_path / "rows"), "--tokenizer", str(known)]) == 0
    assert "--model" not in capsys.readouterr().out


class _Unknowing:
    """As slow tokenizers of transformers do, it has the unknown token for an id it lacks."""

    unk_token, unk_token_id = "[UNK]", 0

    def convert_ids_to_tokens(self, token: int) -> str:
        return {7: "seven"}.get(token, "[UNK]")

    def decode(self, tokens: list[int]) -> str:
        return "".join(map(self.convert_ids_to_tokens, tokens))


def test_a_token_that_the_tokenizer_lacks_has_no_text():
    text = text_with(_Unknowing())
    assert [text(7), text(0), text(V)] == ["'seven'", "'[UNK]'", "(no token)"]


def test_the_tokenizer_is_the_one_of_the_folder_with_the_rows(known: Path, tmp_path, capsys):
    model = llama(vocabulary=330)
    params = optree.tree_map(lambda row: row + 1, random_rows(model, [300, 330], grow=True))
    save(params, tmp_path / "rows")
    model.save_pretrained(tmp_path / "model")
    tokenizer("byte-level BPE").save_pretrained(tmp_path / "model")
    longer = tokenizer("byte-level BPE")
    longer.add_tokens(["<new>"])
    merge_checkpoint(tmp_path / "model", params, tmp_path / "merged", tokenizer=longer)
    arguments = ["--model", str(tmp_path / "model")]
    assert main(["info", str(tmp_path / "rows"), *arguments]) == 0
    last = capsys.readouterr().out.splitlines()[-1]
    assert re.search(r"\(no token\): .*/model' lacks it.*--tokenizer FOLDER", last)
    for path, more in (("merged", []), ("rows", ["--tokenizer", str(tmp_path / "merged")])):
        assert main(["info", str(tmp_path / path), *arguments, *more]) == 0
        out = capsys.readouterr().out
        assert "'<new>'" in out
        assert "(no token)" not in out


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")  # transformers
@pytest.mark.parametrize("kind", ["ttfunc", "ttfunc's of two", "tokens", "lora"])
def test_of_an_adapter(kind: str, tmp_path: Path, known: Path, capsys):
    tie = kind != "ttfunc's of two"
    model = llama(tie=tie)
    model.save_pretrained(tmp_path / "model")
    targets = ["model.embed_tokens"] if tie else ["model.embed_tokens", "lm_head"]
    if kind.startswith("ttfunc"):
        params = random_rows(model, [7, 3], targets=targets)
        save_peft(params, tmp_path / "adapter")
        rows = dict(params.deltas)
    else:
        options = {"r": 1, "target_modules": ["q_proj"], "trainable_token_indices": [7, 3]}
        config = (
            peft.LoraConfig(**options)
            if kind == "lora"
            else peft.TrainableTokensConfig(token_indices=[7, 3])
        )
        wrapped = peft.get_peft_model(llama(), config)
        (delta,) = {
            id(one): one for n, one in wrapped.named_parameters() if "trainable_tokens_delta" in n
        }.values()
        with torch.no_grad():
            delta += 1
        wrapped.save_pretrained(tmp_path / "adapter")
        rows = {"model.embed_tokens.weight": delta.detach()}
    found = called(capsys, tmp_path / "adapter", "--model", tmp_path / "model")
    got = sorted([row[1:] for row in cells(lines)] for lines in found)
    expected = []
    for name, delta in rows.items():
        matrix = model.get_parameter(name).detach()
        expected.append(slowly([7, 3], delta, matrix[[7, 3]], matrix))
    assert got == sorted(expected)
    found = called(capsys, tmp_path / "adapter", "--tokenizer", known)
    assert {row[2] for lines in found for row in cells(lines)} == {"?"}


def test_of_what_a_trainer_saved(tmp_path: Path, known: Path, capsys):
    model = make("tied").requires_grad_(False)
    params = optree.tree_map(lambda row: row + 1, random_rows(model, IDS, grow=True))
    folder = written(tmp_path / "checkpoint", TokenModule(model, params).state_dict())
    written(tmp_path / "model", stored(model))
    starts = load(folder, model).originals[NAME]  # of the new row this is zeros: nothing is known
    for path in (folder, folder / "model.safetensors"):
        (lines,) = called(capsys, path, "--model", tmp_path / "model")
        expected = slowly(IDS, params.deltas[NAME], starts, model.embed_tokens.weight.detach())
        for row, slow in zip(cells(lines)[1:], expected[1:], strict=True):
            assert row[1:4] == slow[:3]
            assert row[5] == slow[4]
        assert cells(lines)[0][1:] == ("?", *expected[0][1:3], "?", expected[0][4])
    (lines,) = called(capsys, folder, "--tokenizer", known)
    assert [row[2] for row in cells(lines)] == ["?"] * 3


@pytest.mark.parametrize("case", ["tied", "untied"])
def test_of_a_merged_checkpoint_beside_the_one_before(
    case: str, tmp_path: Path, capsys, monkeypatch
):
    model = make(case)
    params = optree.tree_map(lambda row: row + 1, random_rows(model, [7, V, 3], grow=True))
    source = written(tmp_path / "model", stored(model))
    merge_checkpoint(source, params, tmp_path / "merged")
    found = called(capsys, tmp_path / "merged", "--model", source)
    expected = []
    for name, delta in params.deltas.items():
        starts = params.originals[name].clone()
        starts[1] = 0  # the row of the new token in the merged model does not say
        expected.append(
            slowly(
                [3, 7, V], delta[[2, 0, 1]], starts[[2, 0, 1]], model.get_parameter(name).detach()
            )
        )
    assert sorted([row[2:4] for row in cells(lines)] for lines in found) == sorted(
        [row[1:3] for row in slow] for slow in expected
    )
    assert sorted([row[1] for row in cells(lines)] for lines in found) == sorted(
        [*(row[0] for row in slow[:2]), "?"] for slow in expected
    )
    monkeypatch.setattr(inspected, "_MOST", 2)
    assert main(["info", str(tmp_path / "merged"), "--model", str(source)]) == 1
    assert "3 of 24 rows of" in capsys.readouterr().err


WRONG = {
    "no tokenizer": (["rows", "--tokenizer", "nope"], "no folder of a tokenizer at"),
    "a folder without one": (["rows", "--tokenizer", "model"], "cannot load a tokenizer from"),
    "no model": (["rows", "--model", "nope"], "no checkpoint at"),
    "another model": (["rows", "--model", "other"], "has none of the names .*body.weight"),
    "another width": (["rows", "--model", "wider"], "F32 of shape .23, 9.*floats of width 8"),
    "quantised": (["rows", "--model", "bytes"], "I8 of shape .23, 8.*floats of width 8"),
    "which rows": (["model", "--tokenizer", "tokenizer"], "which of its rows.*--model FOLDER"),
    "the same": (["model", "--model", "model"], "None differ"),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_cannot_be_told(case: str, tmp_path: Path, known: Path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model = make("tied")
    save(random_rows(model), tmp_path / "rows")
    written(tmp_path / "model", stored(model))
    written(tmp_path / "other", {"body.weight": torch.ones(2, 8)})
    written(tmp_path / "wider", {NAME: torch.ones(V, D + 1)})
    written(tmp_path / "bytes", {NAME: torch.ones(V, D, dtype=torch.int8)})
    arguments, reason = WRONG[case]
    assert main(["info", *arguments]) == 1
    out, err = capsys.readouterr()
    assert out == ""
    (line,) = err.splitlines()
    assert re.search(reason, line)


def test_links_that_leave_the_folder_are_followed(known: Path, tmp_path: Path, capsys):
    """As in a cache of files under their hashes: what is only read may lie anywhere."""
    model = make("tied")
    params = optree.tree_map(lambda row: row + 1, random_rows(model))
    save(params, tmp_path / "rows")
    store, linked = tmp_path / "store", written(tmp_path / "model", stored(model))
    store.mkdir()
    for number, file in enumerate([*linked.iterdir(), *known.iterdir()]):
        here = file.rename(store / f"{number}") if file.parent == linked else file
        (linked / file.name).symlink_to(here)
    (linked / "more").symlink_to(store)
    both = called(capsys, tmp_path / "rows", "--model", linked)
    assert both == called(capsys, tmp_path / "rows", "--model", linked, "--tokenizer", linked)
    assert len(both[0]) == 3
    assert main(["info", str(linked)]) == 0


def test_a_tokenizer_without_transformers(known: Path, tmp_path: Path, capsys, monkeypatch):
    save(random_rows(make("tied")), tmp_path / "rows")
    monkeypatch.setitem(sys.modules, "transformers", None)
    assert main(["info", str(tmp_path / "rows"), "--tokenizer", str(known)]) == 1
    assert "pip install transformers" in capsys.readouterr().err


def test_the_version(capsys):
    with pytest.raises(SystemExit, match="0"):
        main(["--version"])
    assert capsys.readouterr().out == f"ttfunc {__version__}\n"
