"""`help(ttfunc)` lists the functions by task, and shows what ttfunc wrote, not what torch did."""

from __future__ import annotations

import copy
import inspect
import pickle
import pydoc
import re

import pytest
import torch
from torch import nn

import ttfunc
from ttfunc import Exportable, PatchedWeight, TokenModule, init_deltas, patch

CLASSES = [getattr(ttfunc, name) for name in ttfunc.__all__ if name[0].isupper()]


def shown(thing: object) -> str:
    return pydoc.render_doc(thing, renderer=pydoc.plaintext)


def model() -> nn.Module:
    return nn.Embedding(100, 8).requires_grad_(False)


def test_the_docstring_lists_all_public_names_by_task_in_a_screen():
    named = re.findall(r"^    (\w+) {2,}\S", ttfunc.__doc__, re.M)
    assert named == ttfunc.__all__
    assert len(ttfunc.__doc__.splitlines()) <= 60


def test_the_help_of_the_package_shows_nothing_of_torch_s_own():
    text = shown(ttfunc)
    assert len(text.splitlines()) < 1200  # Python 3.13 shows each signature in lines of its own
    assert not re.findall(r"inherited from (?:torch|Module|Tensor).*", text)


@pytest.mark.parametrize("kind", CLASSES, ids=lambda kind: kind.__name__)
def test_the_help_of_a_class_is_its_own(kind: type):
    text = shown(kind)
    assert len(text.splitlines()) < 120
    assert not re.findall(r"inherited from (?:torch|Module|Tensor).*", text)
    own = {name for name in vars(kind) if not name.startswith("_")}
    assert all(re.search(rf"^ \|  {name}\b", text, re.M) for name in own - {"source"})


def test_the_help_of_a_module_over_a_model_is_that_of_its_class():
    base = model()
    module = TokenModule(base, init_deltas(base, [3]))
    assert "inherited from torch" not in shown(module)
    assert "Methods inherited from ttfunc.module.token_module.TokenModule" in shown(module)


def test_instances_list_all_that_they_have():
    base = model()
    module = TokenModule(base, init_deltas(base, [3]))
    program = Exportable(base)
    assert {"params", "base", "generate", "state_dict", "to", "training"} <= {*dir(module)}
    assert {"inputs", "check", "model", "state_dict", "parameters"} <= {*dir(program)}
    for one in (module, program):
        assert {*dir(nn.Module())} <= {*dir(one)}


def test_to_list_a_patched_weight_reads_nothing_of_it():
    weight = patch(init_deltas(model(), [3]))["weight"]
    assert {"source", "deferred", "shape", "mT", "requires_grad"} <= {*dir(weight)}
    assert weight.source.uses() == set()


def test_the_classes_are_classes_as_before():
    base = model()
    module, program = TokenModule(base, init_deltas(base, [3])), Exportable(base)
    weight = patch(init_deltas(base, [3]))["weight"]
    assert isinstance(module, nn.Module)
    assert isinstance(module, TokenModule)
    assert isinstance(weight, torch.Tensor)
    assert isinstance(weight, PatchedWeight)
    assert not isinstance(torch.ones(1), PatchedWeight)
    for kind in CLASSES:
        assert pickle.loads(pickle.dumps(kind)) is copy.deepcopy(kind) is kind  # noqa: S301
    assert type(copy.deepcopy(program)) is Exportable
    assert type(copy.deepcopy(module)) is type(module)
    made = type("Made", (TokenModule,), {"more": 1})  # as FSDP2 makes classes
    assert "more" in dir(made)
    assert "params" in dir(made)
    assert inspect.signature(Exportable).parameters.keys() >= {"model", "targets"}
