"""Tensors that have no strided memory, or none at all."""

from __future__ import annotations

import warnings

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from tests.helpers.models import D, V


def unusual(make):
    """Without the warnings that torch gives of its prototypes."""

    def quiet():
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)
            return make()

    return quiet


PARTS = [torch.ones(2), torch.ones(3)]
UNUSUAL = {
    "coo": unusual(lambda: torch.eye(V, D).to_sparse()),
    "csr": unusual(lambda: torch.eye(V, D).to_sparse_csr()),
    "csc": unusual(lambda: torch.eye(V, D).to_sparse_csc()),
    "bsr": unusual(lambda: torch.eye(4).to_sparse_bsr((2, 2))),
    "mkldnn": unusual(lambda: torch.ones(V, D).to_mkldnn()),
    "quantized": unusual(lambda: torch.quantize_per_tensor(torch.ones(V, D), 0.1, 0, torch.qint8)),
    "nested": unusual(lambda: torch.nested.nested_tensor(PARTS)),
    "jagged": unusual(lambda: torch.nested.nested_tensor(PARTS, layout=torch.jagged)),
    "meta": unusual(lambda: torch.ones(V, D, device="meta")),
    "fake": unusual(lambda: FakeTensorMode().from_tensor(torch.ones(V, D))),
    "empty": unusual(lambda: torch.empty(0)),
}
