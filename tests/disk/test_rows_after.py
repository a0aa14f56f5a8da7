"""Two people's new tokens at the same ids: the ones of a file are numbered on from the others'."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import LlamaForCausalLM

from tests.helpers.llama import llama
from tests.helpers.models import D, V, make, tokens
from tests.helpers.oracle import same_bits
from tests.helpers.rows import random_rows
from ttfunc import (
    TokenDeltas,
    combine,
    functional_call,
    init_deltas,
    load,
    merge,
    merge_checkpoint,
    patch,
    patch_mixed,
    save,
    unmerge,
)

BOTH = ["embed_tokens", "lm_head"]
MODELS = {
    "tied": lambda: llama(),
    "untied": lambda: llama(tie=False),
    "plain, biased": lambda: make("biased").requires_grad_(False),
}


def resized(model: nn.Module, *each: tuple[TokenDeltas, dict[int, int]]) -> nn.Module:
    """A longer copy, with the row of each token written where the mapping has it."""
    model = copy.deepcopy(model)
    height = 1 + max(place for _, places in each for place in places.values())
    made: dict[int, nn.Parameter] = {}
    for module in model.modules():
        for name, held in list(module._parameters.items()):
            if held is not None and len(held) == V:
                longer = torch.cat([held, torch.zeros(height - V, *held.shape[1:])])
                made.setdefault(id(held), nn.Parameter(longer.detach(), requires_grad=False))
                module._parameters[name] = made[id(held)]
    weights = dict(model.named_parameters(remove_duplicate=False))
    with torch.no_grad():
        for params, places in each:
            for name, rows in params.deltas.items():
                for token, row in zip(params.token_indices[name].tolist(), rows, strict=True):
                    weights[name][places.get(token, token)] = row
    return model


def logits(out: object) -> torch.Tensor:
    return out if isinstance(out, torch.Tensor) else out.logits  # type: ignore[attr-defined]


@pytest.mark.parametrize("case", MODELS)
def test_one_model_with_the_new_tokens_of_both(case: str, tmp_path: Path):
    model = MODELS[case]()
    first = random_rows(model, [V + 1, 7, V], 1, grow=True)
    other = random_rows(model, [V + 2, 3, V, V + 1], 2, grow=True)
    save(other, tmp_path / "other")
    with pytest.raises(ValueError, match=r"\[23, 24\] are in more than .*load\(path, model, after"):
        combine(first, load(tmp_path / "other", model))
    then = load(tmp_path / "other", model, after=first, requires_grad=True)
    for ids in then.token_indices.values():
        assert ids.tolist() == [V + 4, 3, V + 2, V + 3]
    assert same_bits(then.deltas, other.deltas)
    assert all(rows.requires_grad for rows in then.deltas.values())
    reference = resized(
        model,
        (first, {V: V, V + 1: V + 1}),
        (other, {V: V + 2, V + 1: V + 3, V + 2: V + 4}),
    )
    x = tokens(7, V, V + 4, 3, V + 2, V + 1, V + 3)
    expected = logits(reference(x))
    for weights in (
        patch(first, then),
        patch(combine(then, first)),
        patch(then, first, dense=True),
    ):
        torch.testing.assert_close(logits(functional_call(model, weights, x)), expected)
    mixed = functional_call(model, patch_mixed([combine(first, then)], [0] * len(x)), x)
    torch.testing.assert_close(logits(mixed), expected)
    state = model.state_dict()
    merged = merge(merge(state, first), then)
    assert merged.keys() == reference.state_dict().keys()
    for name, tensor in reference.state_dict().items():
        torch.testing.assert_close(merged[name], tensor)
    assert same_bits(unmerge(unmerge(merged, then), first), state)

    # What was numbered on is saved so, and a third person's follow on both.
    save(then, tmp_path / "then")
    again = load(tmp_path / "then", model)
    assert again == then or again.specs == then.specs
    third = load(tmp_path / "other", model, after=again)
    assert next(iter(third.specs.values())).follows == 5
    # A file that follows on others itself is numbered on from anyone, and from those as it is.
    assert load(tmp_path / "then", model, after=first).specs == then.specs
    from_none = load(tmp_path / "then", model, after=init_deltas(model, [9], targets=BOTH))
    assert from_none.specs == other.specs


def test_a_folder_with_both(tmp_path: Path):
    model = llama(tie=False)
    model.save_pretrained(tmp_path / "base")
    first = random_rows(model, [V, V + 1], 1, grow=True)
    save(random_rows(model, [V, V + 1, V + 2], 2, grow=True), tmp_path / "other")
    then = load(tmp_path / "other", model, after=first)
    both = combine(first, then)
    merge_checkpoint(tmp_path / "base", both, tmp_path / "merged")
    merged = LlamaForCausalLM.from_pretrained(tmp_path / "merged").eval()
    x = tokens(7, V, V + 4, 3, V + 2)
    expected = functional_call(model, patch(both), x).logits
    torch.testing.assert_close(merged(x).logits, expected)


def test_a_matrix_that_only_one_of_the_two_has_and_old_rows_alone(tmp_path: Path):
    tables = nn.ModuleDict({"a": nn.Embedding(V, D), "b": nn.Embedding(V + 4, D)})
    first = random_rows(tables, [V, V + 1], targets="a", grow=True)
    save(random_rows(tables, [V + 4], targets="b", grow=True), tmp_path / "b")
    assert load(tmp_path / "b", tables, after=first).token_indices["b.weight"].tolist() == [V + 4]
    save(random_rows(tables, [3], targets="a"), tmp_path / "old")
    assert load(tmp_path / "old", tables, after=first).token_indices["a.weight"].tolist() == [3]
    new = {"a": [V], "b": [V + 4]}
    save(random_rows(tables, new, grow=True), tmp_path / "both")
    both = load(tmp_path / "both", tables, after=first)
    assert both.token_indices["a.weight"].tolist() == [V + 2]
    assert both.token_indices["b.weight"].tolist() == [V + 4]


def test_on_a_model_that_has_the_others_by_now(tmp_path: Path):
    """Tokens that were new to the file are new to the model: they replace no row of the others."""
    model = make("tied")
    first, other = (random_rows(model, [V, V + 1], seed, grow=True) for seed in (1, 2))
    save(first, tmp_path / "first")
    save(other, tmp_path / "other")
    taller = resized(model, (first, {V: V, V + 1: V + 1})).eval()
    there = load(tmp_path / "first", taller)
    then = load(tmp_path / "other", taller, after=there)
    assert next(iter(then.token_indices.values())).tolist() == [V + 2, V + 3]
    reference = resized(model, (first, {V: V, V + 1: V + 1}), (other, {V: V + 2, V + 1: V + 3}))
    x = tokens(V, V + 3, V + 2, V + 1)
    torch.testing.assert_close(functional_call(taller, patch(then), x), reference(x))


def test_others_that_are_no_rows_of_this_model(tmp_path: Path):
    model = make("tied")
    save(random_rows(model, [V], grow=True), tmp_path / "rows")
    with pytest.raises(TypeError, match="after is a bool: give the TokenDeltas"):
        load(tmp_path / "rows", model, after=True)  # type: ignore[arg-type]
    stranger = random_rows(nn.Embedding(V, D), [3])
    with pytest.raises(ValueError, match=r"after has rows of \['weight'\], and Language has no"):
        load(tmp_path / "rows", model, after=stranger)
    with pytest.raises(ValueError, match=r"after has rows of \['weight'\]"):
        init_deltas(model, [V], after=stranger)
    longer = make("tied")
    longer.embed_tokens = nn.Embedding(V + 1, D)
    longer.lm_head.weight = longer.embed_tokens.weight
    with pytest.raises(ValueError, match=r"of shape \(24, 8\), and its shape is \(23, 8\) now"):
        load(tmp_path / "rows", model, after=random_rows(longer, [3]))


def test_after_implies_grow_and_grow_takes_no_rows():
    model = make("untied")
    first = random_rows(model, [V, V + 1], grow=True)
    then = init_deltas(model, [V + 2], after=first)
    assert list(then.deltas) == ["embed_tokens.weight", "lm_head.weight"]
    with pytest.raises(TypeError, match=r"grow is a TokenDeltas: give after=first"):
        init_deltas(model, [V + 2], grow=first)  # type: ignore[arg-type]
    with pytest.raises(IndexError, match=r"leave out 23.*init_deltas\(..., after=first\)"):
        init_deltas(model, [V + 2], grow=True)
