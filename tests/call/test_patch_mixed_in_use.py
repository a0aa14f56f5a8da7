"""A mixed patch under generation, compilation, autocast and transforms."""

from __future__ import annotations

import optree
import pytest
import torch
from torch import nn

from tests.helpers.llama import llama
from tests.helpers.models import loss_of, make, tokens
from tests.helpers.rows import adapters
from tests.helpers.transforms import TRANSFORMS
from ttfunc import TokenDeltas, functional_call, patch, patch_mixed

IDS = [[7, 3], [3, 20, 5], [5]]  # of the adapters
ASSIGNMENT = [1, -1, 0, 2, 1]
X = tokens(7, 3, 20, 5, batch=len(ASSIGNMENT))


def generate(model: nn.Module, x: torch.Tensor, weights=None, **options) -> torch.Tensor:
    kwargs = {"input_ids": x, "attention_mask": torch.ones_like(x), "max_new_tokens": 6, **options}
    return functional_call(model, weights or {}, kwargs=kwargs, method="generate")


@pytest.mark.parametrize("tie", [True, False])
def test_generation_of_a_mixed_batch_is_that_of_each(tie: bool):
    model = llama(tie=tie, eos_token_id=None)
    each = adapters(model, *IDS, targets="embed_tokens")
    found = generate(model, X, patch_mixed(each, ASSIGNMENT))
    truth = torch.cat(
        [
            generate(model, X[i : i + 1], patch(each[a]) if a >= 0 else None)
            for i, a in enumerate(ASSIGNMENT)
        ]
    )
    assert torch.equal(found, truth)
    assert len({tuple(row[X.shape[1] :].tolist()) for row in found}) > 1


def test_generation_that_expands_the_batch_is_right_or_refused():
    model = llama(eos_token_id=None)
    each = adapters(model, *IDS)
    with pytest.raises(ValueError, match=r"batch of shape \(15, 6\).*repeat_interleave"):
        generate(model, X, patch_mixed(each, ASSIGNMENT), num_beams=3)
    repeated = torch.tensor(ASSIGNMENT).repeat_interleave(3)
    found = generate(model, X, patch_mixed(each, repeated), num_beams=3)
    truth = torch.cat(
        [
            generate(model, X[i : i + 1], patch(each[a]) if a >= 0 else None, num_beams=3)
            for i, a in enumerate(ASSIGNMENT)
        ]
    )
    assert torch.equal(found, truth)


def test_it_compiles_to_one_graph():
    torch._dynamo.reset()
    model = make("tied").requires_grad_(False)

    def call(each: list[TokenDeltas]) -> torch.Tensor:
        return functional_call(model, patch_mixed(each, ASSIGNMENT), (X,))

    each = adapters(model, *IDS)
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(each), call(each))


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # torch.compile looks at it
@pytest.mark.parametrize("case", ["tied", "transpose", "einsum"])
def test_a_compiled_model_takes_a_mixed_patch_made_outside(case: str):
    torch._dynamo.reset()
    model, plain = make(case).requires_grad_(False), make(case).requires_grad_(False)
    model.compile(backend="aot_eager")
    gradients = []
    for one in (model, plain):
        each = adapters(one, *IDS, requires_grad=True)
        logits = functional_call(one, patch_mixed(each, ASSIGNMENT), (X,))
        gradients.append(torch.autograd.grad(loss_of(logits), optree.tree_leaves(each)))
    torch.testing.assert_close(*gradients)


def test_a_float16_model_mixes_under_bfloat16_autocast():
    model = make("tied").requires_grad_(False).half()
    with torch.autocast("cpu", torch.bfloat16):
        found = functional_call(model, patch_mixed(adapters(model, *IDS), [0] * len(X)), (X,))
        each = functional_call(model, patch(adapters(model, *IDS)[0]), (X,))
    torch.testing.assert_close(found, each)


@pytest.mark.parametrize("transform", ["jvp", "forward over reverse", "vmap", "functionalize"])
def test_transforms_agree_with_a_call_of_each(transform: str):
    model = make("tied").requires_grad_(False).double()
    first, *rest = adapters(model, *IDS)

    def mixed(p: TokenDeltas) -> torch.Tensor:
        return loss_of(functional_call(model, patch_mixed([p, *rest], ASSIGNMENT), (X,)))

    def separate(p: TokenDeltas) -> torch.Tensor:
        each = [p, *rest]
        logits = [
            functional_call(model, patch(each[a], dense=True) if a >= 0 else {}, (X[i : i + 1],))
            for i, a in enumerate(ASSIGNMENT)
        ]
        return loss_of(torch.cat(logits))

    apply = TRANSFORMS[transform]
    for found, truth in zip(
        optree.tree_leaves(apply(mixed, first)),
        optree.tree_leaves(apply(separate, first)),
        strict=True,
    ):
        torch.testing.assert_close(found, truth)
