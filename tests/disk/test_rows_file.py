"""save, read and load: the same bits again, or an error that names the file."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import optree
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from tests.helpers.checkpoints import names_in
from tests.helpers.models import CORPUS, D, Language, make, tokens
from tests.helpers.oracle import edited, same_bits, snapshot
from tests.helpers.rows import random_rows
from tests.helpers.rows_files import IDX, same, stacked
from ttfunc import TokenDeltas, functional_call, init_deltas, merge, patch, unmerge
from ttfunc.disk.header import FLOATS
from ttfunc.disk.load import load
from ttfunc.disk.rows_file import read, save

NAME, HEAD = "embed_tokens.weight", "lm_head.weight"


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
    assert names_in(tmp_path) == ["rows.safetensors"]


@pytest.mark.parametrize("dtype", FLOATS.values(), ids=str)
def test_every_dtype_keeps_its_bits(dtype: torch.dtype, tmp_path):
    model = make("tied")
    params = init_deltas(model, [7, 3])
    noise = torch.randint(0, 256, (2, 2, D * dtype.itemsize), dtype=torch.uint8).view(dtype)
    row = replace(params.specs[NAME], originals=noise[1])
    params = TokenDeltas({NAME: noise[0]}, {NAME: row})
    save(params, tmp_path / "rows")
    found = read(tmp_path / "rows")
    assert found.deltas[NAME].dtype == found.originals[NAME].dtype == dtype
    assert same(found, params)


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
    assert names_in(tmp_path) == ["rows"]


def test_in_inference_mode_what_is_loaded_can_be_trained_after(tmp_path):
    model = make("tied")
    with torch.inference_mode():
        save(init_deltas(model, IDX), tmp_path / "rows")
        loaded = load(tmp_path / "rows", model)
    loaded.deltas[NAME].requires_grad_()
    functional_call(model, patch(loaded), (tokens(7),)).sum().backward()
    assert loaded.deltas[NAME].grad.any()


# --- What cannot be written


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
                {**p.deltas, "a": p.deltas[NAME]}, {**p.specs, "a": replace(p.specs[NAME])}
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
    assert names_in(tmp_path) == ["rows"]


def test_no_parameters_are_refused(tmp_path):
    with pytest.raises(TypeError, match="got dict where"):
        save({}, tmp_path / "rows")
    assert names_in(tmp_path) == []


# --- Another model than it was


def test_a_name_that_the_model_lacks(saved: Path):
    model = torch.nn.ModuleDict({"model": make("tied")})
    with pytest.raises(KeyError, match=r"'embed_tokens.weight'.*Did you mean 'model.embed_tokens"):
        load(saved, model)


def test_another_shape(saved: Path):
    model = make("tied")
    model.embed_tokens = torch.nn.Embedding(24, D)
    model.lm_head.weight = model.embed_tokens.weight
    before = read(saved)
    with pytest.warns(UserWarning, match=r"rows of tokens \[7, 5, 11\] .* are not those that"):
        loaded = load(saved, model)  # of a taller model, which has these tokens as well
    assert loaded.specs[NAME].shape == (24, D)
    assert torch.equal(loaded.deltas[NAME], before.deltas[NAME])
    functional_call(model, patch(loaded), tokens(7, 11))

    model.embed_tokens = torch.nn.Embedding(11, D)
    model.lm_head.weight = model.embed_tokens.weight
    with pytest.warns(UserWarning, match=r"rows of tokens \[7, 5\] in"):
        assert load(saved, model).specs[NAME].grown == 1  # token 11 follows on the last one
    model.embed_tokens = torch.nn.Embedding(10, D)
    model.lm_head.weight = model.embed_tokens.weight
    with pytest.raises(ValueError, match=r"on a matrix of 23 rows: the new .* leave out 10"):
        load(saved, model)
    model.embed_tokens = torch.nn.Embedding(23, D + 1)
    model.lm_head.weight = model.embed_tokens.weight
    with pytest.raises(ValueError, match=r"shape \(23, 8\), but .* its shape is \(23, 9\)"):
        load(saved, model)


@pytest.mark.parametrize(("trained", "now"), [("tied", "untied"), ("untied", "tied")])
def test_other_ties(trained: str, now: str, tmp_path):
    save(random_rows(make(trained), IDX), tmp_path / "rows")
    with pytest.raises(ValueError, match="were one matrix, but in this Language"):
        load(tmp_path / "rows", make(now))
    save(random_rows(make("untied"), IDX, targets=["embed_tokens", "lm_head"]), tmp_path / "both")
    with pytest.raises(ValueError, match="were one matrix, but in this Language"):
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
    with pytest.raises(ValueError, match=r"'embed_tokens.weight' is torch.int8 \(Tensor\) in this"):
        load(saved, model)


# --- Rows that are loaded


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


# --- What was apart


def test_what_was_another_matrix_is_kept(tmp_path):
    """So that a merge of the file knows a tie that the model of the rows did not have."""
    params = random_rows(make("untied"), IDX, targets="lm_head")
    save(params, tmp_path / "rows")
    assert (
        read(tmp_path / "rows").specs[HEAD].origin.apart
        == params.specs[HEAD].origin.apart
        == (NAME,)
    )
    assert load(tmp_path / "rows", make("untied")).specs[HEAD].origin.apart == (NAME,)
    with pytest.raises(ValueError, match="was another matrix when the rows were made"):
        merge(make("tied").state_dict(), read(tmp_path / "rows"))


@pytest.mark.parametrize("apart", [{HEAD: NAME}, [1], 1])
def test_names_that_are_none(apart, tmp_path):
    save(random_rows(make("untied"), IDX, targets="lm_head"), tmp_path / "rows")
    with safe_open(tmp_path / "rows", "pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        own = json.loads(file.metadata()["ttfunc"])
    own["origins"][0]["apart"] = apart
    save_file(tensors, tmp_path / "rows", {"ttfunc": json.dumps(own)})
    with pytest.raises(ValueError, match="its metadata say of the model what no version does"):
        read(tmp_path / "rows")
