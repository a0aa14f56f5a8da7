"""TokenDeltas: how the pytree behaves, and how several are one."""

from __future__ import annotations

import copy
import dataclasses
import io
import pickle

import optree
import pytest
import torch
import torch.utils._pytree as torch_pytree
from torch import nn
from torch.distributed.fsdp import fully_shard

from tests.helpers.mesh import mesh_of_one
from tests.helpers.models import D, V, make, tokens
from tests.helpers.oracle import bits
from tests.helpers.rows import random_rows
from ttfunc import (
    TokenDeltas,
    TokenModule,
    combine,
    functional_call,
    init_deltas,
    merge,
    patch,
    save,
    save_peft,
    summary,
    unmerge,
)

NAME = "embed_tokens.weight"


def two_matrices(seed: int = 0) -> TokenDeltas:
    # The head comes first: an order that is not the sorted one.
    return init_deltas(make("untied", seed), {"lm_head": [2], "embed_tokens": [5, 1]})


def test_optree_and_torch_see_the_same_float_leaves():
    params = two_matrices()
    leaves = optree.tree_leaves(params)
    assert [leaf.shape for leaf in leaves] == [(2, D), (1, D)]
    assert all(a is b for a, b in zip(leaves, torch_pytree.tree_leaves(params), strict=True))
    assert optree.tree_paths(params) == [(NAME,), ("lm_head.weight",)]
    paths = [path for path, _ in torch_pytree.tree_flatten_with_path(params)[0]]
    assert [str(path[0]) for path in paths] == [f"[{NAME!r}]", "['lm_head.weight']"]


@pytest.mark.parametrize("tree_map", [optree.tree_map, torch_pytree.tree_map])
def test_trees_map_over_one_another(tree_map):
    params = two_matrices()
    doubled = tree_map(lambda a, b: a + b, params, copy.deepcopy(params))
    assert isinstance(doubled, TokenDeltas)
    assert torch.equal(doubled.deltas[NAME], 2 * params.deltas[NAME])
    assert torch.equal(doubled.originals[NAME], params.originals[NAME])
    # Made from another model with the same values, and with leaves that are no tensors.
    assert tree_map(lambda a, b: (a == b).all().item(), params, two_matrices()).deltas == {
        NAME: True,
        "lm_head.weight": True,
    }


@pytest.mark.parametrize(
    "other",
    [
        lambda: two_matrices(seed=1),
        lambda: init_deltas(make("untied"), {"lm_head": [2], "embed_tokens": [1, 5]}),
        lambda: init_deltas(make("untied"), [5, 1]),
        lambda: init_deltas(make("tied"), [5, 1]),
    ],
    ids=["originals", "order", "matrices", "ties"],
)
def test_other_static_data_is_another_structure(other):
    assert optree.tree_structure(two_matrices()) != optree.tree_structure(other())
    with pytest.raises(ValueError, match="ismatch"):
        optree.tree_map(torch.add, two_matrices(), other())


def test_a_nan_in_the_originals_equals_itself():
    model = nn.Embedding(V, D)
    with torch.no_grad():
        model.weight[3] = torch.nan
    one, other = init_deltas(model, [3]), init_deltas(copy.deepcopy(model), [3])
    assert optree.tree_structure(one) == optree.tree_structure(other)


def test_copies_and_pickles_leave_the_base_behind():
    model = nn.Embedding(100_000, 8)
    params = init_deltas(model, [3, 7], init="mean")
    assert copy.deepcopy(params).specs["weight"].matrix is params.specs["weight"].matrix
    assert copy.deepcopy(params).deltas["weight"] is not params.deltas["weight"]

    data = pickle.dumps(params)
    assert len(data) < 4000
    torch.save(params, buffer := io.BytesIO())
    assert buffer.tell() < 8000
    loaded = pickle.loads(data)  # noqa: S301
    assert optree.tree_structure(loaded) == optree.tree_structure(params)
    with pytest.raises(RuntimeError, match="'weight' belong to no model.*optree.tree_map"):
        patch(loaded)
    bound = optree.tree_map(lambda new, old: old, init_deltas(model, [3, 7]), loaded)
    expected = model.weight.detach().clone()
    expected[[3, 7]] = params.deltas["weight"]
    assert torch.equal(patch(bound)["weight"] + 0, expected)


@pytest.mark.parametrize("case", ["tied", "encoder_decoder", "untied"])
def test_a_copy_beside_a_copy_of_the_model_belongs_to_that(case: str):
    model, x = make(case), tokens(7, 3)
    params = random_rows(model)
    expected = functional_call(model, patch(params), (x,))
    twin, rows = copy.deepcopy((model, params))
    assert torch.equal(functional_call(twin, patch(rows), (x,)), expected)
    assert optree.tree_structure(rows) == optree.tree_structure(params)
    with pytest.raises(ValueError, match="stale patch.*another model"):
        functional_call(model, patch(rows), (x,))
    with torch.no_grad():
        model.embed_tokens.weight.zero_()
    assert torch.equal(functional_call(twin, patch(rows), (x,)), expected)


def test_a_copy_without_the_model_belongs_to_the_model():
    """Also where the rows come first, or are in the model itself, of which no copy is there yet."""
    model, x = make("tied"), tokens(7, 3)
    params = random_rows(model)
    rows, twin = copy.deepcopy((params, model))
    expected = functional_call(model, patch(params), (x,))
    assert torch.equal(functional_call(model, patch(rows), (x,)), expected)
    with pytest.raises(ValueError, match="stale patch.*for example a deep copy"):
        functional_call(twin, patch(rows), (x,))
    model.rows = params
    assert torch.equal(functional_call(model, patch(copy.deepcopy(model).rows), (x,)), expected)


def test_a_copy_that_is_tied_otherwise_is_no_model_of_the_rows():
    """Torch copies each Parameter to memory of its own."""
    model, x = make("storage_tied"), tokens(7, 3)
    twin, rows = copy.deepcopy((model, random_rows(model)))
    with pytest.raises(ValueError, match="stale patch.*for example a deep copy"):
        functional_call(twin, patch(rows), (x,))


# --- combine


def test_combine_joins_rows_in_order():
    model = make("untied")
    a = init_deltas(model, [5, 1])
    b = init_deltas(model, {"embed_tokens": [3], "lm_head": [2]}, init="mean")
    both = combine(a, b)
    assert both.token_indices[NAME].tolist() == [5, 1, 3]
    assert torch.equal(both.deltas[NAME], torch.cat([a.deltas[NAME], b.deltas[NAME]]))
    assert torch.equal(both.originals[NAME], model.embed_tokens.weight[[5, 1, 3]])
    assert both.deltas["lm_head.weight"] is b.deltas["lm_head.weight"]
    assert combine(a) is a
    assert combine(a, b).specs[NAME].indices is both.specs[NAME].indices


def test_combine_refuses_overlap_other_models_and_nothing():
    model = make("tied")
    a = init_deltas(model, [5, 1])
    before = bits(a.deltas[NAME])
    with pytest.raises(ValueError, match=r"token indices \[1, 5\] are in more than one"):
        combine(a, init_deltas(model, [1, 2, 5]))
    with pytest.raises(ValueError, match="were made from different models"):
        combine(a, init_deltas(make("tied"), [2]))
    with pytest.raises(ValueError, match="were made from different models"):
        combine(a, init_deltas(make("untied"), [2]))
    with pytest.raises(ValueError, match="at least one TokenDeltas"):
        combine()
    assert bits(a.deltas[NAME]) == before
    # Unpickled rows belong to no model, and so to any with the same matrix.
    assert combine(a, pickle.loads(pickle.dumps(init_deltas(model, [2])))).token_indices[  # noqa: S301
        NAME
    ].tolist() == [5, 1, 2]


@pytest.mark.parametrize(
    "call",
    [
        combine,
        patch,
        lambda model: patch(init_deltas(model, [1]), model),
        lambda model: merge(init_deltas(model, [1]), model.state_dict()),
        lambda model: unmerge(init_deltas(model, [1]), model),
        lambda model: summary(init_deltas(model, [1]), model),
    ],
)
def test_what_are_no_parameters_is_refused(call):
    with pytest.raises(TypeError, match=r"got \w+ where the parameters of init_deltas .* needed"):
        call(make("tied"))


def test_matrices_that_share_a_name_are_refused():
    tied = init_deltas(make("tied"), [1])
    head = init_deltas(make("untied"), [2], targets="lm_head")
    with pytest.raises(ValueError, match=r"'lm_head.weight' belongs to the matrix"):
        combine(tied, head)
    with pytest.raises(ValueError, match=r"'lm_head.weight' belongs to the matrix"):
        combine(head, tied)


def test_stacked_and_plain_rows_do_not_combine():
    model = make("tied")
    a, b = init_deltas(model, [1]), init_deltas(model, [2])
    stacked = optree.tree_map(lambda t: torch.stack([t, t]), a)
    with pytest.raises(ValueError, match=r"shapes \(2, 1, 8\) and \(1, 8\)"):
        combine(stacked, b)


def test_deltas_without_rows_are_refused():
    params = init_deltas(make("tied"), [1])
    with pytest.raises(
        ValueError, match=r"for \['other'\] and the specs for \['embed_tokens.weight"
    ):
        dataclasses.replace(params, deltas={"other": torch.zeros(1, 8)})


def test_nothing_inside_is_handed_out():
    params = init_deltas(make("tied"), [5, 1])
    params.token_indices[NAME].zero_()
    assert params.token_indices[NAME].tolist() == [5, 1]


def test_static_data_made_inside_a_transform_outlives_it():
    model = make("tied")
    a, b = init_deltas(model, [5]), init_deltas(model, [1])
    kept = []

    def loss(p):
        kept.append(combine(p, b))
        return kept[0].deltas[NAME].sum()

    torch.func.grad(loss)(a)
    assert kept[0].originals[NAME].equal(model.embed_tokens.weight[[5, 1]])


def test_what_people_reach_for_names_optree():
    params = init_deltas(make("tied"), [3, 7])
    with pytest.raises(TypeError, match=r"optree.tree_leaves\(params\)"):
        torch.optim.Adam(params)
    for name in ("to", "detach", "cpu", "requires_grad_", "clone"):
        match = rf"no attribute '{name}'.*optree.tree_map\(lambda t: t.{name}\("
        with pytest.raises(AttributeError, match=match):
            getattr(params, name)
    with pytest.raises(TypeError, match=r"got \['embed_tokens'\].*\['embed_tokens.weight'\]"):
        params["embed_tokens"]
    with pytest.raises(AttributeError, match="no attribute 'nothing'.$"):
        _ = params.nothing
    assert not hasattr(params, "__torch_function__")


def test_rows_that_are_in_parts_are_refused_with_the_way_to_gather_them(tmp_path):
    model = torch.nn.Embedding(9, 4).requires_grad_(False)
    with mesh_of_one() as mesh:
        module = fully_shard(TokenModule(model, init_deltas(model, [3, 7])), mesh=mesh)
        rows = module.params()
        for call in (
            lambda: patch(rows),
            lambda: merge(model.state_dict(), rows),
            lambda: save(rows, tmp_path / "rows.safetensors"),
            lambda: save_peft(rows, tmp_path / "adapter"),
        ):
            with pytest.raises((TypeError, ValueError), match=r"parts on several ranks. Gather"):
                call()
        whole = optree.tree_map(lambda row: row.detach().full_tensor(), rows)
        assert torch.equal(merge(model.state_dict(), whole)["weight"], model.weight)
    assert not list(tmp_path.iterdir())
