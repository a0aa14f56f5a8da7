"""The corpus: small models, one for each way in which a token matrix is held, tied or read."""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

V, D = 23, 8


class Language(nn.Module):
    """Embedding, a mixing body, head; `(B, L)` tokens to `(B, L, V)` logits."""

    def __init__(
        self, *, tie: bool = True, bias: bool = False, vocabulary: int = V, **embedding
    ) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(vocabulary, D, **embedding)
        self.body = nn.Linear(D, D)
        self.lm_head = nn.Linear(D, vocabulary, bias=bias)
        if tie:
            self.lm_head.weight = self.embed_tokens.weight

    def embed(self, x: Tensor) -> Tensor:
        return self.embed_tokens(x)

    def mix(self, h: Tensor) -> Tensor:
        # A running mean, so that each position reads those before it.
        steps = torch.arange(1, h.shape[-2] + 1, device=h.device).unsqueeze(-1)
        return torch.tanh(self.body(h.cumsum(-2) / steps))

    def head(self, h: Tensor) -> Tensor:
        return self.lm_head(h)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.mix(self.embed(x)))


class ScaledEmbedding(nn.Embedding):
    """Gemma's: the output is scaled, the weight is not."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * 7.0


class Scaled(Language):
    def __init__(self, *, vocabulary: int = V) -> None:
        super().__init__(vocabulary=vocabulary)
        self.embed_tokens = ScaledEmbedding(vocabulary, D)
        self.lm_head.weight = self.embed_tokens.weight


class StorageTied(Language):
    """Two Parameter objects over one memory, as some loaders and `nn.Parameter(w.data)` make."""

    def __init__(self, **sizes) -> None:
        super().__init__(tie=False, **sizes)
        self.lm_head.weight = nn.Parameter(self.embed_tokens.weight.data)


class EncoderDecoder(Language):
    """T5's: one Embedding module by three paths, and a head tied to it."""

    def __init__(self, **sizes) -> None:
        super().__init__(**sizes)
        self.shared = self.embed_tokens
        self.encoder = nn.ModuleDict({"embed_tokens": self.shared, "mix": nn.Linear(D, D)})

    def get_input_embeddings(self) -> nn.Module:
        return self.shared

    def forward(self, x: Tensor) -> Tensor:
        memory = torch.tanh(self.encoder["mix"](self.encoder["embed_tokens"](x))).mean(1, True)
        return self.head(self.mix(self.shared(x.flip(1)) + memory))


class MaskedLanguage(Language):
    """BERT's head: a transform, a decoder with a bias, and a norm of its own."""

    def __init__(self, **sizes) -> None:
        super().__init__(bias=True, padding_idx=0, **sizes)
        self.transform = nn.Sequential(nn.Linear(D, D), nn.GELU(), nn.LayerNorm(D))

    def head(self, h: Tensor) -> Tensor:
        return self.lm_head(self.transform(h))


class ByTranspose(Language):
    def head(self, h: Tensor) -> Tensor:
        return h @ self.lm_head.weight.T


class ByEinsum(Language):
    def head(self, h: Tensor) -> Tensor:
        return torch.einsum("bld,vd->blv", h, self.lm_head.weight)


class Fused(torch.autograd.Function):
    """A head with a backward of its own, as fused-loss kernels are written."""

    @staticmethod
    def forward(h: Tensor, w: Tensor) -> Tensor:
        return h @ w.T

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, Tensor]:
        h, w = ctx.saved_tensors
        return grad @ w, grad.flatten(0, -2).T @ h.flatten(0, -2)


class ByFunction(Language):
    def head(self, h: Tensor) -> Tensor:
        return Fused.apply(h, self.lm_head.weight)


class ByReading(Language):
    """MobileBert's: the head is put together from the weight itself."""

    def head(self, h: Tensor) -> Tensor:
        return h @ torch.cat([self.lm_head.weight.t(), self.lm_head.weight.t() * 0.5], 0)[:D]


CORPUS = {
    "tied": Language,
    "untied": partial(Language, tie=False),
    "biased": partial(Language, bias=True),
    "scaled": Scaled,
    "padding": partial(Language, padding_idx=3),
    "max_norm": partial(Language, max_norm=1.5),
    "by_frequency": partial(Language, scale_grad_by_freq=True),
    "storage_tied": StorageTied,
    "encoder_decoder": EncoderDecoder,
    "masked": MaskedLanguage,
    "transpose": ByTranspose,
    "einsum": ByEinsum,
    "function": ByFunction,
    "reading": ByReading,
}


def make(case: str, seed: int = 0) -> nn.Module:
    """The model of that name, the same for the same seed, with no zero to hide a mistake behind."""
    torch.manual_seed(seed)
    model = CORPUS[case]()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_()
    return model


def tokens(*hits: int, batch: int = 3, length: int = 6, seed: int = 1) -> Tensor:
    """`(batch, length)` random token ids that contain `hits`."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randint(0, V, (batch, length), generator=generator)
    x.view(-1)[: len(hits)] = torch.tensor(hits, dtype=torch.int64)
    return x


def loss_of(logits: Tensor) -> Tensor:
    """A loss that reads every logit, and each of them differently."""
    targets = torch.arange(logits.shape[:-1].numel()) % logits.shape[-1]
    return F.cross_entropy(logits.flatten(0, -2), targets)
