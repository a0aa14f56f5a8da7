"""One batch with an adapter for each example, against a call of each, and against PEFT."""

from __future__ import annotations

import hypothesis.strategies as st
import numpy as np
import optree
import pytest
import torch
import torch.nn.functional as F
import transformers
from hypothesis import given, settings
from torch import Tensor, nn

from tests.helpers.models import D, V, loss_of, make, tokens
from tests.helpers.oracle import edited, snapshot
from tests.helpers.rows import adapters, random_rows
from ttfunc import TokenDeltas, functional_call, init_deltas, patch, patch_mixed

NAME = "embed_tokens.weight"
IDS = [[7, 3], [3, 20, 5], [5]]  # of the adapters
ASSIGNMENT = [1, -1, 0, 2, 1]
X = tokens(7, 3, 20, 5, batch=len(ASSIGNMENT))
CASES = ["tied", "untied", "biased", "scaled", "padding", "storage_tied", "masked", "transpose",
         "einsum"]  # fmt: skip


def expected(model: nn.Module, each: list[TokenDeltas]) -> torch.Tensor:
    """Each example by the model with its adapter written in."""
    models = [*(edited(model, params) for params in each), model]
    return torch.cat([models[a](X[i : i + 1]) for i, a in enumerate(ASSIGNMENT)])


@pytest.mark.parametrize("case", CASES)
def test_each_example_has_its_adapter(case: str):
    model = make(case).requires_grad_(False)
    each = adapters(model, *IDS)
    before = snapshot(model)
    found = functional_call(model, patch_mixed(each, ASSIGNMENT), (X,))
    torch.testing.assert_close(found, expected(model, each))
    with torch.no_grad():
        torch.testing.assert_close(
            functional_call(model, patch_mixed(each, ASSIGNMENT), (X,)), found
        )
    assert snapshot(model) == before


def test_an_example_of_the_plain_model_is_its_own_bit_for_bit():
    model = make("biased").requires_grad_(False)
    found = functional_call(model, patch_mixed(adapters(model, *IDS), ASSIGNMENT), (X,))
    assert torch.equal(found[1], model(X)[1])


@pytest.mark.parametrize("case", ["tied", "untied", "padding", "biased"])
def test_the_gradient_of_each_adapter_is_that_of_its_examples(case: str):
    model = make(case).requires_grad_(False)
    each = adapters(model, *IDS, requires_grad=True)
    logits = functional_call(model, patch_mixed(each, ASSIGNMENT), (X,))
    found = torch.autograd.grad(loss_of(logits), optree.tree_leaves(each))
    separate = torch.cat(
        [
            functional_call(model, patch(each[a]) if a >= 0 else {}, (X[i : i + 1],))
            for i, a in enumerate(ASSIGNMENT)
        ]
    )
    truth = torch.autograd.grad(loss_of(separate), optree.tree_leaves(each))
    for one, other in zip(found, truth, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("case", CASES)
@settings(max_examples=15)
@given(data=st.data())
def test_a_mixed_batch_is_a_call_of_each_with_new_tokens_and_other_ids(case: str, data):
    model = make(case).double().requires_grad_(False)  # sums that cancel lose no digits that count
    new = [V + i for i in range(data.draw(st.integers(0, 2), label="new tokens"))]
    some = st.lists(st.integers(0, V - 1), min_size=not new, max_size=6, unique=True)
    ids = data.draw(st.lists(some, min_size=1, max_size=4), label="old tokens")
    each = [
        random_rows(model, data.draw(st.permutations(old + new)), i, grow=True, requires_grad=True)
        for i, old in enumerate(ids)
    ]
    numbers = st.integers(0 if new else -1, len(each) - 1)  # the plain model has no new tokens
    assignment = data.draw(st.lists(numbers, min_size=1, max_size=5), label="assignment")
    tokens_of = st.lists(st.integers(0, V + len(new) - 1), min_size=4, max_size=4)
    x = torch.tensor([data.draw(tokens_of, label="text") for _ in assignment])

    def found(logits: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        loss, leaves = (logits * weights).sum(), optree.tree_leaves(each)
        given = torch.autograd.grad(loss, leaves, allow_unused=True, materialize_grads=True)
        return logits, given

    weights = torch.randn(len(assignment), 4, V + len(new), dtype=torch.float64)
    alone = [
        functional_call(model, patch(each[a]) if a >= 0 else {}, (x[i : i + 1],))
        for i, a in enumerate(assignment)
    ]
    together = functional_call(model, patch_mixed(each, assignment), (x,))
    if all(a < 0 for a in assignment):
        assert torch.equal(together, model(x))
    else:
        torch.testing.assert_close(found(together), found(torch.cat(alone)))
    with torch.no_grad():
        again = functional_call(model, patch_mixed(each, assignment), (x,))
    torch.testing.assert_close(again, together)


@pytest.mark.parametrize("token", [V + 2, 2**31, -1])
def test_a_token_that_no_adapter_has_is_refused(token: int):
    model = make("tied").requires_grad_(False)
    each = [random_rows(model, [old, V, V + 1], grow=True) for old in (3, 17)]
    with pytest.raises(IndexError, match="index out of range"):
        functional_call(model, patch_mixed(each, [0, 1]), (torch.tensor([[3], [token]]),))


def test_what_an_adapter_holds_does_not_grow_with_the_other_adapters():
    model = make("tied").requires_grad_(False)
    one = random_rows(model, [1])
    each = [one, *(random_rows(model, [2 * i, 2 * i + 1], i) for i in range(1, 10))]
    weight = patch_mixed(each, [0, 0, 0])[NAME]
    assert weight.source.rows.values.shape == (3, 1, D)


def test_adapters_of_different_matrices_mix():
    model = make("untied").requires_grad_(False)
    each = [
        init_deltas(model, [7], init="mean"),
        init_deltas(model, [3, 7], targets="lm_head", init="mean"),
        init_deltas(model, {"embed_tokens": [3], "lm_head": [1]}, init="mean"),
    ]
    found = functional_call(model, patch_mixed(each, ASSIGNMENT), (X,))
    torch.testing.assert_close(found, expected(model, each))


@pytest.mark.parametrize(
    "assignment", [tuple(ASSIGNMENT), torch.tensor(ASSIGNMENT), np.array(ASSIGNMENT)]
)
def test_every_form_of_an_assignment_is_read(assignment):
    model = make("tied").requires_grad_(False)
    found = functional_call(model, patch_mixed(adapters(model, *IDS), assignment), (X,))
    torch.testing.assert_close(found, expected(model, adapters(model, *IDS)))


@pytest.mark.parametrize(
    ("assignment", "error", "match"),
    [
        ([], ValueError, "assignment is empty"),
        ([3], IndexError, "names adapter 3, but there are 3. Give 0 to 2, or -1"),
        ([-2], IndexError, "names adapter -2"),
        ([True], TypeError, "got bool: True"),
        ([0.0], TypeError, "got float"),
        (["a"], TypeError, "got str: 'a'"),
        ("0", TypeError, "must be a sequence of adapter numbers.*got str"),
        ({0: 1}, TypeError, "must be a sequence of adapter numbers.*got dict"),
        (0, TypeError, "must be a sequence of adapter numbers.*got int"),
        (torch.zeros(2, 1, dtype=torch.int64), TypeError, r"got list: \[0\]"),
    ],
)
def test_a_wrong_assignment_is_refused(assignment, error, match: str):
    with pytest.raises(error, match=match):
        patch_mixed(adapters(make("tied"), *IDS), assignment)


def test_a_batch_of_the_plain_model_needs_no_adapter():
    model = make("tied")
    assert patch_mixed([], [-1, -1]) == {}
    assert torch.equal(functional_call(model, patch_mixed([], [-1] * len(X)), (X,)), model(X))


def test_wrong_adapters_are_refused():
    model = make("tied")
    with pytest.raises(ValueError, match="no adapters"):
        patch_mixed([], [0])
    with pytest.raises(ValueError, match="assignment is empty"):
        patch_mixed([], [])
    with pytest.raises(ValueError, match="were made from different models"):
        patch_mixed([*adapters(model, *IDS), *adapters(make("tied"), *IDS)], [0])
    with pytest.raises(TypeError, match="got str where the parameters"):
        patch_mixed(["a"], [0])
    with pytest.raises(ValueError, match="max_norm"):
        patch_mixed(adapters(make("max_norm"), *IDS), [0])


@pytest.mark.parametrize("x", [X[:4], X[:1], torch.cat([X, X]), X[0]])
def test_another_batch_is_refused(x: torch.Tensor):
    model = make("tied").requires_grad_(False)
    before = snapshot(model)
    with pytest.raises(ValueError, match=r"for 5 examples was given a batch of shape .*repeat_int"):
        functional_call(model, patch_mixed(adapters(model, *IDS), ASSIGNMENT), (x,))
    assert snapshot(model) == before


class Flattened(nn.Module):
    """Keeps no batch at its head, so that a row of hidden states has no example."""

    def __init__(self) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(V, D)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.embed_tokens(x)[:, 0] @ self.embed_tokens.weight.T


class Turned(Flattened):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.einsum("bld,vd->lbv", self.embed_tokens(x), self.embed_tokens.weight)


@pytest.mark.parametrize(
    ("model", "error", "match"),
    [
        (Flattened(), ValueError, r"given a batch of shape \(5, 8\)"),
        (Turned(), RuntimeError, "in a way that cannot be mixed"),
        (make("reading"), RuntimeError, "in a way that cannot be mixed"),
    ],
)
def test_a_model_that_cannot_be_mixed_is_refused(model: nn.Module, error, match: str):
    with pytest.raises(error, match=match):
        functional_call(model, patch_mixed(adapters(model, *IDS), ASSIGNMENT), (X,))


def test_a_fused_head_of_the_models_own_gives_no_silent_gradient():
    model = make("function").requires_grad_(False)
    each = adapters(model, *IDS, requires_grad=True)
    found = functional_call(model, patch_mixed(each, ASSIGNMENT), (X,))
    torch.testing.assert_close(found, expected(model, each))
    with pytest.raises(RuntimeError, match="separately for each adapter.s examples"):
        found.sum().backward()


def test_a_diverged_adapter_does_not_touch_the_other_examples():
    model = make("tied").requires_grad_(False).eval()
    model.body.bias.requires_grad_()
    each = adapters(model, *IDS)
    each[0] = optree.tree_map(lambda t: t * torch.nan, each[0])
    logits = functional_call(model, patch_mixed(each, [-1] * len(X)), (X,))
    torch.testing.assert_close(logits, model(X))
    assert torch.autograd.grad(logits.sum(), model.body.bias)[0].isfinite().all()


def test_a_model_that_turns_its_batch_is_refused():
    config = transformers.XLNetConfig(vocab_size=V, d_model=D, n_layer=1, n_head=2, d_inner=16)
    model = transformers.XLNetLMHeadModel(config).eval().requires_grad_(False)
    params = init_deltas(model, [7], init="mean")
    with pytest.raises(ValueError, match="a model of type .xlnet. transposes its batch"):
        functional_call(model, patch_mixed([params], [0] * 6), (tokens(7, batch=6),))


def test_numbers_without_values_are_refused():
    with pytest.raises(TypeError, match="no values to read here. Give a list"):
        patch_mixed(adapters(make("tied"), *IDS), torch.zeros(3, dtype=torch.int64, device="meta"))


def add_counted(rows: Tensor) -> None:
    with torch.no_grad():
        rows.add_(1)


def add_past_the_version(rows: Tensor) -> None:
    rows.data.add_(1)


def add_by_numpy(rows: Tensor) -> None:
    rows.numpy()[0] += 1


WRITES = [add_counted, add_past_the_version, add_by_numpy]
COPIES = {
    "mixed": lambda each: patch_mixed(each, ASSIGNMENT),
    "two at once": lambda each: patch(each[0], each[1]),
    "two, dense": lambda each: patch(each[0], each[1], dense=True),
    "dense": lambda each: patch(each[1], dense=True),
}


@pytest.mark.parametrize("write", WRITES)
@pytest.mark.parametrize("kind", COPIES)
def test_rows_that_were_written_to_since_are_stale(kind: str, write):
    model = make("tied").requires_grad_(False)
    each = adapters(model, [7, 3], [20, 5], [5])
    each[2].deltas[NAME].fill_(torch.nan)  # which differs from itself, and is as it was
    weights = COPIES[kind](each)
    functional_call(model, weights, (X,))
    write(each[1].deltas[NAME])
    with pytest.raises(ValueError, match="stale patch: its rows.*again for each step"):
        functional_call(model, weights, (X,))
    functional_call(model, COPIES[kind](each), (X,))


@pytest.mark.parametrize(("count", "ids", "width"), [(65, 1, D), (1, 33, 8192)])
def test_many_rows_are_not_kept_twice(count: int, ids: int, width: int):
    model = nn.Embedding(ids, width).requires_grad_(False)
    few = init_deltas(model, [0])
    (made_from,) = patch_mixed([few], [0])["weight"].source.made_from
    (kept,) = made_from.values
    assert torch.equal(kept, few.deltas["weight"])
    each = [init_deltas(model, range(ids)) for _ in range(count)]
    weight = patch_mixed(each, [0])["weight"]
    assert [one.values for one in weight.source.made_from] == [()]
    with torch.no_grad():
        each[-1].deltas["weight"].add_(1)
    with pytest.raises(ValueError, match="stale patch"):
        F.embedding(torch.tensor([[0]]), weight)
