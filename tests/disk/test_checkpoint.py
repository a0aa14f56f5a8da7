"""merge_checkpoint and unmerge_checkpoint: the bytes, the models, and what is refused."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import warnings
from pathlib import Path

import optree
import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load, load_file
from safetensors.torch import save as serialized
from torch import nn

import ttfunc
from tests.helpers.checkpoints import (
    HEAD,
    NAME,
    contents,
    expected,
    leftovers,
    names_in,
    raw_of,
    tensors_of,
    written,
)
from tests.helpers.headers import as_bytes
from tests.helpers.llama import llama
from tests.helpers.models import D, V, tokens
from tests.helpers.rows import random_rows
from ttfunc import (
    TokenDeltas,
    functional_call,
    merge,
    patch,
    save_peft,
    unmerge,
)
from ttfunc.disk.checkpoint import merge_checkpoint, unmerge_checkpoint
from ttfunc.disk.header import FLOATS, read_header


def t5() -> nn.Module:
    config = transformers.T5Config(
        vocab_size=V, d_model=D, d_kv=4, d_ff=16, num_layers=1, num_heads=2,
        decoder_start_token_id=0,
    )  # fmt: skip
    return transformers.T5ForConditionalGeneration(config).eval()


MODELS = {
    "tied": llama,
    "untied": lambda: llama(tie=False),
    "half": lambda: llama(dtype=torch.bfloat16),
    "t5": t5,
}


def saved(model: nn.Module, folder: Path, *, shards: bool = False) -> Path:
    """The model as transformers saves it."""
    model.save_pretrained(folder, max_shard_size="1KB" if shards else "1GB")
    return folder


@pytest.fixture(autouse=True)
def quiet():
    transformers.utils.logging.disable_progress_bar()


@pytest.fixture
def tied(tmp_path) -> tuple[Path, TokenDeltas]:
    model = llama()
    return saved(model, tmp_path / "source"), random_rows(model)


@pytest.mark.parametrize("shards", [False, True])
@pytest.mark.parametrize("case", MODELS)
def test_the_bytes_are_those_of_a_merge_and_unmerge_gives_them_back(case, shards, tmp_path):
    model = MODELS[case]()
    source, params = saved(model, tmp_path / "a", shards=shards), random_rows(model)
    assert (source / "model.safetensors.index.json").exists() == shards
    before = contents(source)
    merge_checkpoint(source, params, tmp_path / "b")
    assert contents(tmp_path / "b") == expected(source, params) != before
    unmerge_checkpoint(tmp_path / "b", params, tmp_path / "c")
    assert contents(tmp_path / "c") == before == contents(source)
    subprocess.run(["diff", "-r", source, tmp_path / "c"], check=True)  # noqa: S603, S607
    assert not leftovers(tmp_path)


@pytest.mark.parametrize("shards", [False, True])
@pytest.mark.parametrize("case", MODELS)
def test_transformers_loads_the_merged_model(case, shards, tmp_path):
    model = MODELS[case]()
    idx = {"embed_tokens": [3, 7], "lm_head": [5]} if case == "untied" else [3, 7]
    source, params = saved(model, tmp_path / "a", shards=shards), random_rows(model, idx)
    x = tokens(3, 7)
    merge_checkpoint(source, params, tmp_path / "b")
    loaded = type(model).from_pretrained(tmp_path / "b", dtype="auto")
    inputs = {"input_ids": x, "decoder_input_ids": x} if case == "t5" else {"input_ids": x}
    with torch.no_grad():
        found = loaded(**inputs).logits
        given = functional_call(model, patch(params, dense=True), kwargs=inputs).logits
        assert torch.equal(found, given)
        assert not torch.equal(found, model(**inputs).logits)


@pytest.mark.parametrize("name", FLOATS)
@pytest.mark.parametrize("delta", [torch.float32, torch.float64, torch.bfloat16])
def test_every_float_dtype_is_cast_as_merge_casts(name, delta, tmp_path):
    dtype = FLOATS[name]
    model = llama(tie=False)
    original = model.get_input_embeddings().weight.data.to(dtype).float()
    model.get_input_embeddings().weight.data.copy_(original)
    params = random_rows(model, dtype=delta)
    source = written(tmp_path / "a", {"first": torch.arange(5), NAME: original.to(dtype)})
    merge_checkpoint(source, params, tmp_path / "b")
    wide = merge({NAME: original}, params)[NAME]
    wide[[7, 3]] = params.deltas[NAME].to(dtype).float()  # float8 has no index_copy on the CPU
    assert raw_of(tensors_of(tmp_path / "b")[NAME]) == raw_of(wide.to(dtype))
    if name == "F64":
        with pytest.raises(ValueError, match=r"is in torch.float64 .* taken in torch.float32"):
            unmerge_checkpoint(tmp_path / "b", params, tmp_path / "c")
    else:
        unmerge_checkpoint(tmp_path / "b", params, tmp_path / "c")
        assert contents(tmp_path / "c") == contents(source)


@settings(max_examples=60)
@given(st.data())
def test_any_layout(tmp_path_factory, data):
    """Files, names, dtypes and rows by chance; the reference is merge on the loaded tensors."""
    tmp_path = tmp_path_factory.mktemp("layout")
    seed = data.draw(st.integers(0, 99))
    generator = torch.Generator().manual_seed(seed)
    model = llama(tie=data.draw(st.booleans()))
    idx = data.draw(st.lists(st.integers(0, V - 1), min_size=1, max_size=V, unique=True))
    params = random_rows(model, idx, seed)
    dtypes = st.sampled_from([torch.float32, torch.float16, torch.bfloat16])
    (tmp_path / "a").mkdir()
    for number in range(data.draw(st.integers(1, 3))):
        held = {f"{number}.{i}": torch.randn(i, generator=generator) for i in range(3)}
        if not number or data.draw(st.booleans()):
            held |= {n: t.clone().to(data.draw(dtypes)) for n, t in model.state_dict().items()}
        path = tmp_path / "a" / f"part{number}.safetensors"
        written_names = data.draw(st.permutations(sorted(held)))
        path.write_bytes(serialized({n: held[n] for n in written_names}))
    merge_checkpoint(tmp_path / "a", params, tmp_path / "b")
    for path in (tmp_path / "a").iterdir():
        found, before = load_file(tmp_path / "b" / path.name), load_file(path)
        if NAME in before:
            before = merge(before, params)
        assert {n: raw_of(t) for n, t in found.items()} == {n: raw_of(t) for n, t in before.items()}
    unmerge_checkpoint(tmp_path / "b", params, tmp_path / "c")
    assert contents(tmp_path / "c") == contents(tmp_path / "a")


def test_one_file_alone(tied, tmp_path):
    source, params = tied
    merge_checkpoint(source / "model.safetensors", params, tmp_path / "b.safetensors")
    assert (tmp_path / "b.safetensors").read_bytes() == expected(source, params)[
        "model.safetensors"
    ]
    unmerge_checkpoint(tmp_path / "b.safetensors", params, tmp_path / "c.safetensors")
    assert (tmp_path / "c.safetensors").read_bytes() == (source / "model.safetensors").read_bytes()
    assert names_in(tmp_path) == ["b.safetensors", "c.safetensors", "source"]


def test_a_file_of_save_does_as_well(tied, tmp_path):
    source, params = tied
    ttfunc.save(params, tmp_path / "p.safetensors")
    merge_checkpoint(str(source), str(tmp_path / "p.safetensors"), str(tmp_path / "b"))
    assert contents(tmp_path / "b") == expected(source, params)


def test_the_directory_of_a_peft_adapter_is_refused(tied, tmp_path):
    source, params = tied
    save_peft(params, tmp_path / "adapter")
    with pytest.raises(ValueError, match="is no file. The folder of a PEFT adapter is for load_pe"):
        merge_checkpoint(source, tmp_path / "adapter", tmp_path / "merged")
    assert names_in(tmp_path) == ["adapter", "source"]


def test_everything_else_in_the_folder_goes_along(tied, tmp_path):
    source, params = tied
    (source / "tokenizer.json").write_bytes(b"{}\r\n")
    (source / "empty").mkdir()
    (source / "1_Pooling" / "deep").mkdir(parents=True)
    (source / "1_Pooling" / "deep" / ".hidden").write_bytes(bytes(range(256)) * 9000)
    (source / "run.sh").write_text("exit")
    (source / "run.sh").chmod(0o750)
    (source / "tokenizer.json").chmod(0o444)
    (source / "1_Pooling").chmod(0o500)
    merge_checkpoint(source, params, tmp_path / "b")
    assert contents(tmp_path / "b") == expected(source, params)
    assert (tmp_path / "b" / "run.sh").stat().st_mode & 0o777 == 0o750
    assert (tmp_path / "b" / "tokenizer.json").stat().st_mode & 0o777 == 0o444
    assert (tmp_path / "b" / "1_Pooling").stat().st_mode & 0o777 == 0o700


def test_the_files_of_a_hub_cache_are_symlinks(tied, tmp_path):
    source, params = tied
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshots" / "main"
    snapshot.mkdir(parents=True)
    before = contents(source)
    source.rename(blobs)
    for name in names_in(blobs):
        (snapshot / name).symlink_to(f"../../blobs/{name}")
    merge_checkpoint(snapshot, params, tmp_path / "b")
    assert contents(tmp_path / "b") == expected(blobs, params)
    assert not any(path.is_symlink() for path in (tmp_path / "b").iterdir())
    assert contents(blobs) == before


def test_progress_is_told(tied, tmp_path):
    source, params = tied
    told = []
    merge_checkpoint(source, params, tmp_path / "b", progress=lambda *figures: told.append(figures))
    total = sum(map(len, contents(source).values()))
    assert [done for done, _ in told] == sorted(done for done, _ in told)
    assert told[-1] == (total, total)


def test_a_file_without_one_of_the_tied_names_is_enough(tmp_path):
    params = random_rows(llama())
    source = written(tmp_path / "a", {HEAD: torch.zeros(V, D)})
    with pytest.warns(UserWarning, match="rows of 'lm_head.weight'.*not the originals"):
        merge_checkpoint(source, params, tmp_path / "b")
    assert torch.equal(tensors_of(tmp_path / "b")[HEAD][[7, 3]], params.deltas[NAME])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_unmerge_never_gives_back_other_bytes_without_a_word(dtype, tmp_path):
    """A checkpoint in a wider dtype than the model that it was loaded into."""
    model = llama(dtype=torch.bfloat16)
    params = random_rows(model)
    precise = torch.randn(V, D, dtype=dtype)
    source = written(tmp_path / "a", {NAME: precise})
    with pytest.warns(UserWarning, match="not the originals .torch.bfloat16.*will not give"):
        merge_checkpoint(source, params, tmp_path / "b")
    with pytest.raises(ValueError, match="torch.bfloat16, which cannot give back all"):
        unmerge_checkpoint(tmp_path / "b", params, tmp_path / "c")
    assert names_in(tmp_path) == ["a", "b"]


def test_a_checkpoint_that_was_not_merged_is_not_unmerged_without_a_word(tied, tmp_path):
    source, params = tied
    with pytest.warns(UserWarning, match="not those that merging these parameters writes"):
        unmerge_checkpoint(source, params, tmp_path / "b")


def test_originals_are_given_back_though_they_are_nan(tmp_path):
    model = llama()
    with torch.no_grad():
        model.get_input_embeddings().weight[3] = torch.tensor(float("nan"))
    params = random_rows(model, [3, 7])
    params.deltas[NAME].fill_(0.5)
    source = saved(model, tmp_path / "a")
    merge_checkpoint(source, params, tmp_path / "b")
    unmerge_checkpoint(tmp_path / "b", params, tmp_path / "c")
    assert contents(tmp_path / "c") == contents(source)


def check_refused(error, match: str, source: Path, params, destination: Path) -> None:
    """Both directions refuse, and leave everything as it was."""
    before = contents(source) if source.is_dir() else None
    beside = names_in(destination.parent) if destination.parent.is_dir() else None
    for write in (merge_checkpoint, unmerge_checkpoint):
        with pytest.raises(error, match=match):
            write(source, params, destination)
    assert before is None or contents(source) == before
    assert beside is None or names_in(destination.parent) == beside


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


@pytest.mark.parametrize("shape", [(V + 1, D), (V, D // 2), (V * D,), (V, D, 1)])
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
    with pytest.raises(ValueError, match=r"of shape \(2, 2, 8\).*one at a time"):
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
    check_refused(FileExistsError, "exists, and nothing is ever", source, params, destination)


def test_a_destination_that_appears_meanwhile_is_kept(tied, tmp_path):
    source, params = tied

    def meddle(done: int, total: int) -> None:
        if done == total:
            (tmp_path / "b").mkdir()

    with pytest.raises(FileExistsError, match="b'"):
        merge_checkpoint(source, params, tmp_path / "b", progress=meddle)
    assert names_in(tmp_path / "b") == []
    assert names_in(tmp_path) == ["b", "source"]


def test_a_destination_inside_of_the_source(tied, tmp_path):
    source, params = tied
    (source / "deep").mkdir()
    (tmp_path / "link").symlink_to(source / "deep")
    for destination in (source / "b", source / "deep" / "b", tmp_path / "link" / "b"):
        check_refused(ValueError, "is inside of the source", source, params, destination)


def test_a_destination_without_a_folder(tied, tmp_path):
    source, params = tied
    for parent in (tmp_path / "nope", source / "config.json"):
        check_refused(FileNotFoundError, "no folder .*Create it", source, params, parent / "b")


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
    # They hit every stage.
    assert all(
        outcomes[stage] >= 10 for stage in ("before", "copying", "writing", "complete", "after")
    )


def test_unmerge_in_memory_agrees(tied, tmp_path):
    source, params = tied
    merge_checkpoint(source, params, tmp_path / "b")
    state = unmerge(tensors_of(tmp_path / "b"), params)
    assert {n: raw_of(t) for n, t in state.items()} == {
        n: raw_of(t) for n, t in tensors_of(source).items()
    }


def test_an_eight_bit_matrix_with_a_scale_of_its_module_is_refused(tied, tmp_path):
    _, params = tied
    small = torch.zeros(V, D).to(torch.float8_e4m3fn)
    scale = NAME.removesuffix("weight") + "scale"
    source = written(tmp_path / "a", {NAME: small, scale: torch.ones(1)})
    with pytest.raises(ValueError, match="scale.* beside it: float rows cannot"):
        merge_checkpoint(source, params, tmp_path / "b")
    assert not (tmp_path / "b").exists()


def test_arguments_in_another_order(tied, tmp_path):
    source, params = tied
    for arguments in ((params, source, tmp_path / "b"), (source, tmp_path / "b", params)):
        for write in (merge_checkpoint, unmerge_checkpoint):
            with pytest.raises(TypeError, match=r"TokenDeltas. The order is merge_checkpoint.sour"):
                write(*arguments)
    assert names_in(tmp_path) == ["source"]


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
