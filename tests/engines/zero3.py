"""Recipes of DeepSpeed's ZeRO-3."""

from __future__ import annotations

from typing import Any

import deepspeed
import torch

from tests.engines.fsdp_models import LONGER, with_new_tokens
from tests.engines.work import (
    IDS,
    TEXT,
    Recipes,
    again,
    compared,
    distance,
    edited,
    generated,
    made,
    refused,
    said,
    started,
    starts_alike,
    stepped,
    stepped_as_module,
)
from tests.helpers.llama import llama
from tests.helpers.rows import random_rows
from ttfunc import functional_call, patch, patch_mixed

RECIPES = Recipes()
# Every parameter is partitioned, however small.
CONFIG: dict[str, Any] = {
    "train_micro_batch_size_per_gpu": 1,
    "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0},
}


def partitioned(model: Any) -> Any:
    engine, *_ = deepspeed.initialize(model=model, config=CONFIG)
    return engine.module


@RECIPES.recipe("a model that is not partitioned, in the same process")
def beside() -> dict[str, float]:
    partitioned(llama())
    model, params, truth = made()
    found = stepped(model, params, truth)
    other, params, _ = made()
    weights = patch(params, deferred_logits=True)
    out = functional_call(other, weights, kwargs={"input_ids": TEXT, "labels": TEXT})
    out.loss.backward()
    waited = compared(out.logits, started(params).grad, truth)
    return {**found, **{f"{name}, deferred": value for name, value in waited.items()}}


@RECIPES.recipe("rows made before", early=True)
@RECIPES.recipe("rows made after", early=False)
@RECIPES.recipe("untied, rows made after", early=False, tie=False)
@RECIPES.recipe("rows made after, after a forward", early=False, history="forward")
@RECIPES.recipe("rows made after, after a call", early=False, history="call")
@RECIPES.recipe("gradient checkpointing", early=True, history="checkpointing")
def plain(early: bool, tie: bool = True, history: str = "") -> dict[str, float]:
    model, params, truth = made(tie=tie)
    model = partitioned(model)
    if history == "checkpointing":
        model.train().gradient_checkpointing_enable()
    if history == "forward":
        model(TEXT)
    params = params if early else again(model, params)
    if history == "call":
        said(model, params)
    return stepped(model, params, truth)


@RECIPES.recipe("generate")
def generate() -> dict[str, float]:
    return generated(llama(), partitioned)


@RECIPES.recipe("torch.func.grad")
def func_grad() -> dict[str, float]:
    model, params, _ = made()
    partitioned(model)
    return refused(
        RuntimeError,
        "loss.backward()",
        lambda: torch.func.grad(lambda p: said(model, p).loss)(params),
    )


@RECIPES.recipe("a TokenModule over it")
def module() -> dict[str, float]:
    model, params, truth = made()
    return stepped_as_module(partitioned(model), params, truth)


@RECIPES.recipe("an adapter for each example")
def mixed() -> dict[str, float]:
    plain = llama()
    two = [random_rows(plain, IDS[:2], 0), random_rows(plain, IDS[1:], 1)]
    changed = [edited(one, llama()) for one in two]
    truth = torch.cat([m(x[None]).logits for m, x in zip(changed, TEXT, strict=True)])
    model = partitioned(plain)
    found = functional_call(model, patch_mixed(two, [0, 1]), (TEXT,)).logits
    return {"logits": distance(found, truth)}


@RECIPES.recipe("new tokens")
def grown() -> dict[str, float]:
    ids = [24, 7, 23]
    x = TEXT.clone()
    x[0, 2], x[1, 1] = 23, 24
    model = llama()
    params = random_rows(model, ids, grow=True, requires_grad=True)
    out = said(model, params, x)
    out.loss.backward()
    truth = out.logits.detach(), started(params).grad.clone()
    started(params).grad = None
    found = said(partitioned(model), params, x)
    found.loss.backward()
    return compared(found.logits, started(params).grad, truth)


for name in LONGER:  # all ranks in one order
    if name == "a bias, and a parameter of the root":  # reads the head elsewhere
        continue

    @RECIPES.recipe(f"new tokens, {name}", make=LONGER[name])
    def new_tokens(make: Any) -> dict[str, float]:
        return with_new_tokens(make, partitioned, lora=False)  # type: ignore[no-any-return]


@RECIPES.recipe("new tokens, a LoRA on the head that is trained")
def trained_lora() -> dict[str, float]:
    model = LONGER["a LoRA on the head"]()
    params = random_rows(model, [24, 23], grow=True)
    model = partitioned(model)
    return refused(RuntimeError, "would get no gradient", lambda: said(model, params))


@RECIPES.recipe("where rows start")
def starts() -> dict[str, float]:
    return starts_alike(llama(), partitioned(llama()))
