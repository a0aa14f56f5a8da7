"""New tokens: a matrix with more rows than the model has, which stays as it is.

The reference is a copy of the model whose matrices, and the biases of its logits, are longer.
"""

from __future__ import annotations

import copy
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import optree
import peft
import pytest
import torch
import transformers
from torch import nn
from torch.func import grad, jvp, vmap

from tests.helpers.llama import llama
from tests.helpers.models import CORPUS, D, V, loss_of, make, tokens
from tests.helpers.oracle import edited, row_gradients, same_bits, snapshot
from tests.helpers.rows import random_rows
from ttfunc import (
    TokenDeltas,
    TokenModule,
    combine,
    functional_call,
    init_deltas,
    load,
    load_peft,
    merge,
    patch,
    patch_mixed,
    save,
    save_peft,
    stack,
    unmerge,
)

NEW = [V, 7, V + 1]
X = tokens(7, V, V + 1, 3)
NAME = "embed_tokens.weight"


def grown(model: nn.Module, idx: object = tuple(NEW), seed: int = 0, **options: Any) -> TokenDeltas:
    return random_rows(model, list(idx), seed, grow=True, **options)


def lengthened(model: nn.Module, params: TokenDeltas, height: int = V) -> nn.Module:
    """A copy with the new rows at the end of each matrix, and zeros at the end of its biases."""
    model = copy.deepcopy(model)
    made: dict[int, nn.Parameter] = {}
    for module in model.modules():
        for name, held in list(module._parameters.items()):
            if held is not None and len(held) == height:
                longer = torch.cat([held, torch.zeros(2, *held.shape[1:])])
                made.setdefault(id(held), nn.Parameter(longer.detach()))
                module._parameters[name] = made[id(held)]
    return edited(model, params)


@pytest.mark.parametrize("dense", [False, True])
@pytest.mark.parametrize("case", CORPUS)
def test_a_call_with_new_tokens_is_that_of_a_longer_model(case: str, dense: bool):
    model = make(case)
    params = grown(model, requires_grad=True)
    reference, before = lengthened(model, params), snapshot(model)
    expected = reference(X)
    loss_of(expected).backward()
    for _ in range(2):
        logits = functional_call(model, patch(params, dense=dense), X)
        assert logits.shape == (*X.shape, V + 2)
        torch.testing.assert_close(logits, expected)
    found = torch.autograd.grad(loss_of(logits), list(params.deltas.values()))
    wanted = row_gradients(reference, params)
    for gradient, name in zip(found, params.deltas, strict=True):
        torch.testing.assert_close(gradient, wanted[name])
    assert snapshot(model) == before


@pytest.mark.parametrize("case", ["tied", "untied", "biased", "masked", "storage_tied"])
def test_a_merged_state_dict_is_that_of_a_longer_model_and_goes_back(case: str):
    model = make(case)
    params, state = grown(model), model.state_dict()
    merged = merge(state, params)
    assert same_bits(merged, lengthened(model, params).state_dict())
    assert same_bits(unmerge(merged, params), state)
    assert merge(unmerge(merged, params), params).keys() == state.keys()


@pytest.mark.parametrize("case", ["tied", "untied", "biased"])
def test_transforms(case: str):
    model = make(case).requires_grad_(False)
    first, second = grown(model), grown(model, seed=1)

    def loss(params: TokenDeltas) -> torch.Tensor:
        return loss_of(functional_call(model, patch(params), X))

    def dense(params: TokenDeltas) -> torch.Tensor:
        return loss_of(functional_call(model, patch(params, dense=True), X))

    def close(a: Any, b: Any) -> None:
        optree.tree_map(torch.testing.assert_close, a, b)

    close(grad(loss)(first), grad(dense)(first))
    close(jvp(loss, (first,), (second,)), jvp(dense, (first,), (second,)))
    both = stack([first, second])
    close(vmap(grad(loss))(both), stack([grad(loss)(first), grad(loss)(second)]))
    close(jvp(grad(loss), (first,), (second,)), jvp(grad(dense), (first,), (second,)))
    compiled = torch.compile(grad(loss), fullgraph=True, backend="aot_eager")
    close(compiled(first), grad(dense)(first))


@pytest.mark.parametrize("case", ["tied", "biased"])
def test_examples_with_new_rows_of_their_own(case: str):
    model = make(case).requires_grad_(False)
    each = [grown(model, seed=seed) for seed in range(2)]
    mixed = functional_call(model, patch_mixed(each, [1, 0, 1]), X)
    for row, adapter in enumerate([1, 0, 1]):
        alone = functional_call(model, patch(each[adapter]), X[row : row + 1])
        torch.testing.assert_close(mixed[row : row + 1], alone)
    with pytest.raises(
        ValueError, match="2 new tokens .* which the plain model .-1. does not have"
    ):
        patch_mixed(each, [-1, 0, 1])
    with pytest.raises(ValueError, match=r"have \[2, 1\] new tokens .* the same new ids"):
        patch_mixed([each[0], grown(model, [V])], [0, 1, 1])
    with pytest.raises(ValueError, match=r"have \[2, 0\] new tokens .* the same new ids"):
        stack([each[0], random_rows(model)])


@pytest.mark.parametrize("tie", [True, False])
def test_a_llama_is_that_which_was_resized(tie: bool):
    model = llama(tie=tie)
    x = X.clamp(min=3)  # no padding
    params = init_deltas(model, NEW, grow=True, init="normal", requires_grad=True)
    assert len(params.deltas) == (1 if tie else 2)  # both ends grow
    resized = copy.deepcopy(model)
    resized.resize_token_embeddings(V + 2, mean_resizing=False)
    resized = edited(resized, params)
    config = model.config.to_dict()
    ours = functional_call(model, patch(params), x, {"labels": x})
    theirs = resized(x, labels=x)
    torch.testing.assert_close(ours.logits, theirs.logits)
    torch.testing.assert_close(ours.loss, theirs.loss)
    torch.testing.assert_close(TokenModule(model, params)(x, labels=x).loss, theirs.loss)
    options = {"max_new_tokens": 4, "do_sample": False, "num_beams": 2}
    made = functional_call(model, patch(params), (x,), options, method="generate")
    assert torch.equal(made, resized.generate(x, **options))
    assert model.config.to_dict() == config
    assert same_bits(merge(model.state_dict(), params), resized.state_dict())


def test_a_bias_of_new_tokens_may_be_given():
    model = make("biased")
    params = grown(model)
    reference = lengthened(model, params)
    bias = torch.cat([model.lm_head.bias.detach(), torch.tensor([0.5, -2.0])])
    reference.lm_head.bias.data.copy_(bias)
    logits = functional_call(model, {**patch(params), "lm_head.bias": bias}, X)
    torch.testing.assert_close(logits, reference(X))
    with pytest.raises(ValueError, match=r"'lm_head.bias' has shape \(26,\), but .* \(23,\)"):
        functional_call(model, {**patch(params), "lm_head.bias": torch.zeros(26)}, X)


def test_a_file_of_new_rows(tmp_path):
    model = make("tied")
    params, path = grown(model), tmp_path / "rows"
    save(params, path)
    loaded = load(path, model)
    assert loaded.specs == params.specs
    assert same_bits(loaded.deltas, params.deltas)
    torch.testing.assert_close(
        functional_call(model, patch(loaded), X), functional_call(model, patch(params), X)
    )
    # A model that was resized meanwhile has these tokens: they are replaced.
    resized = lengthened(model, grown(model, [V, V + 1], seed=5))
    again = load(path, resized)
    assert again.specs[NAME].grown == 0
    state = resized.state_dict()
    assert same_bits(unmerge(merge(state, again), again), state)
    torch.testing.assert_close(
        functional_call(resized, patch(again), X), functional_call(model, patch(params), X)
    )


def test_a_file_is_not_loaded_where_its_rows_are_new_at_one_end_alone(tmp_path):
    resized = llama(tie=False)
    resized.resize_token_embeddings(V + 2, mean_resizing=False)
    path = tmp_path / "rows"
    alone = random_rows(resized.requires_grad_(False), [V, V + 1], targets="embed_tokens")
    save(alone, path)
    model = llama(tie=False)
    match = r"rows' has rows that are new tokens on this model: .* a new token needs one at both"
    with pytest.raises(ValueError, match=match):
        load(path, model)
    save(random_rows(resized, [V, V + 1], targets=["embed_tokens", "lm_head"]), path)
    loaded = load(path, model)
    assert [spec.grown for spec in loaded.specs.values()] == [2, 2]
    torch.testing.assert_close(
        functional_call(model, patch(loaded), X).logits,
        functional_call(resized, patch(load(path, resized)), X).logits,
    )


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")  # PEFT asks for it
def test_a_peft_adapter_of_new_tokens_is_for_a_model_that_was_resized(tmp_path):
    model = llama()
    params = random_rows(model, NEW, grow=True)
    save_peft(params, tmp_path / "adapter")
    resized = copy.deepcopy(model)
    resized.resize_token_embeddings(V + 2, mean_resizing=False)
    expected = functional_call(model, patch(params), X).logits
    loaded = load_peft(tmp_path / "adapter", resized)
    torch.testing.assert_close(functional_call(resized, patch(loaded), X).logits, expected)
    theirs = peft.PeftModel.from_pretrained(resized, tmp_path / "adapter").eval()
    torch.testing.assert_close(theirs(X).logits, expected)
    with pytest.raises(
        ValueError, match=r"\[23, 24\] are past .*resize_token_emb.* load"
    ) as refused:
        load_peft(tmp_path / "adapter", model)
    assert "grow=True" not in str(refused.value)


def test_one_tensor_for_a_matrix_that_grows_and_one_that_does_not_is_refused():
    """Two tensors take both."""
    model = make("untied")
    state = model.state_dict()
    state["lm_head.weight"] = state[NAME]
    params = combine(
        random_rows(model, NEW, targets="embed_tokens", grow=True),
        random_rows(model, [3], targets="lm_head"),
    )
    with pytest.raises(ValueError, match=r"one tensor.*was another matrix when the rows were made"):
        merge(state, params)
    merged = merge(model.state_dict(), params)
    assert torch.equal(merged[NAME][NEW], params.deltas[NAME])
    assert torch.equal(merged["lm_head.weight"][3], params.deltas["lm_head.weight"][0])


def test_where_new_rows_start():
    model = make("tied")
    mean = model.embed_tokens.weight.detach().mean(0)
    rows = init_deltas(model, NEW, grow=True).deltas[NAME]
    torch.testing.assert_close(rows, torch.stack([mean, model.embed_tokens.weight[7], mean]))
    for init in ("mean", "normal", torch.ones(3, D), lambda base, ids: base[ids % V]):
        params = init_deltas(model, NEW, grow=True, init=init)
        assert params.deltas[NAME].shape == (3, D)
        # Unmerging takes new rows away; what is kept of them says where they started.
        assert torch.equal(params.originals[NAME][[0, 2]], params.deltas[NAME][[0, 2]])
        assert torch.equal(params.originals[NAME][1], model.embed_tokens.weight[7])


def test_new_ids_that_cannot_be():
    model = make("tied")
    with pytest.raises(IndexError, match=r"\[23\] are past the end.*grow=True"):
        init_deltas(model, [V])
    with pytest.raises(IndexError, match=r"\[24\].*leave out 23.*Give all ids from 23 on"):
        init_deltas(model, [7, V + 1], grow=True)
    with pytest.raises(IndexError, match=r"\[23, 25\].*leave out 24"):
        init_deltas(model, [V, V + 2], grow=True)
    with pytest.raises(IndexError, match="leave out 23"):
        init_deltas(model, [2**62], grow=True)
    a, b = grown(model), grown(model, [V])
    with pytest.raises(ValueError, match=r"\[23\] are in more than one"):
        combine(a, b)
    with pytest.raises(IndexError, match="out of range"):  # torch's, of a token that nobody has
        functional_call(model, patch(a), tokens(V + 2))


@pytest.mark.parametrize("case", ["tied", "untied", "biased"])
def test_new_tokens_that_follow_on_earlier_ones(case, tmp_path):
    model = make(case)
    first, state = grown(model), model.state_dict()
    then = random_rows(model, [V + 3, 5, V + 2], 1, after=first)
    both, x = combine(first, then), tokens(7, V, V + 3, V + 1, 5, V + 2)
    expected = functional_call(lengthened(lengthened(model, first), then, V + 2), {}, x)
    for weights in (patch(first, then), patch(then, first), patch(both), patch(both, dense=True)):
        torch.testing.assert_close(functional_call(model, weights, x), expected)

    merged = merge(merge(state, first), then)
    assert same_bits(merged, merge(state, both))
    assert same_bits(unmerge(merged, then), merge(state, first))
    assert same_bits(unmerge(unmerge(merged, then), first), state)
    assert same_bits(unmerge(merged, both), state)

    save(then, tmp_path / "then.safetensors")
    loaded = load(tmp_path / "then.safetensors", model)
    torch.testing.assert_close(functional_call(model, patch(first, loaded), x), expected)
    taller = lengthened(model, first)  # that was merged in the meantime
    again = load(tmp_path / "then.safetensors", taller)
    assert [spec.follows for spec in again.specs.values()] == [0] * len(first.specs)
    torch.testing.assert_close(functional_call(taller, patch(again), x), expected)


def test_new_tokens_that_follow_on_earlier_ones_are_nothing_without_them():
    model = make("tied")
    first = grown(model)
    then = random_rows(model, [V + 2], after=first)
    match = r"leave out token 23.*combine\(first, these\), or patch\(first, these\)"
    for use in (
        lambda: patch(then),
        lambda: patch_mixed([then], [0]),
        lambda: vmap(lambda params: patch(params)[NAME].sum())(stack([then])),
        lambda: TokenModule(model.requires_grad_(False), then),
    ):
        with pytest.raises(ValueError, match=match):
            use()
    with pytest.raises(ValueError, match=r"shape \(23, 8\), and the parameters were made for \(25"):
        merge(model.state_dict(), then)
    between = random_rows(model, [V + 3], after=combine(first, then))
    apart = combine(then, random_rows(model, [V + 4], after=between))
    with pytest.raises(ValueError, match="leave out token 26"):
        merge(merge(model.state_dict(), first), apart)
    with pytest.raises(ValueError, match=r"have \['1 after 2', 2\] new tokens"):
        stack([then, first])
    with pytest.raises(IndexError, match=r"\[24\] .* are of the parameters .* from 25"):
        init_deltas(model, [V + 1, V + 2], after=first)
    with pytest.raises(IndexError, match=r"\[26\].* leave out 25"):
        init_deltas(model, [V + 3], after=first)
    with pytest.raises(TypeError, match="grow is a list: give True"):
        init_deltas(model, [V], grow=[V])  # type: ignore[arg-type]


def test_no_new_ids_grow_nothing():
    with pytest.warns(UserWarning, match="rows of 'model.embed_tokens' alone are trained"):
        params = init_deltas(llama(tie=False), iter([7, 3]), grow=True)
    assert {name: spec.grown for name, spec in params.specs.items()} == {f"model.{NAME}": 0}
    both = init_deltas(llama(tie=False), iter([7, V]), grow=True)
    assert [spec.grown for spec in both.specs.values()] == [1, 1]


def test_a_compiled_model():
    model = make("tied").requires_grad_(False)
    params, compiled = grown(model), torch.compile(model, backend="eager")
    weights = {f"_orig_mod.{name}": weight for name, weight in patch(params).items()}
    expected = lengthened(model, params)(X)
    torch.testing.assert_close(functional_call(compiled, weights, X), expected)


def test_one_end_of_an_untied_model_is_refused():
    model = llama(tie=False)
    match = r"would have \{'model.embed_tokens': 25, 'lm_head': 23\} rows.*targets=\['model.embed"
    with pytest.raises(ValueError, match=match):
        init_deltas(model, [V, V + 1], targets="embed_tokens", grow=True)
    with pytest.raises(ValueError, match=r"\{'model.embed_tokens': 24, 'lm_head': 25\}"):
        init_deltas(model, {"embed_tokens": [V], "lm_head": [V, V + 1]}, grow=True)


def test_a_model_that_bounds_its_vocabulary_elsewhere_is_told_of():
    class Bounded(CORPUS["tied"]):  # type: ignore[misc]
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x) * torch.ones(V)

    model = Bounded()
    with pytest.raises(RuntimeError, match="must match the size") as caught:
        functional_call(model, patch(grown(model)), X)
    assert "bounds its vocabulary elsewhere" in caught.value.__notes__[0]


def test_a_config_is_one_in_all_modules_of_the_call():
    config = transformers.LlamaConfig(vocab_size=V)
    seen = []

    class Inner(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.config = config
            self.embed_tokens = nn.Embedding(V, D)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            seen.append(self.config)
            return self.embed_tokens(x)

    model = nn.Sequential(Inner())
    model.config, model.forward = config, lambda x: nn.Sequential.forward(model, x)
    params = random_rows(model, NEW, grow=True)
    functional_call(model, patch(params), X)
    assert seen[0] is not config
    assert (seen[0].vocab_size, config.vocab_size) == (V + 2, V)
    assert seen[0].hidden_size == config.hidden_size


class Items(dict):
    """As EasyDict and others: every item is an attribute too."""

    def __init__(self, **items: object) -> None:
        super().__init__(items)
        self.__dict__.update(items)


class Held:
    """An object of a class of its own that holds a config."""

    def __init__(self, config: object) -> None:
        self.config = config


def size_in(config: Any) -> int:
    return config["vocab_size"] if type(config) is dict else config.vocab_size


CONFIGS = {
    "namespace": SimpleNamespace,
    "items": Items,
    "dict": dict,
    "transformers": transformers.LlamaConfig,
}
WAYS = {
    "config": lambda model, config: setattr(model, "config", config),
    "args": lambda model, config: setattr(model, "args", config),
    "object": lambda model, config: setattr(model, "held", Held(config)),
    "both": lambda model, config: vars(model).update(config=config, kept={"its": config}),
}
READS = {
    "config": lambda model: model.config,
    "args": lambda model: model.args,
    "object": lambda model: model.held.config,
    "both": lambda model: model.kept["its"],
}


@pytest.mark.parametrize("kind", CONFIGS)
@pytest.mark.parametrize("way", WAYS)
def test_a_config_of_any_class_and_wherever_it_is_held_says_the_new_size(way: str, kind: str):
    config = CONFIGS[kind](vocab_size=V)

    class Counted(CORPUS["tied"]):  # type: ignore[misc]
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x).view(-1, size_in(READS[way](self)))

    model = Counted()
    WAYS[way](model, config)
    params = grown(model)
    expected = lengthened(model.__class__.__base__(), params)  # type: ignore[misc]
    expected.load_state_dict(merge(model.state_dict(), params))
    logits = functional_call(model, patch(params), X)
    torch.testing.assert_close(logits, expected(X).view(-1, V + 2))
    assert READS[way](model) is config
    assert size_in(config) == V
    assert model(X % V).shape[-1] == V


@pytest.mark.parametrize("raises", [False, True])
def test_what_a_model_keeps_of_its_config_is_its_own_and_what_it_writes_there_stays(raises: bool):
    part = SimpleNamespace(vocab_size=V, calls=0)
    config = SimpleNamespace(vocab_size=V, calls=0, text_config=part, old=1)

    class Keeps(CORPUS["tied"]):  # type: ignore[misc]
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.config.calls += 1
            self.config.text_config.calls += 2
            self.config.seen = self.config.vocab_size is not None
            self.config.first = self.config.text_config
            self.config.vocab_size = int(str(self.config.vocab_size))
            vars(self.config).pop("old", None)
            self.options["config"] = self.config
            self.options["calls"] = self.config.calls
            self.held, self.parts = Held(self.config.text_config), [self.config]
            if raises:
                raise ValueError("in between")
            return super().forward(x)[..., : self.config.vocab_size]

    model = Keeps()
    model.config, model.options = config, {"vocab_size": V}
    params = grown(model)
    for calls in (1, 2):
        with pytest.raises(ValueError, match="in between") if raises else nullcontext():
            assert functional_call(model, patch(params), X).shape[-1] == V + 2
        assert model.config is config
        assert config.text_config is part
        assert vars(config) == {
            "vocab_size": V, "calls": calls, "text_config": part, "seen": True, "first": part
        }  # fmt: skip
        assert vars(part) == {"vocab_size": V, "calls": 2 * calls}
        assert model.options == {"vocab_size": V, "config": config, "calls": calls}
        assert model.options["config"] is config
        assert model.held.config is part
        assert model.parts[0] is config


def test_a_config_that_cannot_be_copied_is_left_as_it_is():
    class Fixed(dict):
        def __reduce_ex__(self, protocol: object) -> Any:
            raise TypeError("cannot be copied")

    model = make("tied")
    model.config = Fixed(vocab_size=V)
    params = grown(model)
    assert functional_call(model, patch(params), X).shape[-1] == V + 2
    assert model.config == {"vocab_size": V}


def test_a_compiled_call_with_new_tokens_reads_the_new_size():
    model = llama().requires_grad_(False)
    x = X.clamp(min=3)
    params = grown(model)
    expected = functional_call(model, patch(params), x, {"labels": x}).loss

    def loss(params: TokenDeltas) -> torch.Tensor:
        return functional_call(model, patch(params), x, {"labels": x}).loss

    compiled = torch.compile(loss, backend="eager")
    torch.testing.assert_close(compiled(params), expected)
    assert model.config.vocab_size == V


class OwnHead(nn.Module):
    """A head of a class of its own."""

    def __init__(self, height: int = V) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(height, D))

    def forward(self, h: torch.Tensor) -> torch.Tensor:
        return h @ self.weight.T


class Named(CORPUS["tied"]):  # type: ignore[misc]
    """A model that names both of its ends."""

    def __init__(self, head: nn.Module) -> None:
        super().__init__(tie=False)
        self.lm_head = head

    def get_input_embeddings(self) -> nn.Module:
        return self.embed_tokens

    def get_output_embeddings(self) -> nn.Module:
        return self.lm_head


def test_a_head_of_a_class_of_its_own():
    torch.manual_seed(0)
    model = Named(OwnHead())
    params = grown(model, requires_grad=True)
    assert list(params.deltas) == [NAME, "lm_head.weight"]
    reference = lengthened(model, params)
    expected, logits = reference(X), functional_call(model, patch(params), X)
    torch.testing.assert_close(logits, expected)
    loss_of(expected).backward()
    loss_of(logits).backward()
    for name, wanted in row_gradients(reference, params).items():
        torch.testing.assert_close(params.deltas[name].grad, wanted)


@pytest.mark.parametrize("height", [V - 3, V + 3])
def test_a_head_of_another_height_is_refused(height: int):
    model = Named(nn.Linear(D, height))
    match = rf"'embed_tokens' of Named has 23 rows, and the head 'lm_head' has one of \({height}, 8"
    with pytest.raises(ValueError, match=match):
        init_deltas(model, NEW, grow=True)
    with pytest.raises(ValueError, match="the head 'lm_head' has no weight of its own"):
        init_deltas(Named(nn.Sequential(nn.Linear(D, V))), NEW, grow=True)
    rows = random_rows(model, [7, 3], targets="embed_tokens")  # of tokens that it has
    torch.testing.assert_close(
        functional_call(model, patch(rows), X % V), edited(model, rows)(X % V)
    )
    read = grown(model, targets="embed_tokens")  # what is to be read alone
    assert functional_call(model, patch(read), X).shape == (*X.shape, height)
    each = {"embed_tokens": [V, V + 1], "lm_head": list(range(height, height + 5))}
    both = init_deltas(model, each, grow=True)
    assert functional_call(model, patch(both), X).shape == (*X.shape, height + 5)


class Codes(torch.Tensor):
    """As torchao's: it says a float's dtype, and has codes."""

    def dequantize(self) -> torch.Tensor:
        return self.as_subclass(torch.Tensor)


def test_a_head_of_codes_is_refused():
    model = Named(nn.Linear(D, V))
    model.lm_head.weight = nn.Parameter(torch.zeros(V, D).as_subclass(Codes), False)
    with pytest.raises(TypeError, match=r"'lm_head' has a weight of dtype torch.float32 \(Codes\)"):
        init_deltas(model, NEW, grow=True)
    with pytest.raises(TypeError, match="'lm_head.weight' in the state dict is .*Codes"):
        merge(model.state_dict(), random_rows(Named(nn.Linear(D, V)), targets="lm_head"))


@pytest.mark.parametrize("sizes", [(V, V), (V, V + 4)])
def test_two_vocabularies(sizes: tuple[int, int]):
    config = transformers.FSMTConfig(
        src_vocab_size=sizes[0],
        tgt_vocab_size=sizes[1],
        langs=["a", "b"],
        d_model=D,
        encoder_layers=1,
        decoder_layers=1,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=D,
        decoder_ffn_dim=D,
    )
    model = transformers.FSMTForConditionalGeneration(config).eval()
    params = grown(model)  # whose head is of the other vocabulary: the input alone is no half
    assert list(params.deltas) == ["model.encoder.embed_tokens.weight"]
    inputs = {"input_ids": X.clamp(min=3), "decoder_input_ids": X % V}
    if sizes[0] == sizes[1]:
        with pytest.warns(UserWarning, match="If they are only to be read, all is well"):
            functional_call(model, patch(params), kwargs=inputs)
    logits = functional_call(model, patch(params), kwargs=inputs).logits  # it is said once
    reference = copy.deepcopy(model)
    table = nn.Parameter(torch.cat([model.model.encoder.embed_tokens.weight, torch.zeros(2, D)]))
    reference.model.encoder.embed_tokens.weight = table
    torch.testing.assert_close(logits, edited(reference, params)(**inputs).logits)


class Cut(CORPUS["tied"]):  # type: ignore[misc]
    """It cuts its logits by a count of its own."""

    def head(self, h: torch.Tensor) -> torch.Tensor:
        return super().head(h)[..., :V]


class Apart(CORPUS["tied"]):  # type: ignore[misc]
    """With two heads, of which nothing says that they are."""

    def __init__(self) -> None:
        super().__init__(tie=False)
        self.other_head = nn.Linear(D, V)


@pytest.mark.parametrize("made", [Cut, Apart])
def test_new_tokens_without_logits_are_told_of_once(made: Any):
    model = made()
    params = grown(model)
    with pytest.warns(UserWarning, match=r"\{23: 25\}, and made no logits for them") as caught:
        assert functional_call(model, patch(params), X).shape == (*X.shape, V)
    assert caught[0].filename == __file__
    functional_call(model, patch(params), X)
    # What is no logits needs none.
    model = made()
    params = grown(model)
    assert functional_call(model, patch(params), (X,), method="embed").shape == (*X.shape, D)


def test_a_generate_that_cannot_say_new_tokens_tells_of_them():
    model = llama(tie=False)
    model.get_output_embeddings = lambda: None
    model.twin = nn.Linear(D, V)  # so that the head is not the only one of its height
    params = random_rows(model, NEW, grow=True)
    options = {"max_new_tokens": 2, "do_sample": False}
    with pytest.warns(UserWarning, match="it can never say one"):
        functional_call(model, patch(params), (X.clamp(min=3),), options, method="generate")


def test_an_error_that_has_nothing_to_do_with_sizes_has_no_note():
    model = make("tied")
    with pytest.raises(TypeError, match="unexpected keyword argument 'y'") as caught:
        functional_call(model, patch(grown(model)), kwargs={"x": X, "y": 3})
    assert not getattr(caught.value, "__notes__", [])
