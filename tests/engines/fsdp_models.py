"""Recipes of FSDP2: other models than the toy Llama, and what happened before they were sharded."""

from __future__ import annotations

import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor
from transformers import BertConfig, BertForMaskedLM, T5Config, T5ForConditionalGeneration

from tests.engines.fsdp import shard
from tests.engines.work import (
    IDS,
    TEXT,
    Recipes,
    compared,
    distance,
    edited,
    made,
    refused,
    started,
)
from tests.helpers.llama import llama
from tests.helpers.rows import random_rows
from ttfunc import TokenModule, functional_call, init_deltas, patch, save_as_lora
from ttfunc.module.trl import fused_call

RECIPES = Recipes()


class Scaled(nn.Module):
    """Tied, with a bias at its head, and a parameter of the root's own."""

    def __init__(self, read: Callable[[nn.Module], Tensor] = lambda head: head.weight) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(23, 8), nn.Linear(8, 23)
        self.head.weight = self.embed.weight
        self.scale = nn.Parameter(torch.randn(8))
        self.read = read

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(self.embed(x) * self.scale, self.read(self.head), self.head.bias)


def bert() -> nn.Module:
    sizes = {"vocab_size": 23, "hidden_size": 8, "num_attention_heads": 2, "intermediate_size": 16}
    return BertForMaskedLM(BertConfig(num_hidden_layers=1, **sizes))


def t5() -> nn.Module:
    sizes = {"vocab_size": 23, "d_model": 8, "d_kv": 4, "d_ff": 16, "num_heads": 2}
    config = T5Config(num_layers=1, decoder_start_token_id=0, **sizes)
    return T5ForConditionalGeneration(config)


MODELS: dict[str, tuple[Callable[[], nn.Module], dict[str, Any]]] = {
    "a bias, and a parameter of the root": (Scaled, {}),
    "a head read by parameters()": (lambda: Scaled(lambda head: next(head.parameters())), {}),
    "a head read in _parameters": (lambda: Scaled(lambda head: head._parameters["weight"]), {}),
    "BERT": (bert, {}),
    "T5": (t5, {"labels": TEXT}),
}


def whole(model: nn.Module) -> nn.Module:
    """Frozen, and alike on all ranks."""
    torch.manual_seed(0)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    return model.eval().requires_grad_(False)


for name, (make, options) in MODELS.items():
    for history in ("nothing", "a no_grad forward", "a backward"):

        @RECIPES.recipe(f"{name}, after {history}", make=make, options=options, history=history)
        def other_models(make: Any, options: Any, history: str) -> dict[str, float]:
            plain, model = whole(make()), whole(make())
            params = random_rows(plain, IDS, targets=None, requires_grad=True)
            expected = logits_of(functional_call(plain, patch(params), TEXT, options))
            expected.square().mean().backward()
            changed = edited(params, whole(make()))
            oracle = logits_of(changed(TEXT, **options))
            fully_shard(model, mesh=init_device_mesh("cpu", (dist.get_world_size(),)))
            if history == "a no_grad forward":
                with torch.no_grad():
                    model(TEXT, **options)
            late = init_deltas(model, IDS, init=started(params).detach(), requires_grad=True)
            for _ in range(1 + (history == "a backward")):
                started(late).grad = None
                found = logits_of(functional_call(model, patch(late), TEXT, options))
                found.square().mean().backward()
            return compared(found, started(late).grad, (oracle.detach(), started(params).grad))


class Added(nn.Module):
    """Tied, with a bias of its own that it adds to the logits."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(23, 8), nn.Linear(8, 23, bias=False)
        self.head.weight = self.embed.weight
        self.bias = nn.Parameter(torch.randn(23))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.embed(x)) + self.bias


def adapted(*targets: str) -> nn.Module:
    config = peft.LoraConfig(target_modules=list(targets), r=2, lora_bias="lm_head" in targets)
    with warnings.catch_warnings():  # of ties, and of merging
        warnings.simplefilter("ignore")
        return peft.get_peft_model(llama(), config)


LONGER: dict[str, Callable[[], nn.Module]] = {
    "a bias, and a parameter of the root": Scaled,
    "a bias that is added to the logits": Added,
    "BERT": bert,
    "a LoRA on the head": lambda: adapted("lm_head"),
    "a LoRA on the embedding": lambda: adapted("embed_tokens"),
}


def with_new_tokens(
    make: Callable[[], nn.Module], shard: Callable[[nn.Module], nn.Module], lora: bool = True
) -> Any:
    """Logits and gradients of new tokens, rows' and LoRA's, in an engine and without it."""
    ids, x = [24, 7, 23], TEXT.clone()
    x[0, 2], x[1, 1] = 23, 24
    plain, model = whole(make()), whole(make())
    params = random_rows(plain, ids, grow=True, requires_grad=True)
    late = init_deltas(model, ids, grow=True, init=started(params).detach(), requires_grad=True)
    found = {}
    for one, rows in ((plain, params), (shard(model), late)):
        for name, parameter in one.named_parameters():
            parameter.requires_grad_(lora and "lora_" in name)
        logits = logits_of(functional_call(one, patch(rows), x))
        logits.square().mean().backward()
        of_lora = [p.grad for p in one.parameters() if p.requires_grad]
        of_lora = [grad.full_tensor() if isinstance(grad, DTensor) else grad for grad in of_lora]
        found[one is plain] = logits, started(rows).grad, of_lora
    (logits, rows, of_lora), truth = found[False], found[True]
    distances = {
        str(i): distance(a, b) for i, (a, b) in enumerate(zip(of_lora, truth[2], strict=True))
    }
    return {**compared(logits, rows, truth[:2]), **distances}


def sharded(model: nn.Module) -> nn.Module:
    return fully_shard(model, mesh=init_device_mesh("cpu", (dist.get_world_size(),)))


for name, make in LONGER.items():

    @RECIPES.recipe(f"new tokens, {name}", make=make)
    def new_tokens(make: Any) -> dict[str, float]:
        return with_new_tokens(make, sharded)  # type: ignore[no-any-return]


def logits_of(out: Any) -> Tensor:
    found: Tensor = getattr(out, "logits", out)
    return found


@RECIPES.recipe("untied before it was sharded", tie=True)
@RECIPES.recipe("tied before it was sharded", tie=False)
def changed_between(tie: bool) -> dict[str, float]:
    model, params, _ = made(tie=tie)
    weight = model.model.embed_tokens.weight
    model.lm_head.weight = nn.Parameter(weight.clone(), requires_grad=False) if tie else weight
    shard(model)
    words = "more than one parameter" if tie else "ties 'model.embed_tokens.weight' to more places"
    return refused(ValueError, words, lambda: functional_call(model, patch(params), (TEXT,)))


@RECIPES.recipe("another matrix before it was sharded")
def replaced_between() -> dict[str, float]:
    model, params, _ = made(tie=False)
    model.model.embed_tokens.weight = nn.Parameter(torch.randn(23, 8), requires_grad=False)
    dist.broadcast(model.model.embed_tokens.weight.data, 0)
    shard(model)
    return refused(
        ValueError, "other values", lambda: functional_call(model, patch(params), (TEXT,))
    )


@RECIPES.recipe("a method that FSDP2 gathers for")
def registered() -> dict[str, float]:
    model, params, _ = made()
    options = {"max_new_tokens": 3, "do_sample": False, "pad_token_id": 0}
    truth = edited(params, llama()).generate(TEXT, **options)
    register_fsdp_forward_method(shard(model), "generate")
    found = functional_call(model, patch(params), (TEXT,), options, method="generate")
    return {"tokens": float((found != truth).sum())}


@RECIPES.recipe("a loss that takes the head's weight, outside of its module")
def fused() -> dict[str, float]:
    model, params, truth = made()
    module = TokenModule(shard(model), params)
    with torch.no_grad():
        module(TEXT)  # the root stays gathered
    with fused_call(module, {"fused_lm_head": True}):
        states = module.base_model(TEXT).last_hidden_state
        logits = states @ module.get_output_embeddings().weight[0:23].T
    return {"logits": distance(logits, truth[0])}


@RECIPES.recipe("parameters of a sharded LoRA beside rows")
def beside_lora() -> dict[str, float]:
    model = peft.get_peft_model(llama(), peft.LoraConfig(target_modules=["q_proj"]))
    rows = random_rows(model, IDS)
    expected = functional_call(model, patch(rows), (TEXT,)).logits.detach()
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for block in model.base_model.model.model.layers:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    others = {name: one for name, one in model.named_parameters() if "lora" in name}
    found = functional_call(model, {**patch(rows), **others}, (TEXT,)).logits
    copies = {name: one.detach().clone() for name, one in others.items()}
    wrong = lambda: functional_call(model, {**patch(rows), **copies}, (TEXT,))  # noqa: E731
    return {"logits": distance(found, expected), **refused(ValueError, "full_tensor()", wrong)}


@RECIPES.recipe("rows as a LoRA, written by one rank")
def as_lora() -> dict[str, float]:
    _model, params, _ = made()  # alive, so that the rows know their model
    folder = Path(tempfile.mkdtemp())
    save_as_lora(params, folder / "plain")
    late = init_deltas(shard(llama()), IDS, init=started(params).detach())
    if dist.get_rank() == 0:
        save_as_lora(late, folder / "late")
        files = [folder / name / "adapter_model.safetensors" for name in ("plain", "late")]
        return {"files": float(files[0].read_bytes() != files[1].read_bytes())}
    return {"files": 0.0}


@RECIPES.recipe("save_pretrained of a TokenModule over it")
def saved_whole() -> dict[str, float]:
    model, params, _ = made()
    module = TokenModule(shard(model), params)
    folder = Path(tempfile.mkdtemp()) / "merged"
    found = refused(RuntimeError, "merge_checkpoint", lambda: module.save_pretrained(folder))
    return {**found, "files": float(folder.exists())}
