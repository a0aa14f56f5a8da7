"""The work that every recipe does on an engine, and its result in one process: the oracle."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from tests.helpers.llama import llama
from tests.helpers.rows import random_rows
from ttfunc import TokenDeltas, TokenModule, functional_call, init_deltas, merge, patch

IDS = [7, 3, 20, 11]
TEXT = torch.tensor([[3, 7, 5, 20, 11, 7], [1, 2, 3, 4, 22, 9]])
# A batch for each rank, with unequal numbers of labels.
TEXTS = [torch.tensor([[3, 7, 5, 20, 11, 7]]), torch.tensor([[1, 2, 3, 4, 22, 9]])]
LABELS = [
    TEXTS[0].masked_fill(torch.arange(6) < 1, -100),
    TEXTS[1].masked_fill(torch.arange(6) < 4, -100),
]

Recipe = Callable[[], dict[str, float]]


class Recipes(dict[str, Recipe]):
    """Recipes of an engine by their names."""

    def recipe(self, name: str, **options: Any) -> Callable[[Callable[..., Any]], Any]:
        """Enters a function under a name, called with these options."""

        def register(function: Callable[..., Any]) -> Callable[..., Any]:
            self[name] = lambda: function(**options)
            return function

        return register


def said(model: nn.Module, params: TokenDeltas, x: Tensor = TEXT, **options: Any) -> Any:
    return functional_call(model, patch(params), kwargs={"input_ids": x, "labels": x, **options})


def started(rows: TokenDeltas) -> Tensor:
    """The values of the rows of the one matrix."""
    (delta,) = rows.deltas.values()
    return delta


def edited(params: TokenDeltas, model: nn.Module) -> nn.Module:
    """The model with the rows written into it, all of it trainable."""
    model.load_state_dict(merge(model.state_dict(), params))
    return model.requires_grad_()


def oracle(model: nn.Module, params: TokenDeltas, x: Tensor = TEXT) -> tuple[Tensor, Tensor]:
    """Logits, and the gradient of the rows: those of the whole matrix in an edited model."""
    changed: Any = edited(params, model)
    out = changed(input_ids=x, labels=x)
    out.loss.backward()
    (ids,) = params.token_indices.values()
    gradient = changed.get_input_embeddings().weight.grad[ids]
    return out.logits.detach(), gradient


def made(**options: Any) -> tuple[Any, TokenDeltas, tuple[Tensor, Tensor]]:
    """A model, rows for it, and what they give."""
    model = llama(**options)
    params = random_rows(model, IDS, requires_grad=True)
    return model, params, oracle(llama(**options), params)


def again(model: nn.Module, params: TokenDeltas) -> TokenDeltas:
    """The same rows for a model that is sharded by now."""
    start = started(params).detach().clone()
    return init_deltas(model, IDS, init=start, requires_grad=True)


def stepped(
    model: nn.Module, params: TokenDeltas, truth: tuple[Tensor, Tensor]
) -> dict[str, float]:
    """How far a forward and a backward are from the oracle."""
    out = said(model, params)
    out.loss.backward()
    return compared(out.logits, started(params).grad, truth)


def stepped_as_module(
    model: nn.Module, params: TokenDeltas, truth: tuple[Tensor, Tensor]
) -> dict[str, float]:
    """The same by a TokenModule over the model."""
    module = TokenModule(model, params)
    out = module(input_ids=TEXT, labels=TEXT)
    out.loss.backward()
    return compared(out.logits, started(module.params()).grad, truth)


def generated(model: Any, sharded: Callable[[Any], Any]) -> dict[str, float]:
    """How many tokens are others than those of an edited model."""
    params = random_rows(model, IDS)
    options = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
    truth = edited(params, copy.deepcopy(model)).generate(TEXT, **options)
    weights = patch(params)
    found = functional_call(sharded(model), weights, (TEXT,), options, method="generate")
    return {"tokens": float((found != truth).sum())}


def starts_alike(plain: nn.Module, model: nn.Module) -> dict[str, float]:
    """How far rows of a sharded model start from those of the plain one; at the base, not at all.

    What is drawn is that of the first rank, whatever the others draw.
    """
    worst = 0.0
    for init in ("base", "mean", "normal", lambda base, idx: base[idx] * 2):
        seeds = (3, 3 + dist.get_rank() * (init == "normal"))
        a, b = (
            started(init_deltas(m, IDS, init=init, generator=torch.Generator().manual_seed(seed)))
            for m, seed in zip((plain, model), seeds, strict=True)
        )
        worst = max(worst, float(not torch.equal(a, b)) if init == "base" else distance(b, a))
    return {"rows": worst}


def compared(logits: Any, gradient: Any, truth: tuple[Tensor, Tensor]) -> dict[str, float]:
    """The largest differences, on any rank."""
    whole = logits.full_tensor() if hasattr(logits, "full_tensor") else logits
    found = torch.tensor([distance(whole, truth[0]), distance(gradient, truth[1])])
    dist.all_reduce(found, op=dist.ReduceOp.MAX)
    return {"logits": float(found[0]), "rows": float(found[1])}


def distance(a: Tensor | None, b: Tensor) -> float:
    if a is None or a.shape != b.shape:
        return float("inf")
    return float((a.detach() - b).abs().max().nan_to_num(nan=float("inf")))


def refused(error: type[Exception], words: str, call: Callable[[], object]) -> dict[str, float]:
    """0 where the call raises this error, and infinity where it does not."""
    try:
        call()
    except error as raised:
        return {"refused": 0.0 if words in str(raised) else float("inf")}
    return {"refused": float("inf")}
