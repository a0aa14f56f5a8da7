"""Tensors on their way to a file and back: which are taken, and what is compared."""

from __future__ import annotations

import re
from pathlib import Path

import optree
import pytest
import torch

from tests.helpers.checkpoints import names_in
from tests.helpers.models import make
from tests.helpers.oracle import same_bits
from tests.helpers.rows import random_rows
from tests.helpers.rows_files import IDX, same, stacked
from ttfunc import TokenDeltas, init_deltas, unmerge
from ttfunc.disk.load import load
from ttfunc.disk.rows_file import read, save

NAME, HEAD = "embed_tokens.weight", "lm_head.weight"


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
    params = TokenDeltas({NAME: params.originals[NAME]}, params.specs)
    save(params, tmp_path / "rows")
    assert same(read(tmp_path / "rows"), params)


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
    assert names_in(tmp_path) == ["beside"]


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
    assert names_in(tmp_path) == []


def test_in_inference_mode_too(saved: Path):
    with torch.inference_mode():
        loaded = load(saved, make("tied"), requires_grad=True)
    assert loaded.deltas[NAME].requires_grad
    assert not loaded.deltas[NAME].is_inference()
