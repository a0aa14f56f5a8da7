"""The nn.Module bridge: what it shows of itself and of the model, and what it refuses."""

from __future__ import annotations

import copy
import pickle
import types

import optree
import pytest
import torch
from torch import nn

import tests.helpers.models as models
import tests.helpers.oracle as oracle
from tests.helpers.lessons import IDS, NAME, ROWS, TOKENS, bridge, merged, student
from tests.helpers.rows import random_rows
from ttfunc import (
    Exportable,
    combine,
    functional_call,
    init_deltas,
    load,
    load_peft,
    merge,
    patch,
    patch_mixed,
    save,
    save_as_lora,
    save_peft,
    stack,
    summary,
    unmerge,
)
from ttfunc.module.token_module import TokenModule

# The module alone


@pytest.mark.parametrize("case", models.CORPUS)
def test_it_is_the_functional_call_and_changes_nothing(case):
    model = models.make(case).requires_grad_(False)
    params = random_rows(model, [2, 7])
    before, x = oracle.snapshot(model), models.tokens(2, 7)
    module = TokenModule(model, params)
    expected = optree.tree_map(lambda t: t.detach().clone().requires_grad_(), params)
    weights = patch(expected, deferred_logits=True)  # as in training
    models.loss_of(functional_call(model, weights, x)).backward()
    out = module(x)
    models.loss_of(out).backward()
    assert torch.equal(out, functional_call(model, patch(params), x))
    for name, delta in module.params().deltas.items():
        assert torch.equal(delta.grad, expected.deltas[name].grad)
        assert delta is params.deltas[name]
    assert oracle.snapshot(model) == before


def test_its_parameters_are_the_rows_alone():
    module = bridge()
    assert dict(module.named_parameters()).keys() == {ROWS}
    assert dict(module.named_buffers()) == {}
    assert [name for name, _ in module.named_modules()] == [""]
    assert list(module.state_dict()) == [ROWS, IDS]
    assert module.state_dict()[IDS].tolist() == TOKENS
    assert module.params().deltas[NAME] is next(module.parameters())


def test_there_is_one_set_of_rows(tmp_path):
    model = student()
    params = init_deltas(model, TOKENS, requires_grad=True)
    before, x = params.deltas[NAME].detach().clone(), torch.tensor([TOKENS])
    early = torch.optim.SGD(optree.tree_leaves(params), 0.1)
    module = TokenModule(model, params)
    for optimizer in (
        early,
        torch.optim.SGD(module.parameters(), 0.1),
        torch.optim.SGD(optree.tree_leaves(params), 0.1),
    ):
        was = params.deltas[NAME].detach().clone()
        optimizer.zero_grad()
        module(x, labels=x).loss.backward()
        optimizer.step()
        assert not torch.equal(params.deltas[NAME], was)
    save(params, tmp_path / "rows.safetensors")
    saved = load(tmp_path / "rows.safetensors", model).deltas[NAME]
    assert torch.equal(saved, next(module.parameters()))
    assert not torch.equal(saved, before)


def test_rows_that_are_no_leaves_are_refused():
    model = student()
    params = init_deltas(model, TOKENS, requires_grad=True)
    twice = optree.tree_map(lambda t: t * 2, params)
    with pytest.raises(ValueError, match=r"computed from others.*t.detach\(\).clone\(\)"):
        TokenModule(model, twice)
    with torch.inference_mode():
        made = init_deltas(model, TOKENS)
    with pytest.raises(ValueError, match="made in inference mode"):
        TokenModule(model, made)


def test_what_it_trained_can_be_saved_and_merged(tmp_path):
    module = bridge()
    save(module.params(), tmp_path / "rows.safetensors")
    with pytest.warns(UserWarning, match="are not those"):
        other = load(tmp_path / "rows.safetensors", shifted(module.base))
    assert torch.equal(other.deltas[NAME], module.params().deltas[NAME])
    with torch.no_grad():
        merged = merge(module.base.state_dict(), module.params())
    assert torch.equal(merged[NAME][TOKENS], module.params().deltas[NAME])


def shifted(model: nn.Module) -> nn.Module:
    model = copy.deepcopy(model)
    with torch.no_grad():
        model.get_input_embeddings().weight.add_(1)
    return model


def test_generate_says_what_the_merged_model_says():
    module, merged = bridge(), student()
    with torch.no_grad():
        merged.load_state_dict(merge(merged.state_dict(), module.params()))
    prompt = torch.tensor([[1, 48, 7, 49]])
    options = {"max_new_tokens": 12, "do_sample": False}
    said = module.generate(prompt, **options)
    assert torch.equal(said, merged.generate(prompt, **options))
    assert not torch.equal(said, module.base.generate(prompt, **options))


def test_moving_and_modes_reach_the_model():
    module = bridge()
    assert not module.training
    assert module.train() is module
    assert module.training
    assert module.base.model.layers[0].training
    module.eval()
    assert not module.base.training
    assert module.double() is module
    assert module.dtype == module.params().deltas[NAME].dtype == torch.float64
    assert module(torch.tensor([TOKENS])).logits.dtype == torch.float64
    assert module.to("meta").device.type == "meta"


def test_pickling_and_data_parallel_are_refused():
    with pytest.raises(TypeError, match=r"cannot be pickled.*state_dict\(\)"):
        pickle.dumps(bridge())
    with pytest.raises(RuntimeError, match=r"DataParallel does not copy .*\(torchrun\)"):
        bridge()._replicate_for_data_parallel()


def test_bad_input_is_refused():
    model = student()
    params = random_rows(model, TOKENS)
    with pytest.raises(TypeError, match=r"must be a torch\.nn\.Module, got dict"):
        TokenModule({}, params)
    with pytest.raises(TypeError, match="got LlamaForCausalLM where the parameters"):
        TokenModule(model, model)
    with pytest.raises(ValueError, match=r"has shape \(1, 3, 16\), and \(3, 16\) is needed"):
        TokenModule(model, stack([params]))
    with pytest.raises(RuntimeError, match="belong to no model"):
        TokenModule(model, pickle.loads(pickle.dumps(params)))  # noqa: S301
    with pytest.raises(ValueError, match="stale patch"):
        TokenModule(student(), params)(torch.tensor([TOKENS]))
    model.lm_head.weight.requires_grad_()
    rule = r"1 parameters .*rows of .*embed_tokens.*Freeze the model first.*requires_grad_\(False\)"
    for train_base in (False, True):
        with pytest.raises(ValueError, match=rule) as refused:
            TokenModule(model, params, train_base=train_base)
        assert "train_base" not in str(refused.value)
    model.requires_grad_(False).model.norm.weight.requires_grad_()
    with pytest.raises(
        ValueError, match=r"1 parameters .*norm.*train_base=True.*Or freeze them first"
    ):
        TokenModule(model, params)


def test_a_module_in_place_of_its_model_or_its_rows_is_told_what_to_write(tmp_path):
    module = bridge()
    model, params, sd = module.base, module.params(), module.base.state_dict()
    save(params, tmp_path / "rows")
    save_peft(params, tmp_path / "adapter")
    others = {
        r"module\(...\), or functional_call\(module.base, ": [
            lambda: functional_call(module, patch(params), torch.tensor([TOKENS])),
        ],
        r"init_deltas\(module.base": [lambda: init_deltas(module, [1])],
        r"TokenModule\(module.base": [lambda: TokenModule(module, params)],
        r"Exportable\(module.base": [lambda: Exportable(module)],
        r"load\(path, module.base": [lambda: load(tmp_path / "rows", module)],
        r"load_peft\(directory, module.base": [lambda: load_peft(tmp_path / "adapter", module)],
        r"module.base.state_dict\(\)": [lambda: merge(module, params)],
        "base_model=module.base": [lambda: save_peft(params, tmp_path / "a", base_model=module)],
        "adapter=module.base": [lambda: save_peft(params, tmp_path / "a", adapter=module)],
        r"module.params\(\)": [
            lambda: save(module, tmp_path / "a"),
            lambda: save_peft(module, tmp_path / "a"),
            lambda: save_as_lora(module, tmp_path / "a"),
            lambda: patch(module),
            lambda: patch_mixed([module], [0]),
            lambda: merge(sd, module),
            lambda: unmerge(sd, module),
            lambda: combine(params, module),
            lambda: stack([params, module]),
            lambda: summary(model, module),
            lambda: TokenModule(model, module),
        ],
    }
    for instead, calls in others.items():
        for call in calls:
            with pytest.raises(TypeError, match=f"got a TokenModule, .*Write {instead}"):
                call()
    assert not (tmp_path / "a").exists()


def test_its_own_parameters_are_weights_of_a_call_as_those_of_any_module():
    module, x = bridge().eval(), torch.tensor([TOKENS])
    doubled = {name: 2 * one for name, one in module.named_parameters()}
    twice = optree.tree_map(lambda rows: 2 * rows.detach(), module.params())
    expected = merged(TokenModule(module.base, twice))
    torch.testing.assert_close(functional_call(module, doubled, x).logits, expected(x).logits)


def test_a_shallow_copy_shares_what_it_holds():
    module, x = bridge().eval(), torch.tensor([TOKENS])
    copied = copy.copy(module)
    assert type(copied) is type(module)
    assert copied is not module
    assert next(iter(copied.parameters())) is next(iter(module.parameters()))
    assert torch.equal(copied(x).logits, module(x).logits)


# State dicts


def test_a_parameter_of_the_model_that_is_trained_later_is_noticed():
    module, x = bridge(), torch.tensor([TOKENS])
    module.base.lm_head.register_parameter("lora", nn.Parameter(torch.zeros(2)))
    with pytest.raises(RuntimeError, match=r"require grad since it was made \('lm_head.lora'"):
        module(x)
    with torch.no_grad():
        module(x)


def test_a_forward_that_a_tool_sets_is_that_of_the_module():
    module, x = bridge(), torch.tensor([TOKENS])
    base, expected = module.base, module(torch.tensor([TOKENS])).logits
    base.forward = types.MethodType(type(base).forward, base)  # as accelerate leaves it behind
    assert torch.equal(module(x).logits, expected)
    plain = module.forward
    module.forward = lambda *args: plain(*args).logits * 2
    assert torch.equal(module(x), expected * 2)
    assert base.forward.__self__ is base


def test_matrices_with_names_alike_have_parameters_of_their_own():
    class Alike(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.ModuleDict({"b": nn.Embedding(9, 2), "~c": nn.Embedding(9, 2)})
            for name in ("a/b", "a~0c", "a~1b"):
                self.add_module(name, nn.Embedding(9, 2))

        def forward(self, x):
            embeddings = [m for m in self.modules() if isinstance(m, nn.Embedding)]
            return torch.stack([m(x) for m in embeddings])

    model, x = Alike().requires_grad_(False), torch.tensor([1, 2])
    names = [n for n, m in model.named_modules() if isinstance(m, nn.Embedding)]
    params = random_rows(model, [1], targets=names)
    module = TokenModule(model, params)
    assert len(list(module.parameters())) == len(names) == 5
    assert torch.equal(module(x), functional_call(model, patch(params), x))
    module.load_state_dict(copy.deepcopy(module.state_dict()))


def test_rows_stay_wide_over_a_half_precision_base():
    module = bridge().to(torch.bfloat16)
    assert {p.dtype for p in module.parameters()} == {torch.float32}
    assert {p.dtype for p in module.base.parameters()} == {torch.bfloat16}
    assert {p.dtype for p in module.double().parameters()} == {torch.float64}
