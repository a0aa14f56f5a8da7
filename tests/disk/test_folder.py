"""What is in a checkpoint folder: which files count, and what is refused by name."""

from __future__ import annotations

import json
import os
import warnings
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from tests.helpers.checkpoints import NAME, contents, names_in, tensors_of, written
from tests.helpers.models import D, V, make
from tests.helpers.rows import random_rows
from ttfunc.disk import folder
from ttfunc.disk.checkpoint import merge_checkpoint
from ttfunc.disk.folder import INDEX, open_checkpoint

KEY = "embed_tokens.weight"


@pytest.fixture
def model():
    return make("tied")


@pytest.fixture
def source(model, tmp_path) -> Path:
    """Two shards and their index."""
    folder = tmp_path / "source"
    folder.mkdir()
    save_file({KEY: model.embed_tokens.weight.data}, folder / "a.safetensors")
    save_file({"body.weight": model.body.weight.data}, folder / "b.safetensors")
    index = {
        "metadata": {"total_size": -1.5},
        "weight_map": {KEY: "a.safetensors", "body.weight": "b.safetensors"},
    }
    (folder / INDEX).write_text(json.dumps(index))
    return folder


def refused(source: Path, model, error, match: str) -> None:
    before, beside = contents(source), names_in(source.parent)
    with pytest.raises(error, match=match):
        merge_checkpoint(source, random_rows(model), source.parent / "merged")
    assert contents(source) == before
    assert names_in(source.parent) == beside


def test_the_headers_are_of_the_files_that_hold_the_model(source):
    found = open_checkpoint(source)
    assert {name: list(header) for name, header in found.headers.items()} == {
        "a.safetensors": [KEY],
        "b.safetensors": ["body.weight"],
    }
    assert found.size == sum(map(len, contents(source).values()))


def test_shards_in_a_folder_of_the_folder(source, model, tmp_path):
    (source / "shards").mkdir()
    (source / "a.safetensors").rename(source / "shards" / "a.safetensors")
    index = {"weight_map": {KEY: "shards/a.safetensors", "body.weight": "b.safetensors"}}
    (source / INDEX).write_text(json.dumps(index))
    params = random_rows(model)
    merge_checkpoint(source, params, tmp_path / "b")
    merged = tensors_of(tmp_path / "b" / "shards")[KEY]
    assert torch.equal(merged[[7, 3]], params.deltas[KEY])


OUTSIDE = [
    "../outside.safetensors",
    "shards/../../outside.safetensors",
    "{tmp_path}/outside.safetensors",
]


@pytest.mark.parametrize("name", OUTSIDE)
def test_an_index_that_leaves_the_folder(name, source, model, tmp_path):
    save_file({KEY: torch.zeros(V, D)}, tmp_path / "outside.safetensors")
    index = {"weight_map": {KEY: name.format(tmp_path=tmp_path)}}
    (source / INDEX).write_text(json.dumps(index))
    refused(source, model, ValueError, "names .*outside.safetensors', which is outside of")


def test_an_index_that_leaves_the_folder_through_a_symlink(source, model, tmp_path):
    (tmp_path / "elsewhere").mkdir()
    save_file({KEY: torch.zeros(V, D)}, tmp_path / "elsewhere" / "a.safetensors")
    (source / "link").symlink_to(tmp_path / "elsewhere")
    (source / INDEX).write_text(json.dumps({"weight_map": {KEY: "link/a.safetensors"}}))
    refused(source, model, ValueError, "source/link' is a symlink to a folder")


def test_a_shard_that_is_missing(source, model):
    (source / "b.safetensors").unlink()
    refused(source, model, FileNotFoundError, "names 'b.safetensors', and .* no such file")


BROKEN = {
    "": "not JSON",
    "[]": "no weight_map",
    "{}": "no weight_map",
    '{"weight_map": []}': "no weight_map",
    '{"weight_map": {}}': "no weight_map",
    '{"weight_map": {"a": 1}}': "names a file that is no string",
    '{"weight_map": {"a": "b.safetensors", "a": "a.safetensors"}}': "a key is in it more than once",
    '{"weight_map": {"a": "config.json"}}': "no such file",
    '{"weight_map": {"a": "notes.txt"}}': "notes.txt' is no safetensors file",
    "[" * 99_999: "nested too deeply",
    '"\\ud800"': "no weight_map",
    '{"\\ud800": 1}': "not UTF-8",
}


@pytest.mark.parametrize("text", BROKEN, ids=range(len(BROKEN)))
def test_a_broken_index(text, source, model):
    (source / "notes.txt").write_text("notes, of some length")
    (source / INDEX).write_text(text)
    refused(source, model, (ValueError, FileNotFoundError), BROKEN[text])


def test_an_index_longer_than_any(source, model):
    with (source / INDEX).open("wb") as file:
        file.truncate(2**40)  # takes no room on the disk
    before = names_in(source)
    with pytest.raises(ValueError, match="longer than 100000000 bytes"):
        merge_checkpoint(source, random_rows(model), source.parent / "merged")
    assert names_in(source) == before


def test_a_shard_that_is_damaged(source, model):
    raw = (source / "b.safetensors").read_bytes()
    (source / "b.safetensors").write_bytes(raw[:-1])
    refused(source, model, ValueError, "source/b.safetensors' has a broken .* header")


def test_every_truncation_of_a_checkpoint(source, model):
    raw = (source / "a.safetensors").read_bytes()
    for end in range(len(raw)):
        (source / "a.safetensors").write_bytes(raw[:end])
        with pytest.raises(ValueError, match="a.safetensors' (is no|has a broken) safetensors"):
            merge_checkpoint(source, random_rows(model), source.parent / "merged")
    assert names_in(source.parent) == ["source"]


def test_a_folder_without_safetensors(model, tmp_path):
    (tmp_path / "source").mkdir()
    (tmp_path / "source" / "pytorch_model.bin").write_bytes(b"x")
    match = r"no .safetensors file, only \['pytorch_model.bin'\].*save_pretrained"
    refused(tmp_path / "source", model, FileNotFoundError, match)


def test_things_that_are_no_files(source, model):
    (source / "x").symlink_to("nowhere")
    refused(source, model, ValueError, "source/x' is neither a file nor a symlink to one")
    (source / "x").unlink()
    (source / "x").symlink_to("x")
    refused(source, model, ValueError, "source/x' is neither a file nor a symlink to one")
    (source / "x").unlink()
    os.mkfifo(source / "x")
    with pytest.raises(ValueError, match="source/x' is neither a file nor a symlink to one"):
        merge_checkpoint(source, random_rows(model), source.parent / "merged")


def test_a_second_model_that_servers_prefer(source, model):
    (source / "consolidated.safetensors").write_bytes(b"x")
    refused(source, model, ValueError, "twice: .'consolidated.safetensors'.*ignore_patterns")


COPIES = [
    "pytorch_model.bin", "pytorch_model-00001-of-00002.bin", "tf_model.h5", "flax_model.msgpack",
    "m.Q4.gguf", "onnx/model.onnx", "original/consolidated.00.pth", "checkpoint-9/m.safetensors",
]  # fmt: skip


@pytest.mark.parametrize("name", COPIES)
def test_copies_of_the_weights_are_warned_of(name, source, model, tmp_path):
    (source / name).parent.mkdir(exist_ok=True)
    (source / name).write_bytes(b"the weights, once more")
    with pytest.warns(UserWarning, match=f"'{name}'.* may hold the same weights"):
        merge_checkpoint(source, random_rows(model), tmp_path / "b")
    assert (tmp_path / "b" / name).read_bytes() == (source / name).read_bytes()


def test_a_warning_that_is_an_error_leaves_nothing(source, model, tmp_path):
    (source / "pytorch_model.bin").write_bytes(b"x")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        refused(source, model, UserWarning, "may hold the same weights")


def test_what_a_trainer_leaves_is_not_warned_of(source, model, tmp_path):
    for name in ("optimizer.pt", "training_args.bin", "rng_state.pth", "scheduler.pt"):
        (source / name).write_bytes(b"x")
    merge_checkpoint(source, random_rows(model), tmp_path / "b")


def test_every_safetensors_file_beside_the_model_is_written_to(source, model, tmp_path):
    """Such as a variant in half precision, which a loader may be asked for."""
    half = model.embed_tokens.weight.data.half()
    save_file({KEY: half + 1}, source / "model.fp16.safetensors")
    save_file({f"base_model.{NAME}": torch.zeros(2, D)}, source / "adapter_model.safetensors")
    params = random_rows(model)
    with pytest.warns(UserWarning, match="model.fp16.safetensors' .torch.float16. are not the"):
        merge_checkpoint(source, params, tmp_path / "b")
    for name in ("a.safetensors", "model.fp16.safetensors"):
        (tmp_path / name).mkdir()
        (tmp_path / "b" / name).rename(tmp_path / name / name)
        merged = tensors_of(tmp_path / name)[KEY]
        assert torch.equal(merged[[7, 3]], params.deltas[KEY].to(merged.dtype))


def test_a_pointer_of_git_lfs(model, tmp_path):
    source = written(tmp_path / "source", {})
    (source / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid x")
    refused(source, model, ValueError, "a pointer of Git LFS.*git lfs pull")


def test_a_file_that_is_a_symlink_out_of_the_folder_is_refused(source, model, tmp_path):
    (tmp_path / "secret").write_text("elsewhere")
    (source / "notes.txt").symlink_to(tmp_path / "secret")
    refused(source, model, ValueError, "notes.txt' is a symlink that leaves the folder")


@pytest.mark.parametrize("name", ["snapshots/main/text_model", "downloaded"])
def test_links_into_a_hub_s_cache_are_followed(name, source, model, tmp_path):
    """As those of a part of a snapshot, and of a folder that a download was linked into."""
    params, before = random_rows(model), contents(source)
    merge_checkpoint(source, params, tmp_path / "plain")
    blobs, linked = tmp_path / "blobs", tmp_path / name
    source.rename(blobs)
    linked.mkdir(parents=True)
    for file in names_in(blobs):
        (linked / file).symlink_to(blobs / file)
    merge_checkpoint(linked, params, tmp_path / "merged")
    assert contents(tmp_path / "merged") == contents(tmp_path / "plain")
    assert contents(blobs) == before
    assert not any(path.is_symlink() for path in (tmp_path / "merged").iterdir())


def test_a_source_that_is_no_file_and_no_folder(model, tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "loop").symlink_to("loop")
    for name, error in (("pipe", ValueError), ("loop", FileNotFoundError)):
        match = "pipe' is neither a folder nor a file|there is no checkpoint at .*loop'"
        with pytest.raises(error, match=match):
            merge_checkpoint(tmp_path / name, random_rows(model), tmp_path / "b")
    assert names_in(tmp_path) == ["loop", "pipe"]


@pytest.mark.parametrize("name", ["a.safetensors", INDEX])
def test_a_pipe_that_takes_the_place_of_a_file_is_not_waited_for(name, source, model, monkeypatch):
    settled = folder._settled

    def swapped(root: Path):
        found = settled(root)
        (source / name).unlink()
        os.mkfifo(source / name)
        return found

    monkeypatch.setattr(folder, "_settled", swapped)
    with pytest.raises(ValueError, match=f"{name}' is no regular file"):
        open_checkpoint(source)
