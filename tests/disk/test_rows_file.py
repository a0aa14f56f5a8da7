"""save, read and load: the same bits again, or an error that names the file."""

from __future__ import annotations

import errno
import json
import os
import re
import resource
import stat
from dataclasses import replace
from pathlib import Path

import hypothesis
import optree
import pytest
import torch
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from tests.helpers.models import CORPUS, D, Language, make, tokens
from tests.helpers.oracle import bits, edited, same_bits, snapshot
from tests.helpers.rows import random_rows
from ttfunc import TokenDeltas, functional_call, init_deltas, merge, patch, unmerge
from ttfunc.disk.header import FLOATS
from ttfunc.disk.rows_file import load, read, save

NAME, HEAD = "embed_tokens.weight", "lm_head.weight"
IDX = [7, 5, 11]  # in no order


def listed(folder: Path) -> list[str]:
    return sorted(entry.name for entry in folder.iterdir())


def same(a: TokenDeltas, b: TokenDeltas) -> bool:
    """Equal in every bit, and in the order of the rows."""
    return (
        a.rows == b.rows and same_bits(a.deltas, b.deltas) and same_bits(a.originals, b.originals)
    )


# --- There and back


@pytest.mark.parametrize("case", CORPUS)
def test_what_is_saved_is_loaded(case: str, tmp_path):
    model = make(case)
    params, before = random_rows(model, IDX), snapshot(model)
    save(params, tmp_path / "rows.safetensors")
    loaded = load(tmp_path / "rows.safetensors", model)
    assert same(loaded, params)
    assert loaded.tied == params.tied
    assert not any(delta.requires_grad for delta in loaded.deltas.values())
    assert optree.tree_structure(loaded) == optree.tree_structure(params)
    x = tokens(7, 5)
    expected = functional_call(model, patch(params), (x,))
    assert torch.equal(functional_call(model, patch(loaded), (x,)), expected)
    assert not torch.allclose(expected, make(case)(x))
    if case != "max_norm":  # it renorms its own rows as it reads them
        assert snapshot(model) == before
    assert listed(tmp_path) == ["rows.safetensors"]


@pytest.mark.parametrize("dtype", FLOATS.values(), ids=str)
def test_every_dtype_keeps_its_bits(dtype: torch.dtype, tmp_path):
    model = make("tied")
    params = init_deltas(model, [7, 3])
    noise = torch.randint(0, 256, (2, 2, D * dtype.itemsize), dtype=torch.uint8).view(dtype)
    row = replace(params.rows[NAME], originals=noise[1])
    params = TokenDeltas({NAME: noise[0]}, {NAME: row})
    save(params, tmp_path / "rows")
    found = read(tmp_path / "rows")
    assert found.deltas[NAME].dtype == found.originals[NAME].dtype == dtype
    assert same(found, params)


@pytest.mark.parametrize(
    "leaf",
    [
        lambda rows: rows.requires_grad_(),
        lambda rows: torch.nn.Parameter(rows),
        lambda rows: rows.T.contiguous().T,
        lambda rows: rows[:1].expand(rows.shape),
        lambda rows: torch.cat([rows, rows])[::2],
    ],
    ids=["requires grad", "parameter", "transposed", "expanded", "strided"],
)
def test_leaves_of_all_kinds(leaf, tmp_path):
    model = make("tied")
    params = optree.tree_map(leaf, random_rows(model, IDX))
    expected = {name: delta.detach().clone() for name, delta in params.deltas.items()}
    save(params, tmp_path / "rows")
    found = load(tmp_path / "rows", model).deltas
    assert same_bits(found, expected)
    assert same_bits(params.deltas, expected)
    assert found[NAME].is_leaf
    assert not found[NAME].requires_grad


def test_originals_and_deltas_in_one_memory(tmp_path):
    model = make("tied")
    params = init_deltas(model, IDX)
    params = TokenDeltas({NAME: params.originals[NAME]}, params.rows)
    save(params, tmp_path / "rows")
    assert same(read(tmp_path / "rows"), params)


def test_each_matrix_has_its_own_indices(tmp_path):
    model = make("untied")
    params = random_rows(model, {"lm_head": [22, 0], "embed_tokens": [5]})
    save(params, tmp_path / "rows")
    loaded = load(tmp_path / "rows", model)
    assert same(loaded, params)
    assert {n: ids.tolist() for n, ids in loaded.token_indices.items()} == {
        HEAD: [22, 0],
        NAME: [5],
    }


def test_without_a_model_it_merges_and_does_not_patch(tmp_path):
    model = make("storage_tied")
    params, state = random_rows(model, IDX), model.state_dict()
    save(params, tmp_path / "rows")
    found = read(tmp_path / "rows")
    assert same_bits(merge(state, found), merge(state, params))
    assert same_bits(unmerge(merge(state, found), found), state)
    with pytest.raises(RuntimeError, match="belong to no model"):
        patch(found)
    assert same(load(tmp_path / "rows", model), params)


def test_a_skeleton_on_meta_takes_the_rows(tmp_path):
    model = make("tied")
    params, state = random_rows(model, IDX), model.state_dict()
    save(params, tmp_path / "rows")
    with torch.device("meta"):
        skeleton = Language()
    loaded = load(tmp_path / "rows", skeleton)
    assert same(loaded, params)
    merged = merge(state, loaded)
    assert same_bits(merged, edited(model, params).state_dict())
    assert same_bits(unmerge(merged, loaded), state)
    out = functional_call(skeleton, patch(loaded, dense=True), (tokens(7).to("meta"),))
    assert out.is_meta


def test_strings_of_the_caller_are_kept(tmp_path):
    params = random_rows(make("tied"), IDX)
    save(params, tmp_path / "rows", metadata={"license": "CC0", "π": "…"})
    with safe_open(tmp_path / "rows", "pt") as file:
        kept = file.metadata()
    assert {key: kept[key] for key in ("license", "π")} == {"license": "CC0", "π": "…"}
    assert same(read(tmp_path / "rows"), params)
    for wrong, error, match in (
        ({"ttfunc": "mine"}, ValueError, "'ttfunc' is ttfunc's own"),
        ({"epoch": 3}, TypeError, r"strings to strings, got \[\('epoch', 3\)\]"),
    ):
        with pytest.raises(error, match=match):
            save(params, tmp_path / "other", metadata=wrong)
    assert listed(tmp_path) == ["rows"]


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
    assert listed(tmp_path) == ["latest", "rows.safetensors"]


def test_in_inference_mode_what_is_loaded_can_be_trained_after(tmp_path):
    model = make("tied")
    with torch.inference_mode():
        save(init_deltas(model, IDX), tmp_path / "rows")
        loaded = load(tmp_path / "rows", model)
    loaded.deltas[NAME].requires_grad_()
    functional_call(model, patch(loaded), (tokens(7),)).sum().backward()
    assert loaded.deltas[NAME].grad.any()


# --- What cannot be written


def stacked(params: TokenDeltas) -> TokenDeltas:
    return optree.tree_map(lambda rows: torch.stack([rows, rows]), params)


@pytest.mark.parametrize(
    ("spoil", "match"),
    [
        (stacked, r"deltas of 'embed_tokens.weight' have shape \(2, 3, 8\), and \(3, 8\)"),
        (lambda p: optree.tree_map(lambda rows: rows[:2], p), r"shape \(2, 8\), and \(3, 8\)"),
        (lambda p: optree.tree_map(lambda rows: rows.int(), p), "torch.int32, and a float dtype"),
        (lambda p: optree.tree_map(lambda rows: rows.cfloat(), p), "torch.complex64, and a float"),
        (lambda p: optree.tree_map(lambda rows: rows.to("meta"), p), "on the meta device"),
        (lambda p: init_deltas(make("tied").to("meta"), IDX), "on the meta device"),
        (
            lambda p: TokenDeltas(
                {**p.deltas, "a": p.deltas[NAME]}, {**p.rows, "a": replace(p.rows[NAME])}
            ),
            "given twice",
        ),
        (lambda p: TokenDeltas({}, {}), "names and a shape for each matrix"),
    ],
    ids=["stacked", "short", "integers", "complex", "meta", "meta model", "twice", "none"],
)
def test_what_cannot_be_saved_is_refused_first(spoil, match: str, tmp_path):
    path = tmp_path / "rows"
    save(random_rows(make("tied"), IDX), path)
    before = path.read_bytes()
    with pytest.raises(ValueError, match=match) as error:
        save(spoil(random_rows(make("tied"), IDX)), path)
    assert repr(str(path)) in str(error.value)
    assert path.read_bytes() == before
    assert listed(tmp_path) == ["rows"]


def test_no_parameters_are_refused(tmp_path):
    with pytest.raises(TypeError, match="got dict where"):
        save({}, tmp_path / "rows")
    assert listed(tmp_path) == []


def test_inside_of_a_transform(tmp_path):
    params = random_rows(make("tied"), IDX)

    def traced(p):
        save(p, tmp_path / "traced")
        return p.deltas[NAME].sum()

    for transform in (torch.func.grad, torch.func.vmap):
        given = params if transform is torch.func.grad else stacked(params)
        with pytest.raises(ValueError, match="traced by a transform"):
            transform(traced)(given)

    def beside(x):
        save(params, tmp_path / "beside")
        return x.sum()

    torch.func.grad(beside)(torch.ones(2))
    assert same(read(tmp_path / "beside"), params)
    assert listed(tmp_path) == ["beside"]


@pytest.mark.parametrize("where", ["nowhere/rows", ".", "blocked/rows"])
def test_a_place_that_cannot_be_written(where: str, tmp_path):
    (tmp_path / "blocked").touch()
    with pytest.raises(OSError, match=r"is no place for a file: it is a folder, or"):
        save(random_rows(make("tied"), IDX), tmp_path / where)
    assert listed(tmp_path) == ["blocked"]


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
    assert listed(tmp_path) == ["rows"]


# --- Another model than it was


@pytest.fixture
def saved(tmp_path) -> Path:
    save(random_rows(make("tied"), IDX), tmp_path / "rows.safetensors")
    return tmp_path / "rows.safetensors"


def test_a_name_that_the_model_lacks(saved: Path):
    model = torch.nn.ModuleDict({"model": make("tied")})
    with pytest.raises(KeyError, match=r"'embed_tokens.weight'.*Did you mean 'model.embed_tokens"):
        load(saved, model)


def test_another_shape(saved: Path):
    model = make("tied")
    model.embed_tokens = torch.nn.Embedding(24, D)
    model.lm_head.weight = model.embed_tokens.weight
    with pytest.raises(ValueError, match=r"shape \(23, 8\), and this Language has it in \(24, 8\)"):
        load(saved, model)


@pytest.mark.parametrize(("trained", "now"), [("tied", "untied"), ("untied", "tied")])
def test_other_ties(trained: str, now: str, tmp_path):
    save(random_rows(make(trained), IDX), tmp_path / "rows")
    with pytest.raises(ValueError, match="were one matrix and no others, and in this Language"):
        load(tmp_path / "rows", make(now))
    save(random_rows(make("untied"), IDX, targets=["embed_tokens", "lm_head"]), tmp_path / "both")
    with pytest.raises(ValueError, match="were one matrix and no others, and in this Language"):
        load(tmp_path / "both", make("tied"))


def test_the_rows_go_by_the_first_name_in_this_model(saved: Path):
    model = make("tied")
    model._modules = dict(reversed(model._modules.items()))
    loaded, params = load(saved, model), random_rows(make("tied"), IDX)
    assert loaded.tied == {HEAD: (HEAD, NAME)}
    assert same_bits(loaded.deltas, {HEAD: params.deltas[NAME]})
    assert same_bits(merge(model.state_dict(), loaded), merge(make("tied").state_dict(), params))


def test_a_matrix_of_integers(saved: Path):
    model = make("tied")
    del model.embed_tokens.weight, model.lm_head.weight
    for module in (model.embed_tokens, model.lm_head):
        module.register_buffer("weight", torch.zeros(23, D, dtype=torch.int8))
    with pytest.raises(ValueError, match=r"'embed_tokens.weight' is torch.int8 in this Language"):
        load(saved, model)


def test_other_rows_than_it_was_trained_from(saved: Path):
    model = make("tied")
    with torch.no_grad():
        model.embed_tokens.weight[11] += 1
    state = model.state_dict()
    with pytest.warns(UserWarning, match=r"tokens \[11\] in 'embed_tokens.weight' .* file's orig"):
        loaded = load(saved, model)
    assert same_bits(loaded.originals, random_rows(make("tied"), IDX).originals)
    assert torch.equal(unmerge(state, loaded)[NAME], make("tied").embed_tokens.weight)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_the_same_rows_in_another_precision(dtype: torch.dtype, saved: Path, tmp_path):
    loaded = load(saved, make("tied").to(dtype))  # a warning would be an error
    assert same(loaded, random_rows(make("tied"), IDX))
    save(random_rows(make("tied").to(dtype), IDX), tmp_path / "other")
    load(tmp_path / "other", make("tied").to(dtype).float())


# --- Files that lie


def refused(path: Path, match: str = "", error=ValueError) -> None:
    with pytest.raises(error, match=match) as caught:
        read(path)
    assert repr(str(path)) in str(caught.value)


def test_truncated_at_every_byte(saved: Path):
    whole = saved.read_bytes()
    for length in range(len(whole)):
        saved.write_bytes(whole[:length])
        refused(saved, "no safetensors file, or damaged")
    saved.write_bytes(whole + b"\0")
    refused(saved, "no safetensors file, or damaged")


def is_readable(path: Path, params: TokenDeltas) -> bool:
    """Whether the file can be read; if so, it has the same rows, whatever they are called."""
    found, refusal = None, ""
    try:
        found = read(path)
    except ValueError as error:
        refusal = str(error)
    if found is None:
        assert repr(str(path)) in refusal
        return False
    for kind in ("deltas", "token_indices", "originals"):
        a, b = ([bits(t) for t in getattr(each, kind).values()] for each in (found, params))
        assert a == b
    assert all(row.matrix is None and name == row.names[0] for name, row in found.rows.items())
    return True


def test_every_bit_of_the_header_flipped(saved: Path):
    params, whole = random_rows(make("tied"), IDX), saved.read_bytes()
    header = 8 + int.from_bytes(whole[:8], "little")
    readable = []
    for position in range(header):
        for bit in range(8):
            spoilt = bytearray(whole)
            spoilt[position] ^= 1 << bit
            saved.write_bytes(spoilt)
            if is_readable(saved, params):
                readable.append(saved.read_bytes()[8:header])
    assert len(readable) < header  # of eight times as many
    model = make("tied")
    for text in readable:
        saved.write_bytes(whole[:8] + text + whole[header:])
        meant = json.loads(json.loads(text)["__metadata__"]["ttfunc"])
        if meant == {"format": 1, "matrices": [{"names": [NAME, HEAD], "shape": [23, D]}]}:
            assert same(load(saved, model), params)
        else:  # another name or another number of rows
            with pytest.raises((KeyError, ValueError), match="has no parameter|has it in"):
                load(saved, model)


@hypothesis.given(st.data())
@hypothesis.settings(max_examples=300)
def test_headers_with_other_bytes_in_them(tmp_path_factory, data):
    path = tmp_path_factory.mktemp("headers") / "rows"
    params = random_rows(make("untied"), IDX, targets=["embed_tokens", "lm_head"])
    save(params, path)
    spoilt = bytearray(path.read_bytes())
    header = 8 + int.from_bytes(spoilt[:8], "little")
    start = data.draw(st.integers(0, header - 1))
    end = data.draw(st.integers(start, min(start + 20, header)))
    patch = data.draw(
        st.binary(max_size=20) | st.sampled_from([b'"', b"0", b"9" * 30, b"[", b"{}"])
    )
    spoilt[start:end] = patch
    if data.draw(st.booleans()):  # so that the length is right again
        spoilt[:8] = (header - 8 + len(patch) - (end - start)).to_bytes(8, "little")
    path.write_bytes(spoilt)
    is_readable(path, params)


def test_headers_longer_than_the_file_or_the_memory(saved: Path):
    whole = saved.read_bytes()
    for length in (len(whole), 10**8, 2**40, 2**63, 2**64 - 1):
        saved.write_bytes(length.to_bytes(8, "little") + whole[8:])
        refused(saved, "no safetensors file, or damaged")


def test_what_is_no_file_of_ttfunc(tmp_path):
    refused(tmp_path / "missing", "there is no file", FileNotFoundError)
    refused(tmp_path, "is no file. The folder of a PEFT adapter is for load_peft")
    for content in (b"", b"version https://git-lfs.github.com/spec/v1\n", b"\x80\x02}q\x00."):
        (tmp_path / "other").write_bytes(content)
        refused(tmp_path / "other", "no safetensors file, or damaged")
    save_file({"a": torch.zeros(2)}, tmp_path / "foreign", {"format": "pt"})
    refused(tmp_path / "foreign", "no metadata of ttfunc's")


def matrix(names=(NAME, HEAD), shape=(23, D)) -> dict:
    return {"names": names, "shape": shape}


@pytest.mark.parametrize(
    ("own", "match"),
    [
        ("", "not JSON"),
        ("[]", "no format version"),
        ('{"format": true}', "no format version"),
        ('{"format": 0}', "no format version"),
        ('{"format": 2}', "format 2, and this ttfunc knows 1. Upgrade"),
        ('{"format": 1, "format": 1}', "more than once"),
        ("[" * 100_000, "nested too deeply"),
        ('{"format": ' + "9" * 5000 + "}", "cannot be loaded"),
        ({}, "names and a shape for each"),
        ({"matrices": []}, "names and a shape for each"),
        ({"matrices": {}}, "names and a shape for each"),
        ({"matrices": [3]}, "names and a shape for each"),
        ({"matrices": [matrix(names=[])]}, "names and a shape for each"),
        ({"matrices": [matrix(names=["", HEAD])]}, "names and a shape for each"),
        ({"matrices": [matrix(names=NAME)]}, "names and a shape for each"),
        ({"matrices": [matrix(names=[NAME, 3])]}, "names and a shape for each"),
        ({"matrices": [matrix(names=[NAME, NAME])]}, "are given twice"),
        ({"matrices": [matrix(), matrix()]}, "are given twice"),
        ({"matrices": [matrix(names=[HEAD, NAME])]}, r"missing, or unknown: .*'deltas/embed_tok"),
        ({"matrices": [matrix(), matrix(names=["a"])]}, r"missing, or unknown: \['deltas/a'"),
        ({"matrices": [matrix(names=["../x"])]}, r"missing, or unknown: \['deltas/../x'"),
        ({"matrices": [matrix(names=["\ud800"])]}, r"missing, or unknown"),
        ({"matrices": [matrix(shape=[23, 7])]}, r"shape \(3, 8\), and \(3, 7\) is needed"),
        ({"matrices": [matrix(shape=[23, D, 1])]}, "names and a shape for each"),
        ({"matrices": [matrix(shape=[23, -8])]}, "names and a shape for each"),
        ({"matrices": [matrix(shape=[23.0, 8])]}, "names and a shape for each"),
        ({"matrices": [matrix(shape=[True, 8])]}, "names and a shape for each"),
        ({"matrices": [matrix(shape=[11, D])]}, r"\[11\] are past the end of .*which has 11 rows"),
        ({"matrices": [{**matrix(), "more": 1}]}, "names and a shape for each"),
    ],
)
def test_metadata_that_lie(own, match: str, saved: Path):
    text = own if isinstance(own, str) else json.dumps({"format": 1, **own})
    save_file(load_file(saved), saved, {"ttfunc": text})
    refused(saved, match)


@pytest.mark.parametrize(
    ("part", "tensor", "match"),
    [
        ("deltas", None, r"missing, or unknown: \['deltas/embed_tokens.weight'\]"),
        ("more", torch.zeros(1), r"missing, or unknown: \['more/embed_tokens.weight'\]"),
        ("deltas", torch.zeros(3, D, dtype=torch.int64), "torch.int64, and a float dtype"),
        ("deltas", torch.zeros(3, D, dtype=torch.int32), "has dtype I32"),
        ("deltas", torch.zeros(3, D, dtype=torch.bool), "has dtype BOOL"),
        ("deltas", torch.zeros(3, D, dtype=torch.complex64), "has dtype C64"),
        ("deltas", torch.zeros(2, D), r"have shape \(2, 8\), and \(3, 8\) is needed"),
        ("deltas", torch.zeros(1, 3, D), r"have shape \(1, 3, 8\), and \(3, 8\) is needed"),
        ("deltas", torch.tensor(1.0), r"have shape \(\), and \(3, 8\) is needed"),
        ("originals", torch.zeros(3, 9), r"originals .* shape \(3, 9\), and \(3, 8\) is needed"),
        ("originals", torch.zeros(3, D, dtype=torch.int64), "torch.int64, and a float dtype"),
        ("token_indices", torch.tensor([7, 3, 7]), r"\[7\] .* more than once"),
        ("token_indices", torch.tensor([7, 3, -1]), r"negative token indices \[-1\]"),
        ("token_indices", torch.tensor([7, 5, 23]), r"\[23\] are past the end"),
        ("token_indices", torch.tensor([7, 3, 2**62]), "are past the end"),
        ("token_indices", torch.tensor([7, 3]), r"have shape \(3, 8\), and \(2, 8\) is needed"),
        ("token_indices", torch.tensor([[7, 3, 1]]), "must have one dimension"),
        ("token_indices", torch.tensor([], dtype=torch.int64), "no token indices"),
        ("token_indices", torch.tensor([7.0, 3.0, 1.0]), "are torch.float32, not int64"),
        ("token_indices", torch.tensor([7, 3, 1], dtype=torch.int32), "has dtype I32"),
    ],
)
def test_tensors_that_lie(part: str, tensor, match: str, saved: Path):
    with safe_open(saved, "pt") as file:
        metadata = file.metadata()
    tensors = load_file(saved)
    tensors.pop(f"{part}/{NAME}", None)
    save_file(tensors | ({} if tensor is None else {f"{part}/{NAME}": tensor}), saved, metadata)
    refused(saved, match)


def test_what_is_read_does_not_depend_on_the_file(saved: Path):
    params = random_rows(make("tied"), IDX)
    loaded = load(saved, make("tied"))
    saved.write_bytes(b"\0" * saved.stat().st_size)
    assert same(loaded, params)
    assert loaded.deltas[NAME].untyped_storage().nbytes() == loaded.deltas[NAME].nbytes
    assert re.match("TokenDeltas", repr(loaded))


# --- Places that are no files, and arguments in another order


def test_a_device_or_a_pipe_is_not_replaced(tmp_path):
    """A terminal of this test's own, and not /dev/null, which root could really replace."""
    params, ends = random_rows(make("tied"), IDX), os.openpty()
    terminal = Path(os.ttyname(ends[1]))
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "to_pipe").symlink_to("pipe")
    (tmp_path / "to_terminal").symlink_to(terminal)
    (tmp_path / "loop").symlink_to("loop")
    before, mode = listed(tmp_path), terminal.stat().st_mode
    for path in (terminal, *(tmp_path / name for name in before)):
        with pytest.raises(FileExistsError, match=r"is no place for a file: it is a (device|loop)"):
            save(params, path)
    assert listed(tmp_path) == before
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
    assert listed(tmp_path) == ["link", "rows"]
    (tmp_path / "far").symlink_to("nowhere/rows")
    with pytest.raises(FileNotFoundError, match="there is no .*nowhere"):
        save(random_rows(make("tied"), IDX), tmp_path / "far")


def test_arguments_in_another_order(tmp_path):
    model = make("tied")
    params, path = random_rows(model, IDX), tmp_path / "rows"
    for call, order, got in (
        (lambda: save(path, params), "save(params, path)", "TokenDeltas"),
        (lambda: load(model, path), "load(path, model)", "Language"),
        (lambda: read(model), "read(path)", "Language"),
        (lambda: read(None), "read(path)", "NoneType"),
    ):
        with pytest.raises(TypeError, match=re.escape(f"got {got}. The order is {order}.")):
            call()
    with pytest.raises(TypeError, match=r"a model is needed, got PosixPath\. .* load\(path, model"):
        load(path, path)
    assert listed(tmp_path) == []


@pytest.mark.parametrize("requires_grad", [False, True])
def test_rows_that_are_ready_to_be_trained(requires_grad: bool, saved: Path):
    loaded = load(saved, make("tied"), requires_grad=requires_grad)
    assert [delta.requires_grad for delta in loaded.deltas.values()] == [requires_grad]
    assert all(delta.is_leaf for delta in loaded.deltas.values())
    assert not any(rows.requires_grad for rows in loaded.originals.values())
    if requires_grad:
        model = make("tied")
        loaded = load(saved, model, requires_grad=True)
        optimizer = torch.optim.SGD(loaded.deltas.values(), lr=1.0)
        functional_call(model, patch(loaded), (tokens(7),)).sum().backward()
        optimizer.step()
        assert not same_bits(loaded.deltas, load(saved, model).deltas)


def test_in_inference_mode_too(saved: Path):
    with torch.inference_mode():
        loaded = load(saved, make("tied"), requires_grad=True)
    assert loaded.deltas[NAME].requires_grad
    assert not loaded.deltas[NAME].is_inference()
