"""What merge_checkpoint refuses, before it writes a byte."""

from __future__ import annotations

import json
import random
import warnings
from dataclasses import replace
from pathlib import Path

import optree
import pytest
import torch
from safetensors.torch import load
from safetensors.torch import save as serialized

from tests.helpers.checkpoints import HEAD, NAME, contents, leftovers, names_in, raw_of, written
from tests.helpers.headers import as_bytes
from tests.helpers.llama import llama
from tests.helpers.models import D, V
from tests.helpers.rows import random_rows
from ttfunc import merge, save_peft
from ttfunc.disk.checkpoint import merge_checkpoint, unmerge_checkpoint
from ttfunc.disk.header import read_header
from ttfunc.rows.deltas import TokenDeltas
from ttfunc.rows.token_ids import TokenIndices


def test_the_directory_of_a_peft_adapter_is_refused(tied, tmp_path):
    source, params = tied
    save_peft(params, tmp_path / "adapter")
    with pytest.raises(ValueError, match="is no file. For a folder of a PEFT adapter use load_pe"):
        merge_checkpoint(source, tmp_path / "adapter", tmp_path / "merged")
    assert names_in(tmp_path) == ["adapter", "source"]


def check_refused(error, match: str, source: Path, params, destination: Path) -> None:
    """Both directions refuse, and leave everything as it was."""
    before = contents(source) if source.is_dir() else None
    beside = names_in(destination.parent) if destination.parent.is_dir() else None
    for write in (merge_checkpoint, unmerge_checkpoint):
        with pytest.raises(error, match=match):
            write(source, params, destination)
    assert before is None or contents(source) == before
    assert beside is None or names_in(destination.parent) == beside


def test_negative_ids_in_a_spec_made_by_hand(tied, tmp_path):
    source, params = tied
    key, spec = next(iter(params.specs.items()))
    ids = (-1, *spec.indices.ids[1:])
    wrong = replace(spec, indices=TokenIndices(ids))
    given = TokenDeltas(params.deltas, {**params.specs, key: wrong})
    check_refused(ValueError, "negative token indices", source, given, tmp_path / "merged")


def test_names_that_are_not_there(tmp_path):
    model = llama()
    state = {f"transformer.{n}": t.clone() for n, t in model.state_dict().items()}
    source = written(tmp_path / "a", state)
    match = r"none of the names.*Nearest: 'transformer.model.embed_tokens.weight' \(23, 8\)"
    check_refused(KeyError, match, source, random_rows(model), tmp_path / "b")
    other = written(tmp_path / "other", {"conv.weight": torch.zeros(3)})
    check_refused(
        KeyError, r"Nearest: 'conv.weight' \(3,\)", other, random_rows(model), tmp_path / "b"
    )
    empty = written(tmp_path / "empty", {})
    check_refused(KeyError, "Nearest: no tensor", empty, random_rows(model), tmp_path / "b")


@pytest.mark.parametrize("shape", [(V - 1, D), (V, D // 2), (V + 1, D // 2), (V * D,), (V, D, 1)])
def test_another_shape(shape, tmp_path):
    source = written(tmp_path / "a", {NAME: torch.zeros(V, D), HEAD: torch.zeros(shape)})
    match = rf"'lm_head.weight' has shape \({shape[0]},.*made for \(23, 8\)"
    check_refused(ValueError, match, source, random_rows(llama()), tmp_path / "b")


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.int64, torch.bool])
def test_a_matrix_without_float_rows(dtype, tmp_path):
    source = written(tmp_path / "a", {NAME: torch.zeros(V, D, dtype=dtype)})
    match = "'model.embed_tokens.weight' is (I8|U8|I64|BOOL) in the .*quantised matrix"
    check_refused(ValueError, match, source, random_rows(llama()), tmp_path / "b")


@pytest.mark.parametrize("suffix", ["_scale", "_scale_inv", ".absmax", ".quant_state.nf4"])
def test_a_matrix_with_scales_in_another_file(suffix, tmp_path):
    source = written(tmp_path / "a", {NAME: torch.zeros(V, D, dtype=torch.float8_e4m3fn)})
    (source / "scales.safetensors").write_bytes(serialized({NAME + suffix: torch.zeros(1)}))
    match = "is F8_E4M3 in the checkpoint, with .*beside it"
    check_refused(ValueError, match, source, random_rows(llama()), tmp_path / "b")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float8_e4m3fn])
def test_another_matrix_beside_it_is_no_scale(dtype, tmp_path):
    """An average of the weights, or the state of an optimizer; beside a wide float any other."""
    model = llama()
    weight = model.get_input_embeddings().weight.data.to(dtype)
    more = {NAME + "_ema": torch.zeros(V, D), NAME + ".exp_avg": torch.zeros(V, D)}
    if dtype != torch.float8_e4m3fn:
        more[NAME + "_seen"] = torch.zeros(V)
    source = written(tmp_path / "a", {NAME: weight, **more})
    params = random_rows(model.to(dtype) if dtype == torch.bfloat16 else model)
    with warnings.catch_warnings():  # of float8: the originals are rounded
        warnings.filterwarnings("ignore", message=".*are not the originals")
        merge_checkpoint(source, params, tmp_path / "b")
    merged = load((tmp_path / "b" / "model.safetensors").read_bytes())
    assert torch.equal(merged[NAME][7].float(), params.deltas[NAME][0].to(dtype).float())
    assert merged.keys() == {NAME, *more}


@pytest.mark.parametrize("suffix", ["_scale", ".absmax", "_zero_point", ".SCB"])
def test_a_wide_matrix_with_scales(suffix, tmp_path):
    source = written(tmp_path / "a", {NAME: torch.zeros(V, D), NAME + suffix: torch.zeros(V)})
    match = "is F32 in the checkpoint, with .*beside it"
    check_refused(ValueError, match, source, random_rows(llama()), tmp_path / "b")


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_rows_that_are_not_finite(bad, tied, tmp_path):
    source, params = tied
    params.deltas[NAME][1, 2] = bad
    with pytest.raises(ValueError, match=r"tokens \[3\] .*not finite in torch.float32"):
        merge_checkpoint(source, params, tmp_path / "b")
    assert names_in(tmp_path) == ["source"]


@pytest.mark.parametrize("dtype", [torch.float16, torch.float8_e4m3fn, torch.float8_e5m2])
def test_rows_that_overflow_in_the_checkpoint(dtype, tmp_path):
    model = llama()
    params = optree.tree_map(lambda rows: rows + 1e6, random_rows(model))
    weight = model.get_input_embeddings().weight.data
    source = written(tmp_path / "a", {NAME: weight.to(dtype)})
    with pytest.raises(ValueError, match=r"tokens \[7, 3\] .*not finite in torch.float"):
        merge_checkpoint(source, params, tmp_path / "b")


def test_large_float64_rows_are_finite(tmp_path):
    model = llama().double()
    params = optree.tree_map(lambda rows: rows + 1e300, random_rows(model))
    source = written(tmp_path / "a", {NAME: model.get_input_embeddings().weight.data})
    merge_checkpoint(source, params, tmp_path / "b")


def test_parameters_that_are_none(tied, tmp_path):
    source, params = tied
    for wrong in (None, {}, 3):
        check_refused(TypeError, "where the parameters", source, wrong, tmp_path / "b")
    check_refused(FileNotFoundError, "no file", source, tmp_path / "nope", tmp_path / "b")
    check_refused(
        ValueError, "cannot be loaded|no metadata", source, source / "model.safetensors",
        tmp_path / "b",
    )  # fmt: skip
    meta = optree.tree_map(lambda rows: rows.to("meta"), params)
    with pytest.raises(ValueError, match="on the meta device, without values"):
        merge_checkpoint(source, meta, tmp_path / "b")
    stacked = optree.tree_map(lambda rows: torch.stack([rows, rows]), params)
    with pytest.raises(ValueError, match=r"shape \(2, 2, 8\).*one at a time"):
        merge_checkpoint(source, stacked, tmp_path / "b")


def test_a_source_that_is_none(tied, tmp_path):
    _, params = tied
    check_refused(
        FileNotFoundError, "no checkpoint at.*snapshot_download", tmp_path / "nope", params,
        tmp_path / "b",
    )  # fmt: skip


@pytest.mark.parametrize("kind", ["folder", "empty", "file", "link", "dangling", "source", "above"])
def test_a_destination_that_exists(kind, tied, tmp_path):
    source, params = tied
    destination = tmp_path / "b"
    if kind == "folder":
        (destination / "x").mkdir(parents=True)
    elif kind == "empty":
        destination.mkdir()
    elif kind == "file":
        destination.write_text("mine")
    elif kind == "link":
        destination.symlink_to(source)
    elif kind == "dangling":
        destination.symlink_to("nowhere")
    destination = {"source": source, "above": tmp_path}.get(kind, destination)
    check_refused(FileExistsError, "exists, and is never", source, params, destination)


def test_a_destination_inside_of_the_source(tied, tmp_path):
    source, params = tied
    (source / "deep").mkdir()
    (tmp_path / "link").symlink_to(source / "deep")
    for destination in (source / "b", source / "deep" / "b", tmp_path / "link" / "b"):
        check_refused(ValueError, "is inside of the source", source, params, destination)


def test_a_destination_without_a_folder(tied, tmp_path):
    source, params = tied
    for parent in (tmp_path / "nope", source / "config.json"):
        check_refused(FileNotFoundError, "no folder .*Create the", source, params, parent / "b")


def test_mutated_checkpoints_are_refused_or_merged_right(tied, tmp_path):
    """Whatever a damaged header says: an error and nothing written, or the right bytes."""
    source, params = tied
    path, rng, outcomes = source / "model.safetensors", random.Random(0), set()  # noqa: S311
    good = path.read_bytes()
    length = int.from_bytes(good[:8], "little")
    for number in range(400):
        raw = bytearray(good)
        if number % 2:
            header = json.loads(raw[8 : 8 + length])
            a, b = rng.sample([name for name in header if name != "__metadata__"], 2)
            fields = ["dtype", "shape", "data_offsets"] if rng.random() < 0.5 else ["shape"]
            for field in fields if rng.random() < 0.8 else []:
                header[a][field], header[b][field] = header[b][field], header[a][field]
            if fields == ["shape"] and rng.random() < 0.5:
                header[a]["shape"] = header[a]["shape"][::-1]
            raw[8 : 8 + length] = json.dumps(header).encode().ljust(length)[:length]
        else:
            raw[rng.randrange(8, 8 + length)] ^= 1 << rng.randrange(8)
        path.write_bytes(raw)
        destination = tmp_path / f"b{number}"
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # that the originals are others
                merge_checkpoint(source, params, destination)
        except (ValueError, KeyError):
            outcomes.add("refused")
            assert not destination.exists()
        else:
            outcomes.add("merged")
            state = merge(loaded_somehow(path), params)
            found = loaded_somehow(destination / path.name)
            assert {n: raw_of(t) for n, t in found.items()} == {
                n: raw_of(t) for n, t in state.items()
            }
    assert outcomes == {"refused", "merged"}
    assert not leftovers(tmp_path)


def loaded_somehow(path: Path) -> dict[str, torch.Tensor]:
    """By the library, tensors of a dtype that it does not know as bytes."""
    return load(as_bytes(path.read_bytes(), read_header(path)))


def test_an_eight_bit_matrix_with_a_scale_of_its_module_is_refused(tied, tmp_path):
    _, params = tied
    small = torch.zeros(V, D).to(torch.float8_e4m3fn)
    scale = NAME.removesuffix("weight") + "scale"
    source = written(tmp_path / "a", {NAME: small, scale: torch.ones(1)})
    with pytest.raises(ValueError, match="scale.* beside it: float rows cannot"):
        merge_checkpoint(source, params, tmp_path / "b")
    assert not (tmp_path / "b").exists()
