"""Finding the token matrices, and all that is tied to them."""

from __future__ import annotations

import re

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.nn.utils import parametrize

from tests.helpers.llama import llama
from tests.helpers.models import CORPUS, D, V, make, tokens
from tests.helpers.unusual import UNUSUAL
from ttfunc import functional_call, init_deltas, merge, patch, unmerge
from ttfunc.model.matrix import count_slots, matrix_of
from ttfunc.model.targets import find_targets


class Towers(nn.Module):
    """Two towers with embeddings of one name, and one of another that ends alike."""

    def __init__(self) -> None:
        super().__init__()
        self.text = nn.ModuleDict({"emb": nn.Embedding(V, D), "pos_emb": nn.Embedding(4, D)})
        self.image = nn.ModuleDict({"emb": nn.Embedding(V, D), "norm": nn.LayerNorm(D)})
        self.head = nn.Linear(D, V)


@pytest.mark.parametrize("case", CORPUS)
def test_the_input_embedding_is_found(case: str):
    model = make(case)
    ((name, module),) = find_targets(model, None).items()
    assert module is model.embed_tokens
    assert model.get_submodule(name) is module


@pytest.mark.parametrize(
    ("targets", "names"),
    [
        ("text.emb", ["text.emb"]),
        ("emb", ["text.emb", "image.emb"]),
        ("pos_emb", ["text.pos_emb"]),
        ("head", ["head"]),
        (["text.emb", "head"], ["text.emb", "head"]),
        (["emb", "text.emb"], ["text.emb", "image.emb"]),
        (re.compile(r"text\..*"), ["text.emb", "text.pos_emb"]),
    ],
)
def test_targets_are_found_by_name_suffix_list_and_pattern(targets, names: list[str]):
    assert list(find_targets(Towers(), targets)) == names


@pytest.mark.parametrize(
    ("targets", "error", "match"),
    [
        ("nothing", ValueError, "'nothing' matches no module.*Candidates: 'text.emb'"),
        ("mb", ValueError, "'mb' matches no module"),
        ("", TypeError, "'' is a Towers: only Embedding and Linear"),
        (["text.emb", "nothing"], ValueError, "'nothing' matches no module"),
        (re.compile("emb"), ValueError, r"re.compile\('emb'\) matches no module"),
        (r"text\..*", ValueError, "for a regular expression give re.compile"),
        ([], ValueError, "targets is empty"),
        ([3], TypeError, "must be module names, got int"),
        (5, TypeError, "must be module names, got int"),
        ([None], TypeError, "must be module names, got NoneType"),
        ("image.norm", TypeError, "'image.norm' is a LayerNorm: only Embedding and Linear"),
        ("text", TypeError, "'text' is a ModuleDict"),
        ("text.emb.weight", ValueError, "'text.emb.weight' is a parameter.*targets='text.emb'"),
        ("emb.weight", ValueError, "is a parameter, .*Give targets='emb'"),
        ("nothing.weight", ValueError, "'nothing.weight' matches no module"),
        (None, ValueError, "cannot tell which module is the input embedding of Towers.*targets="),
    ],
)
def test_unknown_and_ambiguous_targets_are_refused(targets, error, match: str):
    with pytest.raises(error, match=match):
        find_targets(Towers(), targets)


def test_the_only_embedding_and_the_one_named_embed_tokens_are_found():
    alone = nn.Sequential(nn.Embedding(V, D), nn.Linear(D, V))
    assert list(find_targets(alone, None)) == ["0"]
    named = nn.ModuleDict({"embed_tokens": nn.Embedding(V, D), "positions": nn.Embedding(4, D)})
    assert list(find_targets(named, None)) == ["embed_tokens"]
    itself = nn.Embedding(V, D)
    assert find_targets(itself, None) == {"": itself}


def test_a_model_that_cannot_name_its_embedding_is_searched():
    class Composite(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.words = nn.Embedding(V, D)

        def get_input_embeddings(self):
            raise NotImplementedError

    assert list(find_targets(Composite(), None)) == ["words"]


def test_a_weight_that_is_no_float_parameter_is_refused():
    model = make("untied")
    parametrize.register_parametrization(model.embed_tokens, "weight", nn.Identity())
    with pytest.raises(TypeError, match="has no parameter named weight"):
        find_targets(model, None)
    model = make("untied")
    model.embed_tokens.weight = nn.Parameter(torch.zeros(V, D, dtype=torch.int8), False)
    with pytest.raises(TypeError, match="weight of dtype torch.int8: only floating-point"):
        find_targets(model, "embed_tokens")


@pytest.mark.parametrize(
    ("case", "names", "slots", "distinct"),
    [
        ("untied", ["embed_tokens.weight"], 1, 1),
        ("tied", ["embed_tokens.weight", "lm_head.weight"], 2, 1),
        ("storage_tied", ["embed_tokens.weight", "lm_head.weight"], 2, 2),
        (
            "encoder_decoder",
            [
                "embed_tokens.weight",
                "lm_head.weight",
                "shared.weight",
                "encoder.embed_tokens.weight",
            ],
            2,
            1,
        ),
    ],
)
def test_all_places_of_a_matrix_are_found(case: str, names: list[str], slots: int, distinct: int):
    model = make(case)
    matrix = matrix_of(model, model.embed_tokens.weight)
    assert list(matrix.names) == names
    assert set(names) == {n for n in model.state_dict() if n in names}
    assert len(matrix.slots) == slots
    assert count_slots(model, matrix.distinct.values()) == slots
    assert len(matrix.distinct) == distinct
    assert matrix.tensor is model.embed_tokens.weight


def test_ties_are_found_on_the_meta_device():
    with torch.device("meta"):
        model = CORPUS["storage_tied"]()
        other = CORPUS["untied"]()
    assert len(matrix_of(model, model.embed_tokens.weight).names) == 2
    assert len(matrix_of(other, other.embed_tokens.weight).names) == 1


def test_another_view_of_the_matrix_is_refused():
    model = make("untied")
    model.part = nn.Module()
    model.part.weight = nn.Parameter(model.embed_tokens.weight.data[2:])
    with pytest.raises(ValueError, match=r"'part.weight' \(21, 8\) is another view of the matrix"):
        matrix_of(model, model.embed_tokens.weight)


def test_neighbours_in_one_flat_storage_are_not_tied():
    flat = torch.randn(2 * V * D)
    model = make("untied")
    model.embed_tokens.weight = nn.Parameter(flat[: V * D].view(V, D))
    model.lm_head.weight = nn.Parameter(flat[V * D :].view(V, D))
    assert matrix_of(model, model.embed_tokens.weight).names == ("embed_tokens.weight",)


def test_the_model_itself_is_a_target():
    head = nn.Linear(D, V)
    assert find_targets(head, "") == {"": head}
    with pytest.raises(ValueError, match='targets="" is the model itself'):
        find_targets(head, None)


def test_a_buffer_over_the_same_memory_is_a_place_too():
    model = make("untied")
    model.register_buffer("kept", model.embed_tokens.weight.data)
    model.register_buffer("unkept", model.embed_tokens.weight.data, persistent=False)
    matrix = matrix_of(model, model.embed_tokens.weight)
    assert sorted(matrix.names) == ["embed_tokens.weight", "kept"]
    assert {name for name, _ in matrix.slots} == {"embed_tokens.weight", "kept", "unkept"}
    assert count_slots(model, matrix.distinct.values()) == 3


@pytest.mark.filterwarnings(
    "ignore:.is_gradient_checkpointing. is deprecated:FutureWarning"
)  # peft's
def test_a_layer_within_an_adapter_is_named():
    model = get_peft_model(
        llama(tie=False), LoraConfig(target_modules=["lm_head", "embed_tokens"], r=2)
    )
    for target in ("lm_head", "embed_tokens"):
        with pytest.raises(TypeError, match=rf"within an adapter.*: name .*{target}\.base_layer'"):
            find_targets(model, target)
        assert len(find_targets(model, f"{target}.base_layer")) == 1
    with pytest.raises(TypeError, match="targets='base_layer'"):
        find_targets(model.get_submodule("base_model.model.lm_head"), "")


@pytest.mark.parametrize("kind", UNUSUAL)
def test_what_has_no_strided_memory_may_be_anywhere_in_the_model(kind: str):
    model = make("tied")
    model.unusual = nn.Module()
    model.unusual.register_buffer("kept", UNUSUAL[kind]())
    matrix = matrix_of(model, model.embed_tokens.weight)
    assert matrix.names == ("embed_tokens.weight", "lm_head.weight")
    params = init_deltas(model, [7], init="mean")
    before = {**model.state_dict(), "unusual.kept": model.unusual.kept}
    merged = merge(before, params)
    assert merged["unusual.kept"] is model.unusual.kept
    assert torch.equal(unmerge(merged, params)["lm_head.weight"], model.lm_head.weight)
    assert type(functional_call(model, patch(params), (tokens(7),))) is torch.Tensor
