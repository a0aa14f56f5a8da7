"""Every behaviour of PEFT's trainable tokens, by its number: several adapters, and merging."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch

import ttfunc
from tests.helpers.oracle import bits, edited, same_bits
from tests.helpers.peft_reference import (
    EMBEDDING,
    HEAD,
    IDX,
    RIGHT,
    add,
    agree,
    far,
    inputs_of,
    logits,
    peft_of,
    quiet,
    run,
    toy,
    weights_of,
)
from tests.helpers.rows import random_rows
from ttfunc import functional_call, init_deltas, merge, patch, unmerge

# --- Several adapters: a and b are disjoint, c overlaps a


def adapters(lora: bool = False):
    """A model, three adapters for it, PEFT with the three, and inputs that hold their tokens."""
    model = toy("llama_untied")
    a, b, c = (random_rows(model, idx, seed) for seed, idx in enumerate([[7, 3], [41], [3, 50]]))
    wrapped = peft_of(model, [7, 3], a, lora=lora)
    add(wrapped, "b", b, lora)
    add(wrapped, "c", c, lora)
    return model, (a, b, c), wrapped, inputs_of(model, 7, 3, 41, 50)


def test_18_several_adapters():
    """18. Each is a tree of its own, over the same token or not."""
    model, params, wrapped, inputs = adapters()
    found = [run(model, each, inputs) for each in params]
    for i, adapter in enumerate(["default", "b", "c"]):
        wrapped.set_adapter(adapter)
        torch.testing.assert_close(found[i], logits(wrapped, inputs))
        assert far(found[i], found[i - 1])


def test_19_several_active():
    """19. Disjoint rows compose; an overlap raises."""
    model, (a, b, c), wrapped, inputs = adapters()
    wrapped.base_model.set_adapter(["default", "b"])
    expected = logits(wrapped, inputs)
    for weights in (patch(a, b), patch(b, a), patch(ttfunc.combine(a, b))):
        found = functional_call(model, weights, (), inputs).logits
        torch.testing.assert_close(found, expected)
    assert all(far(run(model, one, inputs), expected) for one in (a, b))
    wrapped.base_model.set_adapter(["default", "c"])
    with pytest.raises(ValueError, match="already defined"):
        wrapped(**inputs)
    with pytest.raises(ValueError, match=r"\[3\] are in more than one"):
        patch(a, c)


def test_19_several_active_in_lora():
    """19. In a LoRA adapter even disjoint ones raise; here they are the same rows."""
    model, (a, b, _), wrapped, inputs = adapters(lora=True)
    with pytest.raises(ValueError, match="Only one adapter can be set at a time"):
        wrapped.base_model.set_adapter(["default", "b"])
    agree(model, ttfunc.combine(a, b), inputs=inputs)


def test_20_merging_several():
    """20. Disjoint rows merge together or in turn; an overlap raises."""
    model, (a, b, c), wrapped, _ = adapters()
    state = model.state_dict()
    wrapped.merge_adapter(["default", "b"])
    for merged in (merge(state, a, b), merge(merge(state, b), a)):
        assert same_bits(merged, weights_of(wrapped))
        assert not same_bits(merged, state)
        assert same_bits(unmerge(merged, b, a), state)
    with quiet(), pytest.raises(ValueError, match="already defined"):
        wrapped.merge_adapter(["c"])
    with pytest.raises(ValueError, match=r"\[3\] are in more than one"):
        merge(state, a, b, c)


def test_20_merging_an_overlap_in_turn():
    """20. A state dict does not tell what is merged in it: the later row stands."""
    model, (a, _, c), _, _ = adapters()
    with pytest.warns(UserWarning, match=r"\[3\].*were other rows of these tokens merged before"):
        merged = merge(merge(model.state_dict(), a), c)
    assert same_bits(merged, edited(edited(model, a), c).state_dict())
    assert same_bits(unmerge(unmerge(merged, c), a), model.state_dict())


def test_22_disabling():
    """22. The model itself is the base, at any time; PEFT's disabling unmerges for good."""
    model, (a, b, _), wrapped, inputs = adapters()
    plain, both = logits(model, inputs), logits(edited(model, ttfunc.combine(a, b)), inputs)
    wrapped.merge_adapter(["default", "b"])
    torch.testing.assert_close(logits(wrapped, inputs), both)
    with wrapped.disable_adapter():
        assert torch.equal(logits(wrapped, inputs), plain)
    torch.testing.assert_close(logits(wrapped, inputs), logits(edited(model, a), inputs))

    weights = patch(a, b)
    for _ in range(2):
        found = functional_call(model, weights, (), inputs).logits
        torch.testing.assert_close(found, both)
        assert torch.equal(logits(model, inputs), plain)
    assert far(both, plain)


def test_23_deleting_an_adapter():
    """23. `del`: the model keeps nothing of the rows, and the other adapters go on."""
    model, (a, b, _), wrapped, inputs = adapters()
    functional_call(model, patch(a, b), (), inputs)
    rows = weakref.ref(a.deltas[EMBEDDING])
    assert rows() is not None
    with quiet():
        wrapped.delete_adapter("default")
    del a, _
    gc.collect()
    assert rows() is None
    assert wrapped.active_adapter == "b"
    torch.testing.assert_close(run(model, b, inputs), logits(wrapped, inputs))


# --- Merging


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", [*RIGHT, "bert"])
def test_24_merge_and_unmerge_are_exact(name: str, dtype: torch.dtype):
    """24. Bit for bit PEFT's weights and back, under every name."""
    model = toy(name).to(dtype)
    params, state = random_rows(model, IDX), model.state_dict()
    wrapped = peft_of(model, IDX, params)
    wrapped.merge_adapter()
    merged, expected = merge(state, params), weights_of(wrapped)
    (names,) = params.tied.values()
    assert expected.keys() >= set(names)
    for alias in state.keys() & expected.keys():
        assert bits(merged[alias]) == bits(expected[alias])
        assert (bits(merged[alias]) != bits(state[alias])) == (alias in names)
    assert same_bits(unmerge(merged, params), state)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_25_rows_that_are_not_finite(bad: float):
    """25. A checked merge refuses them, an unchecked one writes them."""
    model = toy("llama_tied")
    params, state = random_rows(model, IDX), model.state_dict()
    params.deltas[EMBEDDING][1, 2] = bad
    wrapped = peft_of(model, IDX, params)
    with pytest.raises(ValueError, match="NaNs detected"):
        wrapped.merge_adapter(safe_merge=True)
    with pytest.raises(ValueError, match=r"rows of tokens \[3\] .* are not finite"):
        merge(state, params, check_finite=True)
    wrapped.merge_adapter()
    assert bits(merge(state, params)[HEAD]) == bits(weights_of(wrapped)[HEAD])
    assert not weights_of(wrapped)[HEAD].isfinite().all()


def test_25_merging_twice():
    """25. PEFT warns that there is nothing to do; here the second time changes nothing."""
    model = toy("llama_tied")
    params, state = random_rows(model, IDX), model.state_dict()
    wrapped, once = peft_of(model, IDX, params), merge(state, params)
    wrapped.merge_adapter()
    with pytest.warns(UserWarning, match="already merged"):
        wrapped.merge_adapter()
    assert same_bits(merge(once, params), once)
    assert bits(once[HEAD]) == bits(weights_of(wrapped)[HEAD]) != bits(state[HEAD])
    wrapped.unmerge_adapter()
    with pytest.warns(UserWarning, match="Already unmerged"):
        wrapped.unmerge_adapter()
    assert same_bits(unmerge(unmerge(once, params), params), state)


def test_26_unmerge_writes_the_stored_originals():
    """26. What came later is overwritten in the trained rows, and kept in the others."""
    model = toy("llama_untied")
    params = random_rows(model, IDX)
    wrapped, later = peft_of(model, IDX, params), merge(model.state_dict(), params)
    wrapped.merge_adapter()
    for matrix in (weights_of(wrapped)[EMBEDDING], later[EMBEDDING]):
        matrix[[7, 8]] = 5.0
    wrapped.unmerge_adapter()
    found = unmerge(later, params)[EMBEDDING]
    assert torch.equal(found, weights_of(wrapped)[EMBEDDING])
    assert torch.equal(found[7], model.state_dict()[EMBEDDING][7])
    assert (found[8] == 5.0).all()


@pytest.mark.parametrize("name", [*RIGHT, "bert"])
def test_27_a_merged_checkpoint(name: str, tmp_path):
    """27. It has PEFT's bytes, keeps the ties, and answers the same when it is loaded again."""
    model = toy(name)
    params, inputs = random_rows(model, IDX), inputs_of(model, 7, 3)
    merged = merge(model.state_dict(), params)
    assert same_bits(merged, peft_of(model, IDX, params).merge_and_unload().state_dict())
    model.save_pretrained(tmp_path, state_dict=merged)
    loaded = type(model).from_pretrained(tmp_path, attn_implementation="eager").eval()
    assert init_deltas(loaded, IDX).tied == params.tied
    assert torch.equal(logits(loaded, inputs), run(model, params, inputs))
    assert far(logits(loaded, inputs), logits(model, inputs))
