"""merge_checkpoint and unmerge_checkpoint: the bytes, and the models that load them."""

from __future__ import annotations

import subprocess

import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
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
    saved,
    tensors_of,
    written,
)
from tests.helpers.llama import llama
from tests.helpers.models import D, V, tokens
from tests.helpers.rows import random_rows
from ttfunc import functional_call, merge, patch, unmerge
from ttfunc.disk.checkpoint import merge_checkpoint, unmerge_checkpoint
from ttfunc.disk.header import FLOATS


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


@pytest.mark.parametrize("shards", [False, True])
@pytest.mark.parametrize("case", MODELS)
def test_the_bytes_are_those_of_a_merge_and_unmerge_gives_them_back(case, shards, tmp_path):
    model = MODELS[case]()
    source = saved(model, tmp_path / "a", shards=shards)
    params = random_rows(model, targets="shared" if case == "t5" else "embed_tokens")
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
    params = random_rows(model, targets="embed_tokens", dtype=delta)
    source = written(tmp_path / "a", {"first": torch.arange(5), NAME: original.to(dtype)})
    merge_checkpoint(source, params, tmp_path / "b")
    wide = merge({NAME: original}, params)[NAME]
    wide[[7, 3]] = params.deltas[NAME].to(dtype).float()  # float8 has no index_copy on the CPU
    assert raw_of(tensors_of(tmp_path / "b")[NAME]) == raw_of(wide.to(dtype))
    if name == "F64":
        with pytest.raises(ValueError, match=r"is in torch.float64, .* taken in torch.float32"):
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
    params = random_rows(model, idx, seed, targets="embed_tokens")
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
    with pytest.raises(ValueError, match="torch.bfloat16, which does not hold all"):
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


def test_unmerge_in_memory_agrees(tied, tmp_path):
    source, params = tied
    merge_checkpoint(source, params, tmp_path / "b")
    state = unmerge(tensors_of(tmp_path / "b"), params)
    assert {n: raw_of(t) for n, t in state.items()} == {
        n: raw_of(t) for n, t in tensors_of(source).items()
    }


def test_arguments_in_another_order(tied, tmp_path):
    source, params = tied
    for arguments in ((params, source, tmp_path / "b"), (source, tmp_path / "b", params)):
        for write in (merge_checkpoint, unmerge_checkpoint):
            with pytest.raises(TypeError, match=r"TokenDeltas. The order is merge_checkpoint.sour"):
                write(*arguments)
    assert names_in(tmp_path) == ["source"]
