"""The tokenizer that is saved into the copy of a checkpoint."""

from __future__ import annotations

import copy
import re
import shutil
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
import transformers

from tests.helpers.checkpoints import contents
from tests.helpers.llama import llama
from tests.helpers.rows import random_rows
from tests.helpers.tokenizers import tokenizer
from ttfunc import (
    TokenDeltas,
    functional_call,
    init_deltas,
    mean_of_pieces,
    merge_checkpoint,
    patch,
    save,
    unmerge_checkpoint,
)
from ttfunc.__main__ import main

NEW = ["<call>", "</call>"]


@pytest.fixture
def lesson(tmp_path):
    """A model and its tokenizer in a folder, the tokenizer with new tokens, and their rows."""
    before = tokenizer("byte-level BPE")
    model = llama(vocabulary=len(before))
    model.save_pretrained(tmp_path / "model")
    before.save_pretrained(tmp_path / "model")
    after = copy.deepcopy(before)
    after.add_tokens(NEW, special_tokens=True)
    params = random_rows(model, after.convert_tokens_to_ids(NEW), grow=True)
    return model, before, after, params


@pytest.mark.parametrize("how", ["tokenizer", "folder", "command"])
def test_a_merged_folder_has_all_that_the_new_tokens_need(how, lesson, tmp_path):
    model, before, after, params = lesson
    if how == "tokenizer":
        merge_checkpoint(tmp_path / "model", params, tmp_path / "merged", tokenizer=after)
    else:
        after.save_pretrained(tmp_path / "after")
        given = {"tokenizer": tmp_path / "after"}
        save(params, tmp_path / "rows.safetensors")
        names = [str(tmp_path / name) for name in ("model", "rows.safetensors", "merged", "after")]
        if how == "command":
            assert main(["merge", *names[:3], "--quiet", "--tokenizer", names[3]]) == 0
        else:
            merge_checkpoint(*names[:3], **given)
    loaded = transformers.AutoTokenizer.from_pretrained(tmp_path / "merged")
    merged = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    text = "a token<call> is one</call>"
    x = loaded(text, return_tensors="pt")["input_ids"]
    assert x.tolist() == [after(text)["input_ids"]]
    assert set(params.token_indices["model.embed_tokens.weight"].tolist()) < set(x[0].tolist())
    torch.testing.assert_close(merged(x).logits, functional_call(model, patch(params), x).logits)
    assert not [path for path in (tmp_path / "merged").iterdir() if path.name.startswith(".")]

    unmerge_checkpoint(tmp_path / "merged", params, tmp_path / "back", tokenizer=before)
    assert contents(tmp_path / "back") == contents(tmp_path / "model")


def test_a_reserved_token_gets_the_name_that_one_wants(lesson, tmp_path):
    model, before, *_ = lesson
    reserved = "<|reserved_special_token_0|>"
    before.add_tokens([reserved], special_tokens=True)
    token = before.convert_tokens_to_ids(reserved)
    folder = tmp_path / "tokenizer"
    before.save_pretrained(folder)
    for file in folder.glob("*.json"):  # as the page of existing tokens does
        file.write_text(file.read_text().replace(reserved, "<calc>"))
    after = transformers.AutoTokenizer.from_pretrained(folder)
    assert after("a <calc> b")["input_ids"].count(token) == 1
    assert after.decode([token]) == "<calc>"
    assert after.added_tokens_decoder[token].special
    model = llama(vocabulary=len(before))  # which has a row for it
    start = mean_of_pieces(before, after)
    (rows,) = init_deltas(model, [token], init=start).deltas.values()
    pieces = before.encode("<calc>")
    torch.testing.assert_close(rows[0], model.model.embed_tokens.weight[pieces].mean(0))


def test_files_in_folders_of_their_own_go_along(lesson, tmp_path):
    class Deep:
        def save_pretrained(self, folder: Path) -> None:
            (folder / "templates").mkdir(parents=True)
            (folder / "templates/tools.jinja").write_text("{{ tools }}")

    merge_checkpoint(tmp_path / "model", lesson[-1], tmp_path / "merged", tokenizer=Deep())
    assert (tmp_path / "merged/templates/tools.jinja").read_text() == "{{ tools }}"
    assert (tmp_path / "merged/tokenizer.json").exists()


@pytest.mark.parametrize("made", ["file", "folder"])
def test_no_file_of_the_source_is_in_the_way(made, lesson, tmp_path):
    taken = tmp_path / "model" / ".tokenizer"
    taken.write_text("its own") if made == "file" else taken.mkdir()
    merge_checkpoint(tmp_path / "model", lesson[-1], tmp_path / "merged", tokenizer=lesson[2])
    kept = tmp_path / "merged" / ".tokenizer"
    assert (kept.read_text() == "its own") if made == "file" else not [*kept.iterdir()]
    assert (tmp_path / "merged/tokenizer.json").exists()


def test_a_file_and_a_folder_of_one_name_are_refused(lesson, tmp_path):
    class Deep:
        def save_pretrained(self, folder: Path) -> None:
            (folder / "templates").mkdir(parents=True)
            (folder / "templates/tools.jinja").write_text("{{ tools }}")

    for taken in ("templates", "templates/tools.jinja/more"):
        source = tmp_path / taken.replace("/", "_")
        shutil.copytree(tmp_path / "model", source)
        (source / taken).parent.mkdir(parents=True, exist_ok=True)
        (source / taken).write_text("of the model")
        with pytest.raises(ValueError, match=r"would write \['templates/tools.jinja'\] over that"):
            merge_checkpoint(source, lesson[-1], tmp_path / "merged", tokenizer=Deep())
    assert not (tmp_path / "merged").exists()


def test_what_is_no_tokenizer_is_refused(lesson, tmp_path):
    model, _, after, params = lesson

    class Failing:
        def save_pretrained(self, folder: Path) -> None:
            after.save_pretrained(folder)
            raise OSError("the disk is full")

    def merged(source: str, params: TokenDeltas, tokenizer: object) -> None:
        merge_checkpoint(tmp_path / source, params, tmp_path / "merged", tokenizer=tokenizer)

    with pytest.raises(TypeError, match="list without save_pretrained: give a tokenizer of"):
        merged("model", params, ["<call>"])
    with pytest.raises(FileNotFoundError, match="no folder of a tokenizer at '.*nowhere'"):
        merged("model", params, tmp_path / "nowhere")
    with pytest.raises(ValueError, match="is one file, and a tokenizer needs a folder"):
        merged("model/model.safetensors", params, after)
    with pytest.raises(ValueError, match=r"write \['config.json', 'model.safetensors'\] over that"):
        merged("model", params, model)
    with pytest.raises(OSError, match="the disk is full"):
        merged("model", params, Failing())
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


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


@pytest.mark.parametrize("how", ["tokenizer", "folder"])
@pytest.mark.parametrize("ends", [2, [2, "new"], None])
def test_an_end_of_text_that_is_new_is_told_where_the_model_does_not_stop_at_it(
    how, ends, lesson, tmp_path
):
    model, _, after, params = lesson
    after.eos_token = NEW[1]
    new = after.eos_token_id
    model.generation_config.eos_token_id = [2, new] if isinstance(ends, list) else ends
    model.save_pretrained(tmp_path / "model")
    after.save_pretrained(tmp_path / "after")
    given = after if how == "tokenizer" else tmp_path / "after"
    told = re.escape(
        f"the tokenizer ends a text with the new token {new} ('</call>'), and "
        f"'generation_config.json' of the copy with {ends}"
    )
    with nullcontext() if isinstance(ends, list) else pytest.warns(UserWarning, match=told):
        merge_checkpoint(tmp_path / "model", params, tmp_path / "merged", tokenizer=given)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert loaded.generation_config.eos_token_id == model.generation_config.eos_token_id


def test_new_tokens_that_stay_in_the_tokenizer_of_an_unmerged_folder_are_told_of(lesson, tmp_path):
    _, before, after, params = lesson
    merge_checkpoint(tmp_path / "model", params, tmp_path / "merged", tokenizer=after)
    new = after.convert_tokens_to_ids(NEW)
    told = re.escape(f"keeps the tokens {new}, for which the matrices have no row any more")
    with pytest.warns(UserWarning, match=told):
        unmerge_checkpoint(tmp_path / "merged", params, tmp_path / "back")
    unmerge_checkpoint(tmp_path / "merged", params, tmp_path / "again", tokenizer=before)
