"""The ways to train k token rows of a frozen model, on the same work."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeAlias

import peft
import torch
import torch.nn.functional as F
import transformers
from torch import Tensor

import ttfunc
from examples.shared.smollm2 import fetch_smollm2, load

SMOLLM2: dict[str, Any] = {"vocabulary": 49_152, "width": 576, "layers": 30}

Step: TypeAlias = Callable[[], Any]
Wrap: TypeAlias = Callable[[Any], Any]


def as_it_is(loss: Any) -> Any:
    """In the place of `torch.compile`."""
    return loss


@dataclass(frozen=True)
class Work:
    """A tied `(vocabulary, width)` matrix on a short Llama, a batch of one text, and k rows.

    labelled: the last of so many parts of the text has labels (for those who take them).
    weights: `"random"`, or `"SmolLM2"` for the pretrained model, whose sizes are then its own.
    """

    vocabulary: int = 128_000
    width: int = 1024
    layers: int = 1
    dtype: str = "float32"
    tokens: int = 16
    rows: int = 4
    labelled: int = 1
    device: str = "cpu"
    weights: str = "random"

    def __str__(self) -> str:
        return f"{self.vocabulary:,}×{self.width:,} {self.dtype}"

    @property
    def matrix_bytes(self) -> int:
        """Size of the token matrix."""
        size: int = getattr(torch, self.dtype).itemsize
        return self.vocabulary * self.width * size

    def model(self) -> Any:
        """A frozen model."""
        if self.weights == "SmolLM2":
            known: Any = copy.deepcopy(smollm2())
            return known.to(self.device, getattr(torch, self.dtype))
        config = transformers.LlamaConfig(
            vocab_size=self.vocabulary,
            hidden_size=self.width,
            intermediate_size=2 * self.width,
            num_hidden_layers=self.layers,
            num_attention_heads=self.width // 64,
            tie_word_embeddings=True,
        )
        torch.manual_seed(0)
        model: Any = transformers.LlamaForCausalLM(config).requires_grad_(False)
        return model.to(self.device, getattr(torch, self.dtype))

    def idx(self) -> list[int]:
        """Ids spread over the vocabulary."""
        return list(range(0, self.vocabulary, self.vocabulary // self.rows))[: self.rows]

    def text(self) -> Tensor:
        """`(1, tokens)` ids, a quarter of them trained ones."""
        torch.manual_seed(1)
        x = torch.randint(0, self.vocabulary, (1, self.tokens))
        hits = torch.tensor(self.idx())[torch.randint(0, self.rows, (self.tokens // 4,))]
        x[0, : self.tokens // 4] = hits
        return x.to(self.device)

    def labels(self) -> Tensor:
        """Those of the text; -100 where there is none."""
        labels = self.text()
        labels[0, : self.tokens - self.tokens // self.labelled] = -100
        return labels


@functools.cache
def smollm2() -> Any:
    """The pretrained model, which takes some seconds to load."""
    model, _ = load(fetch_smollm2())
    return model


def frozen_floor(
    model: Any, x: Tensor, idx: list[int], wrap: Wrap = as_it_is, *, labels: Tensor | None = None
) -> Step:
    """Running the frozen model: the embedding's output alone requires grad."""
    labels = x if labels is None else labels

    @wrap
    def loss(h: Tensor, x: Tensor) -> Tensor:
        return model(inputs_embeds=h, labels=x).loss  # type: ignore[no-any-return]

    return lambda: loss(model.get_input_embeddings()(x).requires_grad_(), labels).backward()


def torch_chunked(
    model: Any, x: Tensor, idx: list[int], wrap: Wrap = as_it_is, *, labels: Tensor | None = None
) -> Step:
    """The floor with torch's own loss by chunks, in place of the head: it trains no row."""
    labels = F.pad(x if labels is None else labels, (0, 1), value=-100)[:, 1:].flatten()
    head = model.get_output_embeddings().weight
    # The chunks that it would choose itself take ten times as long on a CPU.
    options = torch.nn.LinearCrossEntropyOptions(batch_chunk_size=128)

    def step() -> None:
        h = model.get_input_embeddings()(x).requires_grad_()
        states = model.base_model(inputs_embeds=h).last_hidden_state.flatten(0, 1)
        F.linear_cross_entropy(states, head, labels, options=options).backward()

    return step


def trl_chunked(
    model: Any, x: Tensor, idx: list[int], wrap: Wrap = as_it_is, *, labels: Tensor | None = None
) -> Step:
    """The floor with TRL's loss by chunks, in place of the head: it trains no row."""
    labels = x if labels is None else labels
    _add_fused_head(model)

    def step() -> None:
        h = model.get_input_embeddings()(x).requires_grad_()
        model(inputs_embeds=h, labels=labels, fused_lm_head=True).loss.backward()

    return step


def _add_fused_head(model: Any) -> None:
    # Not above: it takes seconds, and each figure of memory is from a process of its own.
    from trl.trainer.utils import add_fused_lm_head

    add_fused_lm_head(model)


def trl_on_ttfunc(
    model: Any, x: Tensor, idx: list[int], wrap: Wrap = as_it_is, *, labels: Tensor | None = None
) -> Step:
    """TRL's loss by chunks on a TokenModule, as its SFTTrainer has it."""
    labels = x if labels is None else labels
    module = ttfunc.TokenModule(model, ttfunc.init_deltas(model, idx))
    _add_fused_head(module)
    return lambda: module(input_ids=x, labels=labels, fused_lm_head=True).loss.backward()


def deferred(
    model: Any,
    x: Tensor,
    idx: list[int],
    wrap: Wrap = as_it_is,
    *,
    labels: Tensor | None = None,
    **options: bool,
) -> Step:
    """Deferred weights, which is what ttfunc does by default."""
    params = ttfunc.init_deltas(model, idx, requires_grad=True)
    labels = x if labels is None else labels

    @wrap
    def loss(params: ttfunc.TokenDeltas, x: Tensor) -> Tensor:
        kwargs = {"input_ids": x, "labels": labels}
        out = ttfunc.functional_call(model, ttfunc.patch(params, **options), kwargs=kwargs)
        return out.loss  # type: ignore[no-any-return]

    return lambda: loss(params, x).backward()


def dense(model: Any, x: Tensor, idx: list[int], wrap: Wrap = as_it_is) -> Step:
    """Weights that are copied at once."""
    return deferred(model, x, idx, wrap, dense=True)


def no_logits(
    model: Any, x: Tensor, idx: list[int], wrap: Wrap = as_it_is, *, labels: Tensor | None = None
) -> Step:
    """Deferred logits as well."""
    return deferred(model, x, idx, wrap, labels=labels, deferred_logits=True)


def new_tokens(model: Any, x: Tensor, idx: list[int], wrap: Wrap = as_it_is) -> Step:
    """As many tokens that the model does not have, in the places of those that are trained."""
    ids, x = _renumbered(model, x, idx)
    params = ttfunc.init_deltas(model, ids, grow=True, init="mean", requires_grad=True)

    @wrap
    def loss(params: ttfunc.TokenDeltas, x: Tensor) -> Tensor:
        kwargs = {"input_ids": x, "labels": x}
        return ttfunc.functional_call(model, ttfunc.patch(params), kwargs=kwargs).loss  # type: ignore[no-any-return]

    return lambda: loss(params, x).backward()


def peft_resized(model: Any, x: Tensor, idx: list[int], wrap: Wrap = as_it_is) -> Step:
    """The same with PEFT, on a model that is resized before."""
    ids, x = _renumbered(model, x, idx)
    model.resize_token_embeddings(max(ids) + 1, mean_resizing=False)
    return peft_tokens(model.requires_grad_(False), x, ids, wrap)


def _renumbered(model: Any, x: Tensor, idx: list[int]) -> tuple[list[int], Tensor]:
    """New ids in the places of `idx`, and the text with them."""
    vocabulary = len(model.get_input_embeddings().weight)
    ids = [vocabulary + row for row in range(len(idx))]
    x = x.clone()
    for old, new in zip(idx, ids, strict=True):
        x[x == old] = new
    return ids, x


def peft_tokens(
    model: Any, x: Tensor, idx: list[int], wrap: Wrap = as_it_is, *, labels: Tensor | None = None
) -> Step:
    """PEFT's TrainableTokensConfig."""
    wrapped = peft.get_peft_model(model, peft.TrainableTokensConfig(token_indices=idx))
    return _plain_step(wrapped, x, wrap, labels)


def peft_lora(model: Any, x: Tensor, idx: list[int], wrap: Wrap = as_it_is) -> Step:
    """PEFT's token rows inside LoRA, whose own matrices are as small as they can be."""
    config = peft.LoraConfig(r=1, target_modules=["q_proj"], trainable_token_indices=idx)
    return _plain_step(peft.get_peft_model(model, config), x, wrap)


def gradient_mask(model: Any, x: Tensor, idx: list[int], wrap: Wrap = as_it_is) -> Step:
    """What people write by hand: the full gradient, zeroed but for the rows."""
    weight = model.get_input_embeddings().weight.requires_grad_()
    mask = torch.zeros(len(weight), 1, dtype=weight.dtype, device=weight.device)
    mask[idx] = 1
    weight.register_hook(lambda gradient: gradient * mask)
    return _plain_step(model, x, wrap)


def full_embedding(model: Any, x: Tensor, idx: list[int], wrap: Wrap = as_it_is) -> Step:
    """Training the whole matrix."""
    model.get_input_embeddings().requires_grad_()
    return _plain_step(model, x, wrap)


def _plain_step(model: Any, x: Tensor, wrap: Wrap, labels: Tensor | None = None) -> Step:
    labels = x if labels is None else labels

    @wrap
    def loss(x: Tensor) -> Tensor:
        return model(input_ids=x, labels=labels).loss  # type: ignore[no-any-return]

    def step() -> None:
        model.zero_grad()  # as a training loop does, so that no gradient adds up
        loss(x).backward()

    return step


# These do not change the model, so they can share one.
LEAVE_THE_MODEL = (
    *("frozen floor", "torch's chunks", "ttfunc", "ttfunc, no logits"),
    *("ttfunc, dense", "ttfunc, new tokens", "TRL on ttfunc"),
)
CONTESTANTS: dict[str, Callable[..., Step]] = {
    "frozen floor": frozen_floor,
    "ttfunc": deferred,
    "ttfunc, dense": dense,
    "ttfunc, no logits": no_logits,
    "ttfunc, new tokens": new_tokens,
    "torch's chunks": torch_chunked,
    "TRL's chunks": trl_chunked,
    "TRL on ttfunc": trl_on_ttfunc,
    "PEFT": peft_tokens,
    "PEFT, resized": peft_resized,
    "PEFT in LoRA": peft_lora,
    "gradient mask": gradient_mask,
    "full embedding": full_embedding,
}
