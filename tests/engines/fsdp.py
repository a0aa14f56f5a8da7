"""Recipes of FSDP2."""

from __future__ import annotations

import itertools
import tempfile
from typing import Any

import accelerate
import torch
import torch.distributed as dist
from accelerate.utils.fsdp_utils import fsdp2_prepare_model
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from transformers import LlamaForCausalLM
from transformers.distributed import DistributedConfig

from tests.engines.work import (
    IDS,
    LABELS,
    TEXT,
    TEXTS,
    Recipes,
    again,
    compared,
    distance,
    edited,
    made,
    oracle,
    refused,
    said,
    started,
    stepped,
)
from tests.helpers.llama import llama
from tests.helpers.rows import random_rows
from ttfunc import TokenModule, functional_call, init_deltas, merge, patch, patch_mixed, unmerge

RECIPES = Recipes()


def shard(model: Any, **options: Any) -> Any:
    """FSDP2 as its documentation shows it: each block, and the root."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for block in model.model.layers:
        fully_shard(block, mesh=mesh, **options)
    return fully_shard(model, mesh=mesh, **options)


def _nothing(model: Any, params: Any) -> None:
    pass


def _forward(model: Any, params: Any) -> None:
    model(TEXT)


def _no_grad(model: Any, params: Any) -> None:
    with torch.no_grad():
        model(TEXT)


def _backward(model: Any, params: Any) -> None:
    states = torch.randn(*TEXT.shape, model.config.hidden_size, requires_grad=True)
    model(inputs_embeds=states).logits.sum().backward()


def _call(model: Any, params: Any) -> None:
    said(model, params)


HISTORIES = {
    "nothing": _nothing,
    "a forward": _forward,
    "a no_grad forward": _no_grad,
    "a backward": _backward,
    "a call": _call,
}
for (what, before), reshard, early in itertools.product(
    HISTORIES.items(), (True, False), (True, False)
):
    name = f"root wrapped, after {what}{', resharded' * reshard}{', rows made before' * early}"

    @RECIPES.recipe(name, before=before, reshard=reshard, early=early)
    def root_wrapped(before: Any, reshard: bool, early: bool) -> dict[str, float]:
        model, params, truth = made()
        shard(model, reshard_after_forward=reshard)
        params = params if early else again(model, params)
        before(model, params)
        return stepped(model, params, truth)


@RECIPES.recipe("untied")
def untied() -> dict[str, float]:
    model, params, truth = made(tie=False)
    return stepped(shard(model), params, truth)


@RECIPES.recipe("embedding ignored")
def ignored() -> dict[str, float]:
    model, params, truth = made()
    shard(model, ignored_params={model.get_input_embeddings().weight})
    return stepped(model, params, truth)


@RECIPES.recipe("backbone only", early=True)
@RECIPES.recipe("backbone only, untied, rows made after", early=False)
def backbone(early: bool) -> dict[str, float]:
    model, params, truth = made(tie=early)
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    fully_shard(model.model, mesh=mesh)
    return stepped(model, params if early else again(model, params), truth)


@RECIPES.recipe("backbone only, tied, rows made after")
def backbone_late() -> dict[str, float]:
    model, params, _ = made()
    fully_shard(model.model, mesh=init_device_mesh("cpu", (dist.get_world_size(),)))
    return refused(ValueError, "before the model is sharded", lambda: again(model, params))


@RECIPES.recipe("mixed precision")
def mixed_precision() -> dict[str, float]:
    model, params, _ = made()
    other = llama().bfloat16()
    truth = oracle(other, params)
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16)
    model(TEXT)
    shard(model, mp_policy=policy)
    model(TEXT)
    params = again(model, params)
    kept = llama().get_input_embeddings().weight[IDS]
    if not torch.equal(started_originals(params), kept):
        return {"originals": float("inf")}
    out = said(model, params)
    out.loss.backward()
    return {
        f"{name}, of bfloat16": value
        for name, value in compared(out.logits, started(params).grad, truth).items()
    }


def started_originals(params: Any) -> torch.Tensor:
    (originals,) = params.originals.values()
    return originals


@RECIPES.recipe("CPU offload")
def offload() -> dict[str, float]:
    model, params, truth = made()
    return stepped(shard(model, offload_policy=CPUOffloadPolicy(pin_memory=False)), params, truth)


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
    model, params, _ = made()
    options = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
    truth = edited(params, llama()).generate(TEXT, **options)
    shard(model)
    found = functional_call(model, patch(params), (TEXT,), options, method="generate")
    return {"tokens": float((found != truth).sum())}


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
    shard(model)
    over = TokenModule(model, params)
    out = over(input_ids=TEXT, labels=TEXT)
    out.loss.backward()
    return compared(out.logits, started(over.params()).grad, truth)


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


@RECIPES.recipe("DDP over a TokenModule over it, a batch for each rank")
def ddp_over() -> dict[str, float]:
    model, params, _ = made()
    return data_parallel(shard(model), params, wrapped=True)


@RECIPES.recipe("a batch for each rank, all_reduce of the rows' gradient")
def by_hand() -> dict[str, float]:
    model, params, _ = made()
    return data_parallel(shard(model), params, wrapped=False)


def data_parallel(model: Any, params: Any, wrapped: bool) -> dict[str, float]:
    """A step on unequal batches, against one process with all of them."""
    ranks = dist.get_world_size()
    all_labels = torch.cat(LABELS)
    changed: Any = edited(params, llama())
    whole = changed(input_ids=torch.cat(TEXTS), labels=all_labels)
    whole.loss.backward()
    mine = dist.get_rank() % 2
    truth = whole.logits.detach()[[mine]], changed.get_input_embeddings().weight.grad[IDS]

    labels = LABELS[mine]
    count = (labels[:, 1:] != -100).sum()  # of those that are predicted
    total = count.clone()
    dist.all_reduce(total)
    kwargs = {"input_ids": TEXTS[mine], "labels": labels}
    if wrapped:
        over = torch.nn.parallel.DistributedDataParallel(TokenModule(model, params))
        out = over(**kwargs)
        (out.loss * count / total * ranks).backward()  # DDP takes the mean
        (rows,) = over.parameters()
        return compared(out.logits, rows.grad, truth)
    out = functional_call(model, patch(params), kwargs=kwargs)
    (out.loss * count / total).backward()
    for rows in params.deltas.values():
        dist.all_reduce(rows.grad)
    return compared(out.logits, started(params).grad, truth)


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
    plain, model = llama(), shard(llama())
    worst = 0.0
    for init in ("base", "mean", "normal", lambda base, idx: base[idx] * 2):
        draw = [
            torch.Generator().manual_seed(3 + r * (init == "normal")) for r in (0, dist.get_rank())
        ]
        a, b = (
            started(init_deltas(m, IDS, init=init, generator=g))
            for m, g in zip((plain, model), draw, strict=True)
        )
        worst = max(worst, distance(b, a) if init != "base" else float(not torch.equal(a, b)))
    return {"rows": worst}


@RECIPES.recipe("transformers' own configuration")
@RECIPES.recipe("transformers' own configuration, untied", tie=False)
def transformers_own(tie: bool = True) -> dict[str, float]:
    params = random_rows(llama(tie=tie), IDS, requires_grad=True)
    truth = oracle(llama(tie=tie), params)
    config = DistributedConfig(fsdp_size=dist.get_world_size())
    model = LlamaForCausalLM.from_pretrained(saved(llama(tie=tie)), distributed_config=config)
    model.eval().requires_grad_(False)
    model(TEXT)
    return stepped(model, again(model, params), truth)


def saved(model: Any) -> str:
    """A folder with the model, the same for all ranks."""
    folder = [tempfile.mkdtemp() if dist.get_rank() == 0 else None]
    dist.broadcast_object_list(folder)
    if dist.get_rank() == 0:
        model.save_pretrained(folder[0])
    dist.barrier()
    return folder[0]


@RECIPES.recipe("accelerate, rows made before", early=True)
@RECIPES.recipe("accelerate, rows made after", early=False)
def accelerated(early: bool) -> dict[str, float]:
    model, params, truth = made()
    model = accelerate_shards(model)
    found = stepped(model, params if early else again(model, params), truth)
    return {**found, "whole": float(not isinstance(model.model.norm.weight, DTensor))}


def accelerate_shards(model: Any) -> Any:
    """By accelerate's FSDP2, which its `prepare` leaves out on CPUs without a word."""
    plugin = accelerate.FullyShardedDataParallelPlugin(
        fsdp_version=2,
        auto_wrap_policy="transformer_based_wrap",
        transformer_cls_names_to_wrap=["LlamaDecoderLayer"],
    )
    accelerator = accelerate.Accelerator(cpu=True)
    accelerator.state.fsdp_plugin = plugin
    return fsdp2_prepare_model(accelerator, model)
