"""What is counted, and how it prints."""

from __future__ import annotations

import copy
import types

import pytest
import torch
from torch import Tensor

from tests.helpers.models import D, V, make
from tests.helpers.trl import module_of
from tests.helpers.unusual import UNUSUAL
from ttfunc import init_deltas, summary

BODY = D * D + D


@pytest.mark.parametrize(
    ("case", "matrices"), [("tied", 1), ("storage_tied", 1), ("untied", 2), ("biased", 1 + 1 / D)]
)
def test_tied_matrices_count_once(case: str, matrices: float):
    counted = summary(make(case).requires_grad_(False), init_deltas(make(case), [7, 3]))
    assert counted.trainable_parameters == 2 * D
    assert counted.trainable_bytes == 4 * 2 * D
    assert counted.total_parameters == matrices * V * D + BODY + 2 * D
    assert counted.total_bytes == 4 * counted.total_parameters
    assert counted.fraction == counted.trainable_parameters / counted.total_parameters


def test_it_prints_what_is_trained():
    model = make("tied").to(torch.bfloat16).requires_grad_(False)
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
    wrapper = torch.nn.Sequential(model.requires_grad_(False))
    assert summary(wrapper, init_deltas(model, [7, 3])).trainable_parameters == 2 * D


def test_what_requires_grad_in_the_model_is_trained_beside_the_rows():
    model = make("storage_tied")  # of which the matrix that has rows gets no gradient
    params = init_deltas(model, [7, 3])
    counted = summary(model, params)
    assert counted.trainable_parameters == 2 * D + BODY
    assert counted.trainable_bytes == 4 * counted.trainable_parameters
    assert counted.beside == ("body.weight", "body.bias")
    assert "beside the rows: 2 parameters (body.weight, …)" in str(counted)
    assert summary(model).trainable_parameters == V * D + BODY == summary(model).total_parameters
    assert summary(model.requires_grad_(False)).trainable_parameters == 0
    with pytest.raises(TypeError, match=r"a model is needed, got dict. The order is summary"):
        summary({}, params)


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")  # PEFT asks for it
@pytest.mark.parametrize("grown", [False, True], ids=["old", "new"])
@pytest.mark.parametrize("lora", [False, True], ids=["rows", "rows and LoRA"])
def test_a_module_says_the_same_in_every_way(lora, grown, capsys):
    module = module_of(lora=lora, grown=grown)
    right = sum(one.numel() for one in module.parameters() if one.requires_grad)
    rows = sum(delta.numel() for delta in module.params().deltas.values())
    total = sum(one.numel() for one in module.base.parameters()) + rows
    for counted in (summary(module), summary(module, module.params()), summary(copy.copy(module))):
        assert (counted.trainable_parameters, counted.total_parameters) == (right, total)
    assert len(summary(module).beside) == len([*module.parameters()]) - 1
    assert (
        summary(module.base, module.params()) == summary(module) == summary(copy.deepcopy(module))
    )
    assert module.num_parameters(only_trainable=True) == right
    assert module.num_parameters() == total == module.num_parameters(False)
    without = module.base.num_parameters(exclude_embeddings=True)
    assert module.num_parameters(exclude_embeddings=True) == without
    if lora:
        assert module.get_nb_trainable_parameters() == (right, total)
        module.print_trainable_parameters()
        assert capsys.readouterr().out == f"{summary(module)}\n"


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
def test_a_model_of_no_parameters_has_no_share():
    model = torch.nn.Embedding(10, 0)
    assert summary(model, init_deltas(model, [3])).fraction == 0


class Quantised(Tensor):
    """A weight that says it is float32 and stores bytes and scales, as torchao makes them."""

    @staticmethod
    def __new__(cls, values: Tensor, scales: Tensor) -> Quantised:
        made = Tensor._make_wrapper_subclass(cls, values.shape, dtype=torch.float32)
        made.values, made.scales, made.zeros = values, scales, None
        return made

    def __tensor_flatten__(self):
        return ["values", "scales"], None

    @classmethod
    def __tensor_unflatten__(cls, inner, context, shape, stride):
        return cls(**inner)

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        if func is torch.ops.aten.detach.default:
            return cls(args[0].values, args[0].scales)
        raise NotImplementedError(func)


def body(weight: Tensor) -> torch.nn.Module:
    model = torch.nn.Sequential(torch.nn.Embedding(V, D))
    model.register_parameter("body", torch.nn.Parameter(weight, requires_grad=False))
    return model


def test_a_quantised_weight_weighs_what_it_stores():
    model = body(Quantised(torch.zeros(64, D, dtype=torch.int8), torch.zeros(64, 1)))
    counted = summary(model, init_deltas(model, [3]))
    assert counted.total_parameters == V * D + 64 * D + D
    assert counted.total_bytes == 4 * V * D + (64 * D + 4 * 64) + 4 * D


def test_packed_bytes_count_as_the_numbers_in_them():
    model = body(torch.zeros(64 * D // 2, 1, dtype=torch.uint8))
    model.body.quant_state = types.SimpleNamespace(shape=torch.Size((64, D)))
    counted = summary(model, init_deltas(model, [3]))
    assert counted.total_parameters == V * D + 64 * D + D
    assert counted.total_bytes == 4 * V * D + 64 * D // 2 + 4 * D


@pytest.mark.parametrize(
    ("kind", "stored"),
    [("coo", 8 * (16 + 4)), ("csr", 8 * (V + 1 + 8) + 4 * 8), ("csc", 8 * (D + 1 + 8) + 4 * 8)],
)
def test_a_sparse_weight_weighs_what_it_stores(kind: str, stored: int):
    model = body(UNUSUAL[kind]())
    assert summary(model, init_deltas(model, [3])).total_bytes == 4 * (V * D + D) + stored


def test_a_weight_that_is_not_made_yet_counts_nothing():
    model = torch.nn.Sequential(torch.nn.Embedding(V, D), torch.nn.LazyLinear(3))
    assert summary(model, init_deltas(model, [3])).total_parameters == V * D + D
