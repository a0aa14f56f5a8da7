"""Where new rows started is kept with them, and makes no difference to anything else."""

from __future__ import annotations

import pickle

import optree
import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.helpers.models import D, Language, V, make
from tests.helpers.oracle import same_bits
from ttfunc import (
    TokenDeltas,
    TokenModule,
    combine,
    init_deltas,
    load,
    merge,
    merge_checkpoint,
    save,
    stack,
    unmerge,
)

NAME, HEAD = "embed_tokens.weight", "lm_head.weight"
IDX = [V, 7, V + 1]


def started(seed: int = 0, **options) -> tuple[torch.nn.Module, torch.Tensor, TokenDeltas]:
    """A model, the rows that its parameters were made with, and these parameters, trained since."""
    model = make("tied")
    rows = torch.randn(3, D, generator=torch.Generator().manual_seed(seed))
    params = init_deltas(model, IDX, grow=True, init=rows, **options)
    return model, rows, optree.tree_map(lambda row: row + 1, params)


def expected(model: torch.nn.Module, rows: torch.Tensor) -> torch.Tensor:
    """The start of the new rows, and the row that the model has for the other."""
    return torch.stack([rows[0], model.get_parameter(NAME)[7].detach(), rows[2]])


def test_the_start_is_kept_where_rows_go(tmp_path):
    model, rows, params = started()
    model.requires_grad_(False)
    kept = expected(model, rows)
    save(params, tmp_path / "rows")
    for same in (
        params,
        load(tmp_path / "rows", model),
        pickle.loads(pickle.dumps(params)),  # noqa: S301
        optree.tree_map(lambda row: row.bfloat16(), params),
        TokenModule(model, params).params(),
        stack([params, params]),
    ):
        assert torch.equal(same.originals[NAME], kept)
    then = init_deltas(model, [V + 2], init=torch.ones(1, D), after=params)
    assert torch.equal(then.originals[NAME], torch.ones(1, D))
    assert torch.equal(combine(params, then).originals[NAME], torch.cat([kept, torch.ones(1, D)]))
    save(then, tmp_path / "then")
    more = init_deltas(model, range(V, V + 5), grow=True)
    on = load(tmp_path / "then", model, after=more)
    assert on.token_indices[NAME].tolist() == [V + 5]
    assert torch.equal(on.originals[NAME], torch.ones(1, D))


def test_the_start_is_in_the_dtype_of_the_matrix():
    model = make("tied").bfloat16()
    rows = torch.randn(3, D)
    params = init_deltas(model, IDX, grow=True, init=rows)
    assert params.originals[NAME].dtype == torch.bfloat16
    assert torch.equal(params.originals[NAME][[0, 2]], rows[[0, 2]].bfloat16())


def test_on_a_model_that_has_the_tokens_by_now_the_originals_are_its_rows(tmp_path):
    model, _, params = started()
    save(params, tmp_path / "rows")
    taller = Language(vocabulary=V + 2)
    with torch.no_grad():
        taller.embed_tokens.weight[:V] = model.embed_tokens.weight
    loaded = load(tmp_path / "rows", taller)
    assert torch.equal(loaded.originals[NAME], taller.embed_tokens.weight[IDX])
    merged = merge(taller.state_dict(), loaded)
    assert same_bits(unmerge(merged, loaded), taller.state_dict())


def test_trees_that_started_apart_are_one_structure():
    model, rows, params = started()
    other = init_deltas(model, IDX, grow=True, init="normal")
    assert optree.tree_structure(params) == optree.tree_structure(other)
    mean = optree.tree_map(lambda a, b: (a + b) / 2, params, other)
    assert torch.equal(mean.deltas[NAME], (params.deltas[NAME] + other.deltas[NAME]) / 2)
    stacked = stack([params, other, params])  # one spec for all: it cannot say where each started
    assert stacked.originals[NAME][[0, 2]].count_nonzero() == 0
    assert torch.equal(stacked.originals[NAME][1], model.embed_tokens.weight[7])
    rows[2] += 1
    one = init_deltas(model, IDX, grow=True, init=rows)
    rows[0] += 1
    half = stack([one, init_deltas(model, IDX, grow=True, init=rows)])
    assert half.originals[NAME][0].count_nonzero() == 0
    assert torch.equal(half.originals[NAME][2], rows[2])  # where they started together
    with torch.no_grad():
        model.embed_tokens.weight[7] += 1
    with pytest.raises(ValueError, match="their originals of one token differ"):
        stack([params, init_deltas(model, IDX, grow=True)])
    other = init_deltas(model, IDX, grow=True, init="normal")
    assert optree.tree_structure(params) != optree.tree_structure(other)


def test_merging_and_back_is_as_without_a_start(tmp_path):
    model, _, params = started()
    state = model.state_dict()
    assert same_bits(unmerge(merge(state, params), params), state)
    (tmp_path / "source").mkdir()
    save_file(
        {NAME: state[NAME], "body.weight": state["body.weight"]},
        tmp_path / "source" / "m.safetensors",
    )
    merge_checkpoint(tmp_path / "source", params, tmp_path / "merged")
    held = load_file(tmp_path / "merged" / "m.safetensors")[NAME]
    assert torch.equal(held[V:], params.deltas[NAME][[0, 2]])
