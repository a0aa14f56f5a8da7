"""The class of a TokenModule, which tools take for the model's own."""

from __future__ import annotations

import gc
import inspect
import weakref

import torch
from transformers import LlamaForCausalLM

import tests.helpers.models as models
from tests.helpers.lessons import ROWS, TOKENS, bridge, student
from tests.helpers.rows import random_rows
from ttfunc import init_deltas
from ttfunc.module.token_module import TokenModule


def test_it_is_taken_for_the_model():
    module = bridge()
    plain = inspect.signature(LlamaForCausalLM.forward)
    assert inspect.signature(type(module).forward) == plain
    assert inspect.signature(module.forward) == inspect.signature(module.base.forward)
    assert type(module).__name__ == "LlamaForCausalLM"
    assert isinstance(module, TokenModule)
    assert not isinstance(module, LlamaForCausalLM)
    assert "3 of 50 rows" in repr(module)


def test_the_class_of_a_model_is_not_kept():
    def made() -> weakref.ref:
        class Own(models.Language):
            pass

        model = Own().requires_grad_(False)
        module = TokenModule(model, init_deltas(model, [1]))
        assert type(TokenModule(model, init_deltas(model, [2]))) is type(module)
        return weakref.ref(Own)

    kept = made()
    gc.collect()
    assert kept() is None


def test_modules_over_one_model_have_one_class():
    model = student()
    a, b = (TokenModule(model, random_rows(model, TOKENS)) for _ in range(2))
    assert type(a) is type(b)
    rows, buffers = torch.func.stack_module_state([a, b])
    assert rows[ROWS].shape == (2, 3, 16)
    assert buffers == {}
