"""The slow, obvious reference: copy the model, write the rows into it one by one, run it."""

from __future__ import annotations

import copy
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from ttfunc import TokenDeltas


def edited(model: nn.Module, params: TokenDeltas) -> nn.Module:
    """A copy of the model with the rows written in place, under every name of each matrix."""
    model = copy.deepcopy(model)
    weights = dict(model.named_parameters(remove_duplicate=False))
    weights |= dict(model.named_buffers(remove_duplicate=False))
    with torch.no_grad():
        for name, delta in params.deltas.items():
            for alias in params.tied[name]:
                for row, token in enumerate(params.token_indices[name].tolist()):
                    weights[alias][token] = delta[row].to(weights[alias].dtype)
    return model


def row_gradients(model: nn.Module, params: TokenDeltas) -> dict[str, Tensor]:
    """After `backward` on an edited model: the trained rows of its full gradients."""
    weights = dict(model.named_parameters(remove_duplicate=False))
    gradients = {}
    for name, ids in params.token_indices.items():
        distinct = {id(weights[alias]): weights[alias] for alias in params.tied[name]}
        full = [w.grad for w in distinct.values() if w.grad is not None]
        gradients[name] = torch.stack([grad[ids] for grad in full]).sum(0)
    return gradients


def snapshot(model: nn.Module) -> dict[str, object]:
    """Everything about a model that no call may change."""
    tensors = [*model.named_parameters(remove_duplicate=False), *model.named_buffers()]
    return {
        "identities": {name: id(tensor) for name, tensor in tensors},
        "bytes": {name: bits(tensor) for name, tensor in tensors},
        "requires_grad": {name: tensor.requires_grad for name, tensor in tensors},
        "gradients": {name: tensor.grad is None for name, tensor in tensors},
        "training": {name: module.training for name, module in model.named_modules()},
        "types": {name: type(tensor) for name, tensor in tensors},
    }


def bits(tensor: Tensor) -> bytes:
    """The bytes of a tensor, so that NaN equals itself and -0 is not 0."""
    return tensor.detach().cpu().reshape(-1).contiguous().view(torch.uint8).numpy().tobytes()


def same_bits(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> bool:
    """Whether two state dicts hold the same bytes under the same names."""
    return a.keys() == b.keys() and all(
        a[name].dtype == b[name].dtype and bits(a[name]) == bits(b[name]) for name in a
    )
