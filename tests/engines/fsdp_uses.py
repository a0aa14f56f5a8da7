"""Recipes of FSDP2: what is done with a sharded model, and what is refused."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from tests.engines.fsdp import shard
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
    oracle,
    refused,
    said,
    started,
    starts_alike,
    stepped,
    stepped_as_module,
)
from tests.helpers.llama import llama
from tests.helpers.rows import random_rows
from ttfunc import TokenModule, functional_call, init_deltas, merge, patch, patch_mixed, unmerge

RECIPES = Recipes()


@RECIPES.recipe("gradient checkpointing")
def checkpointing() -> dict[str, float]:
    model, params, truth = made()
    model.train().gradient_checkpointing_enable()
    return stepped(shard(model), params, truth)


@RECIPES.recipe("torch.func.grad")
def func_grad() -> dict[str, float]:
    model, params, truth = made()
    shard(model)
    params = again(model, params)

    def loss(params: Any) -> Any:
        out = said(model, params)
        return out.loss, out.logits

    gradient, logits = torch.func.grad(loss, has_aux=True)(params)
    return compared(logits * 1, started(gradient), truth)


@RECIPES.recipe("vmap(grad)")
def per_example() -> dict[str, float]:
    model, params, _ = made(attn_implementation="eager")
    truths = [oracle(llama(), params, x[None]) for x in TEXT]
    shard(model)

    def loss(params: Any, x: Any) -> Any:
        out = said(model, params, x[None])
        return out.loss, out.logits

    gradient, logits = torch.vmap(torch.func.grad(loss, has_aux=True), (None, 0))(params, TEXT)
    return compared(
        logits[:, 0] * 1,
        started(gradient),
        tuple(map(torch.stack, ([one[0][0] for one in truths], [one[1] for one in truths]))),
    )


@RECIPES.recipe("jvp")
def forward_mode() -> dict[str, float]:
    model, params, truth = made(attn_implementation="eager")
    shard(model)
    (name,) = params.deltas
    tangent = torch.ones_like(started(params))

    def loss(rows: Any) -> Any:
        return said(model, type(params)({name: rows}, params.specs)).loss

    _, found = torch.func.jvp(loss, (started(params).detach(),), (tangent,))
    expected = (truth[1] * tangent).sum()
    return {"derivative": abs(float(found - expected))}


@RECIPES.recipe("generate")
def generate() -> dict[str, float]:
    return generated(llama(), shard)


@RECIPES.recipe("new tokens")
def grown() -> dict[str, float]:
    ids = [24, 7, 23]
    x = TEXT.clone()
    x[0, 2], x[1, 1] = 23, 24
    plain = llama()
    params = random_rows(plain, ids, grow=True, requires_grad=True)
    out = said(plain, params, x)
    out.loss.backward()
    truth = out.logits.detach(), started(params).grad
    model = shard(llama())
    start = started(params).detach().clone()
    late = init_deltas(model, ids, grow=True, init=start, requires_grad=True)
    found = said(model, late, x)
    found.loss.backward()
    return compared(found.logits, started(late).grad, truth)


@RECIPES.recipe("deferred logits")
def deferred() -> dict[str, float]:
    model, params, truth = made()
    shard(model)
    weights = patch(params, deferred_logits=True)
    out = functional_call(model, weights, kwargs={"input_ids": TEXT})
    loss = model.loss_function(out.logits, TEXT, vocab_size=model.config.vocab_size)
    loss.backward()
    return compared(out.logits, started(params).grad, truth)


@RECIPES.recipe("an adapter for each example")
def mixed() -> dict[str, float]:
    plain = llama()
    two = [random_rows(plain, IDS[:2], 0), random_rows(plain, IDS[1:], 1)]
    truth = functional_call(plain, patch_mixed(two, [1, 0]), (TEXT,)).logits
    model = shard(llama())
    late = [
        init_deltas(model, one.token_indices[name], init=one.deltas[name])
        for one in two
        for name in one.deltas
    ]
    found = functional_call(model, patch_mixed(late, [1, 0]), (TEXT,)).logits
    return {"logits": distance(found, truth)}


@RECIPES.recipe("a TokenModule over it")
def module() -> dict[str, float]:
    model, params, truth = made()
    return stepped_as_module(shard(model), params, truth)


@RECIPES.recipe("the TokenModule sharded too")
def module_sharded() -> dict[str, float]:
    model, params, truth = made()
    shard(model)
    over = fully_shard(
        TokenModule(model, params), mesh=init_device_mesh("cpu", (dist.get_world_size(),))
    )
    out = over(input_ids=TEXT, labels=TEXT)
    out.loss.backward()
    (rows,) = over.parameters()
    return compared(out.logits, rows.grad.full_tensor(), truth)


@RECIPES.recipe("merge and unmerge of a sharded state dict")
def merged() -> dict[str, float]:
    model, params, _ = made()
    shard(model)
    before = model.state_dict()
    after = merge(before, params)
    truth = merge(llama().state_dict(), params)
    wrong = [n for n in truth if not torch.equal(after[n].full_tensor(), truth[n])]
    back = unmerge(after, params)
    wrong += [n for n in before if not torch.equal(back[n].to_local(), before[n].to_local())]
    wrong += [
        n
        for n in before
        if n not in params.specs["model.embed_tokens.weight"].names and after[n] is not before[n]
    ]
    model.load_state_dict(after)
    return {
        "tensors": float(len(wrong)),
        "logits": distance(model(TEXT).logits, edited(params, llama())(TEXT).logits),
    }


@RECIPES.recipe("where rows start")
def starts() -> dict[str, float]:
    return starts_alike(llama(), shard(llama()))


@RECIPES.recipe("rows of another sharded model")
def another() -> dict[str, float]:
    model, other = shard(llama()), shard(llama())
    params = init_deltas(model, IDS)
    return refused(ValueError, "stale patch", lambda: said(other, params))


@RECIPES.recipe("rows of another model, which was not sharded then")
def another_plain() -> dict[str, float]:
    other, params, _ = made()
    model = shard(llama())
    found = refused(ValueError, "another model than the", lambda: said(model, params))
    assert other is not model  # and alive until here
    return found


@RECIPES.recipe("a copy of the matrix")
def copied() -> dict[str, float]:
    model, params, _ = made()
    before = patch(params, dense=True)
    shard(model)
    late = again(model, params)
    refusals = [
        refused(RuntimeError, "Leave dense out", lambda: patch(late, dense=True)),
        refused(RuntimeError, "Leave dense out", lambda: functional_call(model, before, (TEXT,))),
    ]
    return {"refused": max(one["refused"] for one in refusals)}


@RECIPES.recipe("an embedding that rescales itself")
def rescaling() -> dict[str, float]:
    model = nn.Sequential(nn.Embedding(23, 8, max_norm=1.0)).requires_grad_(False)
    fully_shard(model, mesh=init_device_mesh("cpu", (dist.get_world_size(),)))
    params = init_deltas(model, IDS)
    return refused(RuntimeError, "rescales it in place", lambda: patch(params))


@RECIPES.recipe("a compiled call")
def compiled() -> dict[str, float]:
    model, params, _ = made()
    shard(model)
    call = torch.compile(lambda: said(model, params).loss, backend="eager", fullgraph=True)
    return refused(Exception, "Compile the model's blocks", call)


@RECIPES.recipe("a head that is read outside of its module")
def outside() -> dict[str, float]:
    model, params, _ = made()
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for end in (model.model.embed_tokens, model.lm_head):
        end.weight = nn.Parameter(end.weight.detach().clone(), requires_grad=False)
    model.config.tie_word_embeddings = False
    for end in (model.model.embed_tokens, model.lm_head):
        fully_shard(end, mesh=mesh)
    params = random_rows(model, IDS, targets="lm_head")
    model.forward = lambda x: nn.functional.linear(model.model(x)[0], model.lm_head.weight)
    weights = patch(params)
    return refused(
        RuntimeError, "not gathered here", lambda: functional_call(model, weights, (TEXT,))
    )
