"""The tokenizer that is saved into the copy of a checkpoint."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
import transformers

from tests.helpers.checkpoints import contents
from tests.helpers.llama import llama
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
