"""Names that a wrapper or a tool has changed: told exactly, and given by `names`."""

from __future__ import annotations

import peft
import pytest
import torch
from torch import nn

from tests.helpers.models import make, tokens
from tests.helpers.oracle import edited, same_bits
from tests.helpers.peft_reference import quiet
from tests.helpers.rows import random_rows
from ttfunc import functional_call, init_deltas, load, load_peft, merge, patch, save, save_peft
from ttfunc import unmerge as unmerged
from ttfunc.model.names import through_wrappers

NAME, HEAD = "embed_tokens.weight", "lm_head.weight"


class Wrapper(nn.Module):
    """As DistributedDataParallel holds its module."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module


def in_peft(model: nn.Module) -> nn.Module:
    config = peft.LoraConfig(r=1, target_modules=["lm_head"])
    with quiet():
        return peft.get_peft_model(model, config)


WRAPPED = {
    "compiled": (torch.compile, "the '_orig_mod.' of torch.compile", "_orig_mod.{}"),
    "ddp": (Wrapper, "the 'module.' of DataParallel or DistributedDataParallel", "module.{}"),
    "both": (lambda m: torch.compile(Wrapper(m)), "'_orig_mod.' of .* and the 'module.' of", None),
    "unknown": (lambda m: nn.ModuleDict({"body": m}), "Did you mean 'body.embed", "body.{}"),
}


@pytest.fixture(params=WRAPPED)
def case(request):
    """A model, its rows, the same model in a wrapper, what is said of it, and the names."""
    wrap, told, form = WRAPPED[request.param]
    model = make("tied")
    form = form or "_orig_mod.module.{}"
    names = {name: form.format(name) for name in (NAME, HEAD)}
    return model, random_rows(model, [7, 3]), wrap(make("tied")), told, names


def test_a_state_dict_of_a_wrapper(case):
    model, params, wrapper, told, names = case
    state = wrapper.state_dict()
    for write in (merge, unmerged):
        with pytest.raises(KeyError, match=told) as error:
            write(state, params)
        assert f"names={names!r}" in error.value.args[0]
    merged = merge(state, params, names=names)
    assert merged.keys() == state.keys()
    expected = edited(model, params).state_dict()
    assert same_bits(
        {n: merged[names.get(n, names[NAME].replace(NAME, n))] for n in expected}, expected
    )
    assert merged[names[NAME]] is merged[names[HEAD]]
    assert same_bits(unmerged(merged, params, names=names), state)
    assert params.tied == {NAME: (NAME, HEAD)}


def test_a_model_in_a_wrapper(case, tmp_path):
    _, params, wrapper, told, names = case
    save(params, tmp_path / "rows")
    with pytest.raises(KeyError, match=told) as error:
        load(tmp_path / "rows", wrapper)
    assert f"names={names!r}" in error.value.args[0]
    loaded = load(tmp_path / "rows", wrapper, names=names)
    assert list(loaded.tied.values()) == [tuple(names.values())]
    assert same_bits(loaded.deltas, {names[NAME]: params.deltas[NAME]})
    merged = merge(wrapper.state_dict(), loaded)
    assert same_bits(merged, merge(wrapper.state_dict(), params, names=names))


def test_the_rows_of_a_wrapped_model_for_the_model_itself(case, tmp_path):
    model, params, wrapper, _, names = case
    save(random_rows(wrapper, [7, 3], targets="embed_tokens"), tmp_path / "rows")
    back = {other: name for name, other in names.items()}
    with pytest.raises(KeyError, match=f"Did you mean '{NAME}'") as error:
        load(tmp_path / "rows", model)
    assert f"names={back!r}" in error.value.args[0]
    loaded = load(tmp_path / "rows", model, names=back)
    assert loaded.tied == params.tied
    x = tokens(7, 3)
    expected = edited(model, loaded)(x)
    torch.testing.assert_close(functional_call(model, patch(loaded), (x,)), expected)


def test_a_head_with_a_lora(tmp_path):
    model = make("untied")
    params = random_rows(model, [7, 3], targets=["embed_tokens", "lm_head"])
    state = in_peft(make("untied")).state_dict()
    prefix = "base_model.model."
    names = {NAME: prefix + NAME, HEAD: f"{prefix}lm_head.base_layer.weight"}
    with pytest.raises(KeyError, match="'base_model.model.' of PEFT"):
        merge(state, params)
    merged = merge(state, params, names=names)
    for name, other in names.items():
        assert torch.equal(merged[other], edited(model, params).state_dict()[name])
    save(params, tmp_path / "rows")
    loaded = load(tmp_path / "rows", in_peft(make("untied")), names=names)
    assert list(loaded.deltas) == list(names.values())
    save_peft(params, tmp_path / "adapter")
    with pytest.raises(KeyError, match="Did you mean .* has the 'base_model.model.' of PEFT"):
        load_peft(tmp_path / "adapter", in_peft(make("untied")))


WRONG = {
    "no mapping": ([(NAME, "a")], TypeError, r"must map strings to strings, got \["),
    "no string": ({NAME: None}, TypeError, "must map strings to strings, got {"),
    "not of the parameters": ({"wte": "a"}, KeyError, "parameters are for .*embed_tokens"),
    "not there": ({NAME: "wte"}, KeyError, "but (the state dict|this Language) has no such"),
    "one for two": ({NAME: HEAD}, ValueError, f"has '{NAME}' too, which would be left"),
    "another shape": ({NAME: "body.weight"}, ValueError, "which would be left"),
}


@pytest.mark.parametrize("case", WRONG)
def test_names_that_lead_astray(case: str, tmp_path):
    model = make("tied")
    params, (names, error, match) = init_deltas(model, [7, 3]), WRONG[case]
    save(params, tmp_path / "rows")
    for call in (
        lambda: merge(model.state_dict(), params, names=names),
        lambda: unmerged(model.state_dict(), params, names=names),
        lambda: load(tmp_path / "rows", model, names=names),
    ):
        with pytest.raises(error, match=match):
            call()


@pytest.mark.parametrize(
    ("name", "other"),
    [
        ("a.weight", "_orig_mod.a.weight"),
        ("a.weight", "module._orig_mod.module.a.weight"),
        ("b.a.weight", "b._orig_mod.a.weight"),
        ("b.a.weight", "_fsdp_wrapped_module.b._checkpoint_wrapped_module.a.weight"),
        ("a.weight", "base_model.model.a.token_adapter.base_layer.weight"),
        ("module.a.weight", "a.weight"),
    ],
)
def test_the_parts_that_wrappers_add(name: str, other: str):
    assert through_wrappers([name], [other, "submodule.a.weight", "x"]) == {name: other}
    assert through_wrappers([name], ["sub" + other, "x" + other]) == {}
    assert through_wrappers([name], [other, f"module.{other}"]) == {}
