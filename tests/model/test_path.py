"""The copies that a call runs on: what is copied, what is shared, and what is refused."""

from __future__ import annotations

from torch import nn

import pytest
import torch
from torch import Tensor, nn

from tests.helpers.models import D, Language, make, tokens
from tests.helpers.oracle import edited, snapshot
from tests.helpers.rows import random_rows
from ttfunc import functional_call, init_deltas, patch
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


class ByList(Language):
    """Its head lies in a list, which registers nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.heads = [self.lm_head]
        del self.lm_head

    def head(self, h: Tensor) -> Tensor:
        return self.heads[0](h)


class ByHiding(ByList):
    def __init__(self) -> None:
        super().__init__()
        self.__dict__["hidden"] = self.heads.pop()

    def head(self, h: Tensor) -> Tensor:
        return self.hidden(h)


class ByTensor(Language):
    """Keeps the matrix itself in a dict."""

    def __init__(self) -> None:
        super().__init__()
        self.kept = {"weight": self.embed_tokens.weight}

    def head(self, h: Tensor) -> Tensor:
        return h @ self.kept["weight"].T


class ByClosure(Language):
    def __init__(self) -> None:
        super().__init__()
        lm_head = self.lm_head
        self.project = lambda h: lm_head(h)

    def head(self, h: Tensor) -> Tensor:
        return self.project(h)


class Block(nn.Module):
    """A part of a model that knows the whole."""

    def __init__(self, whole: nn.Module, weak: bool) -> None:
        super().__init__()
        self.__dict__["whole"] = weakref.ref(whole) if weak else [whole]

    def forward(self, h: Tensor) -> Tensor:
        whole = self.whole() if callable(self.whole) else self.whole[0]
        return whole.lm_head(h)


class ByParent(Language):
    def __init__(self, weak: bool) -> None:
        super().__init__()
        self.block = Block(self, weak)

    def head(self, h: Tensor) -> Tensor:
        return self.block(h)


def hooked(model: nn.Module) -> None:
    """The model's own method on a part of it, which reads the matrix."""
    model.body.register_forward_hook(types.MethodType(reading_hook, model))


def reading_hook(self: nn.Module, module: nn.Module, args, out: Tensor) -> Tensor:
    return out + self.embed_tokens.weight[7].sum()


def bound(model: nn.Module) -> None:
    model.forward = types.MethodType(type(model).forward, model)


def wrapped(model: nn.Module) -> None:
    plain = model.forward

    @functools.wraps(plain)
    def forward(*args, **kwargs):
        return plain(*args, **kwargs) * 2

    model.forward = forward


def partially(model: nn.Module) -> None:
    """As accelerate's hooks do it."""
    model.old_forward = model.forward
    model.forward = functools.partial(lambda module, x: module.old_forward(x) * 2, model)


def of_the_head(model: nn.Module) -> None:
    plain = model.lm_head.forward
    model.lm_head.forward = lambda h: plain(h) * 3


MODELS = {"list": ByList, "hidden": ByHiding, "tensor": ByTensor, "closure": ByClosure}
MODELS |= {"parent": lambda: ByParent(False), "weak": lambda: ByParent(True)}
TOOLS = [hooked, bound, wrapped, partially, of_the_head]


def reference(model: nn.Module, params, x: Tensor) -> Tensor:
    """The model itself with the rows in it, and then as it was."""
    weight = model.get_parameter(NAME)
    with torch.no_grad():
        before = weight.clone()
        weight[params.token_indices[NAME]] = params.deltas[NAME]
        out = model(x)
        weight.copy_(before)
    return out


@pytest.mark.parametrize("case", MODELS)
def test_holders_outside_of_the_submodules_are_found(case: str):
    torch.manual_seed(0)
    model = MODELS[case]().requires_grad_(False)
    params, before = random_rows(model), snapshot(model)
    expected = reference(model, params, X)
    assert not torch.allclose(expected, model(X))
    torch.testing.assert_close(functional_call(model, patch(params), (X,)), expected)
    assert snapshot(model) == before


@pytest.mark.parametrize("later", [False, True])
@pytest.mark.parametrize("tool", TOOLS)
def test_what_a_tool_sets_on_a_module_runs_on_the_copy(tool, later: bool):
    model = make("tied").requires_grad_(False)
    if not later:
        tool(model)
    params = random_rows(model)
    if later:  # after the path was found; a hook's own path is found with the parameters
        if tool is hooked:
            params = None
        tool(model)
        params = params or random_rows(model)
    expected, own = reference(model, params, X), dict(vars(model))
    for _ in range(2):
        torch.testing.assert_close(functional_call(model, patch(params), (X,)), expected)
    assert vars(model) == own


class Helper:
    def __init__(self, model: nn.Module) -> None:
        self.model = model

    def project(self, h: Tensor) -> Tensor:
        return self.model.lm_head(h)


class ByHelper(Language):
    def __init__(self) -> None:
        super().__init__()
        self.helper = Helper(self)
        self.with_helper = True

    def head(self, h: Tensor) -> Tensor:
        return self.helper.project(h) if self.with_helper else super().head(h)


def test_a_matrix_read_through_another_object_is_refused_and_not_the_models_own():
    model = ByHelper().requires_grad_(False)
    params, before = random_rows(model), snapshot(model)
    with pytest.raises(
        RuntimeError, match=r"linear was given the model's own 'lm_head.weight'.*ByHelper.helper"
    ):
        functional_call(model, patch(params), (X,))
    assert snapshot(model) == before
    expected = reference(model, params, X)
    swapped = torch.func.functional_call(model, patch(params), (X,))  # the way out
    torch.testing.assert_close(swapped, expected)
    model.with_helper = False  # an object that holds the model and is not used is no fault
    torch.testing.assert_close(functional_call(model, patch(params), (X,)), expected)


GLOBAL = make("tied").requires_grad_(False)


def test_a_matrix_read_through_a_global_is_refused():
    params = random_rows(GLOBAL)
    GLOBAL.forward = lambda x: GLOBAL.head(GLOBAL.mix(GLOBAL.embed(x)))
    try:
        with pytest.raises(RuntimeError, match="embedding was given the model's own"):
            functional_call(GLOBAL, patch(params), (X,))
    finally:
        del GLOBAL.forward


def test_the_parameters_do_not_keep_a_model_alive():
    model = make("tied").requires_grad_(False)
    params = random_rows(model)
    functional_call(model, patch(params), (X,))
    kept = weakref.ref(model.body)
    del model
    gc.collect()
    assert kept() is None
    assert params.deltas[NAME].shape == (2, D)


def test_the_copies_are_gone_after_the_call():
    model, seen = make("tied").requires_grad_(False), []
    model.register_forward_hook(lambda module, args, out: seen.append(weakref.ref(module)))
    functional_call(model, patch(random_rows(model)), (X,))
    gc.collect()
    assert seen[0]() is None


def test_a_part_of_the_way_that_was_replaced_is_found_anew():
    model = nn.Sequential(nn.Sequential(make("tied"))).requires_grad_(False)
    params = init_deltas(model, [7, 3], init="mean")
    expected = functional_call(model, patch(params), (X,))
    model[0] = nn.Sequential(model[0][0])  # the same names, another module
    assert torch.equal(functional_call(model, patch(params), (X,)), expected)


class Finalised(Language):
    ended = 0

    def __del__(self) -> None:
        type(self).ended += 1


def test_a_module_that_cannot_be_copied_is_refused():
    finalised = Finalised().requires_grad_(False)
    for model in (finalised, nn.DataParallel(make("tied").requires_grad_(False))):
        weights = patch(init_deltas(model, [7]))
        with pytest.raises(TypeError, match="cannot be copied.*torch.func.functional_call"):
            functional_call(model, weights, (X,))
    gc.collect()
    assert Finalised.ended == 0


def test_the_oracle_agrees():
    model = make("tied").requires_grad_(False)
    params = random_rows(model)
    torch.testing.assert_close(reference(model, params, X), edited(model, params)(X))
