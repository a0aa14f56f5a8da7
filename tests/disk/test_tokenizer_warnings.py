"""What a merge, or its inverse, warns of where the tokenizer does not fit the copy."""

from __future__ import annotations

import json
import re
import shutil
from contextlib import nullcontext
from pathlib import Path

import pytest
import transformers

from tests.helpers.llama import llama
from tests.helpers.rows import random_rows
from ttfunc import merge_checkpoint, save, unmerge_checkpoint
from ttfunc.__main__ import main

UNKNOWN = r"does not have the new tokens \[330, 331\]: no text becomes one of them. .*tokenizer="


@pytest.mark.parametrize("how", ["beside", "given", "processor", "folder", "command"])
def test_a_tokenizer_without_the_new_tokens_is_told_of(how, lesson, tmp_path, capsys):
    _, before, after, params = lesson
    source, merged = tmp_path / "model", tmp_path / "merged"
    after.save_pretrained(tmp_path / "after")
    before.save_pretrained(tmp_path / "before")
    if how == "command":
        save(params, tmp_path / "rows")
        assert main(["merge", *map(str, (source, tmp_path / "rows", merged)), "--quiet"]) == 0
        assert re.search(UNKNOWN, capsys.readouterr().err)
        return
    processor = type(
        "Processor", (), {"tokenizer": before, "save_pretrained": before.save_pretrained}
    )
    given = {
        "beside": None,
        "given": before,
        "processor": processor(),
        "folder": tmp_path / "before",
    }
    with pytest.warns(UserWarning, match=UNKNOWN):
        merge_checkpoint(source, params, merged, tokenizer=given[how])
    assert (merged / "model.safetensors").exists()
    for known in (after, tmp_path / "after"):
        unmerge_checkpoint(merged, params, tmp_path / "back")
        merge_checkpoint(tmp_path / "back", params, tmp_path / "again", tokenizer=known)
        for made in ("back", "again"):
            shutil.rmtree(tmp_path / made)


@pytest.mark.parametrize(
    ("name", "text", "has"),
    [
        ("tokenizer.json", '{"model": {"vocab": [["a", -1.5]]}, "added_tokens": [{"id": 331}]}', 1),
        ("tokenizer.json", '{"model": {"vocab": {"a": 0, "b": 331}}, "added_tokens": []}', 1),
        ("tokenizer.json", '{"model": {"vocab": {"a": 0}}, "added_tokens": [{"id": 9}]}', 0),
        ("tokenizer_config.json", '{"added_tokens_decoder": {"331": {"content": "<call>"}}}', 1),
        ("tokenizer_config.json", '{"added_tokens_decoder": {"2": {"content": "</s>"}}}', 0),
        ("added_tokens.json", '{"<call>": 330, "</call>": 331}', 1),
        ("vocab.json", '{"a": 0}', 0),
        ("tokenizer.json", '{"model": 3}', 1),  # of a form of its own: nothing is said
        ("tokenizer.json", "\ud800", 1),
        ("README.md", "no tokenizer at all", 1),
    ],
)
def test_what_the_files_of_a_tokenizer_say(name: str, text: str, has: int, lesson, tmp_path):
    model, *_, params = lesson
    model.save_pretrained(tmp_path / "alone")
    (tmp_path / "alone" / name).write_bytes(text.encode(errors="surrogatepass"))
    expected = nullcontext() if has else pytest.warns(UserWarning, match=UNKNOWN)
    with expected:
        merge_checkpoint(tmp_path / "alone", params, tmp_path / "merged")


def set_end(folder: Path, name: str, end: object) -> None:
    """Write an `eos_token_id` into a file of a folder, or take it out."""
    said = json.loads((folder / name).read_text()) | {"eos_token_id": end}
    if end == "no entry":
        del said["eos_token_id"]
    (folder / name).write_text(json.dumps(said))


END = r"'.*source/{}' has eos_token_id {}, .* ends a text with token 331, .*Write 331 into {} of"


@pytest.mark.parametrize("how", ["given", "processor", "folder", "beside", "older folder"])
@pytest.mark.parametrize("file", ["generation_config.json", "config.json"])
def test_a_folder_that_would_not_stop_at_the_new_end_is_told_of(
    how: str, file: str, lesson, tmp_path
):
    source = shutil.copytree(tmp_path / "model", tmp_path / "source")
    _, _, after, params = lesson
    after.add_special_tokens({"eos_token": "</call>"})
    set_end(source, file, 2)
    if file == "config.json":
        (source / "generation_config.json").unlink()
    known = source if how == "beside" else tmp_path / "after"
    after.save_pretrained(known)
    if how == "older folder":  # which has the names of its tokens in files of their own
        (known / "special_tokens_map.json").write_text('{"eos_token": {"content": "</call>"}}')
        (known / "added_tokens.json").write_text(json.dumps(after.get_added_vocab()))
        (known / "tokenizer_config.json").write_text("{}")
        (known / "tokenizer.json").unlink()
    kind = type("Processor", (), {"tokenizer": after, "save_pretrained": after.save_pretrained})
    given = {"given": after, "processor": kind(), "beside": None}.get(how, known)
    with pytest.warns(UserWarning, match=END.format(file, 2, file)):
        merge_checkpoint(source, params, tmp_path / "merged", tokenizer=given)
    assert json.loads((tmp_path / "merged" / file).read_text())["eos_token_id"] == 2


@pytest.mark.parametrize(
    ("ends", "stops"),
    [
        ({"generation_config.json": 331, "config.json": 2}, True),
        ({"generation_config.json": [2, 331], "config.json": 2}, True),
        ({"generation_config.json": [2, 3], "config.json": 331}, False),
        ({"generation_config.json": None, "config.json": 331}, False),
        ({"generation_config.json": "no entry", "config.json": 331}, False),
    ],
)
def test_the_file_that_transformers_reads_says_where_a_text_ends(
    ends: dict[str, object], stops: bool, lesson, tmp_path
):
    source = shutil.copytree(tmp_path / "model", tmp_path / "source")
    _, _, after, params = lesson
    after.add_special_tokens({"eos_token": "</call>"})
    for name, one in ends.items():
        set_end(source, name, one)
    end = ends["generation_config.json"]
    says = re.escape(str(None if end == "no entry" else end))
    message = END.format("generation_config.json", says, "generation_config.json")
    with nullcontext() if stops else pytest.warns(UserWarning, match=message):
        merge_checkpoint(source, params, tmp_path / "merged", tokenizer=after)
    merged = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    found = merged.generation_config.eos_token_id
    assert (331 in (found if isinstance(found, list) else [found])) is stops


def test_a_row_to_spare_may_be_of_the_end(lesson, tmp_path):
    _, before, after, _ = lesson
    after.add_special_tokens({"eos_token": "</call>"})
    model = llama(vocabulary=len(after))
    source = tmp_path / "source"
    for part in (model, before):
        part.save_pretrained(source)
    params = random_rows(model, [331])
    assert params.specs["model.embed_tokens.weight"].grown == 0
    file = "generation_config.json"
    with pytest.warns(UserWarning, match=END.format(file, 2, file)):
        merge_checkpoint(source, params, tmp_path / "merged", tokenizer=after)


def test_an_end_that_was_not_trained_is_no_matter_of_a_merge(lesson, tmp_path):
    """Many tokenizers name another end than the model does; no merge changes that."""
    _, _, after, params = lesson
    after.add_special_tokens({"eos_token": "a"})
    merge_checkpoint(tmp_path / "model", params, tmp_path / "merged", tokenizer=after)


REMOVED = r"has the tokens \[330, 331\], .* no rows .*as it was before the new tokens: tokenizer="


@pytest.mark.parametrize("how", ["beside", "given", "folder", "command"])
def test_a_tokenizer_that_keeps_the_new_tokens_of_an_unmerged_folder_is_told_of(
    how: str, lesson, tmp_path, capsys
):
    _, _, after, params = lesson
    merged, back = tmp_path / "merged", tmp_path / "back"
    merge_checkpoint(tmp_path / "model", params, merged, tokenizer=after)
    after.save_pretrained(tmp_path / "after")
    if how == "command":
        save(params, tmp_path / "rows")
        assert main(["unmerge", *map(str, (merged, tmp_path / "rows", back)), "--quiet"]) == 0
        assert re.search(REMOVED, capsys.readouterr().err)
        return
    given = {"beside": None, "given": after, "folder": tmp_path / "after"}[how]
    with pytest.warns(UserWarning, match=REMOVED):
        unmerge_checkpoint(merged, params, back, tokenizer=given)
    assert (back / "tokenizer.json").read_bytes() == (merged / "tokenizer.json").read_bytes()
