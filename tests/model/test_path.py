"""The path to a matrix: the modules that a call copies, and no more."""

from __future__ import annotations

from torch import nn

from tests.helpers.models import make
from ttfunc.model.path import find_path

NAME = "embed_tokens.weight"


def on_path(model: nn.Module, *names: str) -> set[str]:
    tensors = [model.get_parameter(name) for name in names]
    names_of = {module: name for name, module in model.named_modules()}
    return {names_of[step.module()] for step in find_path(model, tensors).steps}


def test_the_path_is_what_leads_to_the_matrix_and_no_more():
    model = nn.Sequential(make("tied"), make("untied"))
    assert on_path(model, "0.embed_tokens.weight") == {"", "0", "0.embed_tokens", "0.lm_head"}
    assert on_path(model, "1.embed_tokens.weight") == {"", "1", "1.embed_tokens"}
    assert on_path(model, "0.body.bias", "1.lm_head.weight") == {
        "",
        "0",
        "0.body",
        "1",
        "1.lm_head",
    }


def test_a_module_reached_by_two_paths_is_copied_once_and_with_both():
    model = make("encoder_decoder")
    assert on_path(model, NAME) == {"", "embed_tokens", "encoder", "lm_head"}
