"""What says how large a vocabulary is, and what has that size."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import nn

from ttfunc.model.beside import beside, bias_names
from ttfunc.model.sizes import Resized


class Config:
    def __init__(self, **values: object) -> None:
        vars(self).update(values)


def test_a_config_and_those_in_it_are_copied_and_resized():
    text = Config(vocab_size=23, hidden_size=23)
    config = Config(vocab_size=23, text_config=text, other_config=Config(vocab_size=7), n=23)
    state = {"config": config, "text_config": text, "out_features": 23, "in_features": 23}
    (resized := Resized({23: 25})).put_into(state)
    assert (state["out_features"], state["in_features"]) == (25, 23)
    assert (state["config"].vocab_size, state["config"].n) == (25, 23)
    assert state["config"].other_config.vocab_size == 7
    assert state["text_config"] is state["config"].text_config  # one still
    assert (state["text_config"].vocab_size, state["text_config"].hidden_size) == (25, 23)
    assert (config.vocab_size, text.vocab_size) == (23, 23)
    again = {"config": config}
    resized.put_into(again)
    assert again["config"] is state["config"]


def test_what_is_called_so_and_is_no_config_stays():
    def get_config() -> None: ...

    state = {"get_config": get_config, "config": dict, "path_config": "a", "other_config": None}
    before = dict(state)
    Resized({23: 25}).put_into(state)
    assert state == before


def test_a_size_under_another_name():
    class Renamed(Config):
        attribute_map: ClassVar = {"vocab_size": "symbols"}

    state = {"config": Renamed(symbols=23, vocab_size=7)}
    Resized({23: 25}).put_into(state)
    assert (state["config"].symbols, state["config"].vocab_size) == (25, 7)


def test_biases_are_beside_the_matrix_or_above_it():
    model = nn.Module()
    model.head = nn.Linear(4, 23)
    model.norm = nn.LayerNorm(23)
    model.register_buffer("final_logits_bias", torch.zeros(1, 23))
    model.register_parameter("square_bias", nn.Parameter(torch.zeros(23, 23)))
    found = beside([model, model.head], "head.weight", 23)
    assert {one.name: len(one.way) for one in found} == {"final_logits_bias": 1, "head.bias": 2}
    shapes = {name: tensor.shape for name, tensor in model.state_dict().items()}
    assert bias_names(shapes, ["head.weight"], 23) == ["final_logits_bias", "head.bias"]
    assert bias_names(shapes, ["head.weight"], 4) == []
