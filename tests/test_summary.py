"""What is counted, and how it prints."""

from __future__ import annotations

import pytest
import torch

from tests.models import D, V, make
from ttfunc import init_deltas, summary

BODY = D * D + D


@pytest.mark.parametrize(
    ("case", "matrices"), [("tied", 1), ("storage_tied", 1), ("untied", 2), ("biased", 1 + 1 / D)]
)
def test_tied_matrices_count_once(case: str, matrices: float):
    counted = summary(make(case), init_deltas(make(case), [7, 3]))
    assert counted.trainable_parameters == 2 * D
    assert counted.trainable_bytes == 4 * 2 * D
    assert counted.total_parameters == matrices * V * D + BODY + 2 * D
    assert counted.total_bytes == 4 * counted.total_parameters
    assert counted.fraction == counted.trainable_parameters / counted.total_parameters


def test_it_prints_what_is_trained():
    model = make("tied").to(torch.bfloat16)
    assert str(summary(model, init_deltas(model, [7, 3]))) == (
        "embed_tokens.weight: 2 of 23 rows × 8, float32, tied with lm_head.weight\n"
        "trainable: 16 parameters (64 B) of 272 (576 B), 5.8824%"
    )


def test_large_sizes_are_readable():
    with torch.device("meta"):
        model = torch.nn.Embedding(256_000, 4096)
    shown = str(summary(model, init_deltas(model, range(1000))))
    assert "1,000 of 256,000 rows × 4,096" in shown
    assert "(15.6 MiB) of 1,052,672,000 (3.92 GiB), 0.3891%" in shown


def test_parameters_of_another_model_are_refused():
    params = init_deltas(make("tied"), [7, 3])
    with pytest.raises(ValueError, match=r"Linear has no matrix 'embed_tokens.weight' of shape"):
        summary(torch.nn.Linear(D, V), params)
    model = make("tied")
    wrapper = torch.nn.Sequential(model)
    assert summary(wrapper, init_deltas(model, [7, 3])).trainable_parameters == 2 * D


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
def test_a_model_of_no_parameters_has_no_share():
    model = torch.nn.Embedding(10, 0)
    assert summary(model, init_deltas(model, [3])).fraction == 0
