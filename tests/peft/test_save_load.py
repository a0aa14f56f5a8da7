"""PEFT's adapter directories, with PEFT itself at the other end."""

from __future__ import annotations

import contextlib
import copy
from dataclasses import replace
from pathlib import Path

import optree
import peft
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import nn

from tests.helpers.oracle import edited, same_bits, snapshot
from tests.helpers.peft_folders import (
    check_loaded,
    check_peft_reads,
    config_of,
    files_of,
    load_with_peft,
    on_meta,
    save_with_peft,
)
from tests.helpers.peft_reference import (
    EMBEDDING,
    IDX,
    RIGHT,
    D,
    V,
    inputs_of,
    logits,
    peft_of,
    run,
    toy,
)
from tests.helpers.rows import random_rows
from ttfunc import TokenDeltas, init_deltas, merge
from ttfunc.peft.load_peft import load_peft
from ttfunc.peft.save_peft import save_peft

TWO = ["embed_tokens", "lm_head"]


# --- What ttfunc trained, in PEFT


@pytest.mark.parametrize("name", RIGHT)
def test_peft_loads_what_is_saved(name: str, tmp_path):
    model = toy(name)
    params, before = random_rows(model, IDX), snapshot(model)
    save_peft(params, tmp_path / "ours")
    check_peft_reads(tmp_path / "ours", model, params)
    assert snapshot(model) == before

    theirs = save_with_peft(peft_of(model, IDX, params), tmp_path / "theirs")
    ours = tmp_path / "ours"
    files = ["README.md", "adapter_config.json", "adapter_model.safetensors"]
    assert sorted(files_of(ours)) == files
    paths = [folder / "adapter_model.safetensors" for folder in (ours, theirs)]
    assert same_bits(*(load_file(path) for path in paths))
    for path in paths:
        with safe_open(path, "pt") as file:
            assert file.metadata() == {"format": "pt"}
    assert config_of(ours)["token_indices"] == config_of(theirs)["token_indices"] == IDX
    assert config_of(ours).keys() <= config_of(theirs).keys()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_a_base_in_half_precision(dtype: torch.dtype, tmp_path):
    model = toy("llama_tied").to(dtype)
    for i, params in enumerate([random_rows(model, IDX), random_rows(model, IDX, dtype=dtype)]):
        save_peft(params, tmp_path / str(i))
        check_peft_reads(tmp_path / str(i), model, params)


@pytest.mark.parametrize("named_by", ["folder", "model"])
@pytest.mark.parametrize(
    ("name", "auto"),
    [
        ("llama_tied", peft.AutoPeftModelForCausalLM),
        ("llama_untied", peft.AutoPeftModelForCausalLM),
        ("t5", peft.AutoPeftModelForSeq2SeqLM),
        ("bart", peft.AutoPeftModel),
    ],
)
def test_auto_classes(name: str, auto, named_by: str, tmp_path):
    base = tmp_path / "base"
    toy(name).save_pretrained(base)
    model = type(toy(name)).from_pretrained(base).eval()
    params, inputs = random_rows(model, IDX), inputs_of(model, 7, 3)
    save_peft(params, tmp_path / "adapter", base_model=base if named_by == "folder" else model)
    assert config_of(tmp_path / "adapter")["base_model_name_or_path"] == str(base)
    wrapped = load_with_peft(auto.from_pretrained, str(tmp_path / "adapter"))
    torch.testing.assert_close(logits(wrapped, inputs), run(model, params, inputs))


@pytest.mark.parametrize("config", [None, "{", '{"architectures": null}', '{"architectures": []}'])
def test_a_base_whose_class_is_unknown(config, tmp_path):
    if config is not None:
        (tmp_path / "config.json").write_text(config)
    save_peft(random_rows(toy("llama_tied"), IDX), tmp_path / "adapter", base_model=tmp_path)
    assert config_of(tmp_path / "adapter")["base_model_name_or_path"] == str(tmp_path)
    assert config_of(tmp_path / "adapter")["auto_mapping"] is None


# --- What PEFT trained, in ttfunc


@pytest.mark.parametrize("name", RIGHT)
def test_what_peft_saved_is_loaded(name: str, tmp_path):
    model = toy(name)
    wrapped = peft_of(model, IDX, random_rows(model, IDX))
    params = check_loaded(save_with_peft(wrapped, tmp_path), model, wrapped)
    assert params.tied == random_rows(model, IDX).tied
    assert all(ids.tolist() == IDX for ids in params.token_indices.values())


def test_where_peft_has_the_rows_and_not_the_logits(tmp_path):
    model = toy("bert")
    params = random_rows(model, IDX)
    save_with_peft(peft_of(model, IDX, params), tmp_path)
    assert same_bits(load_peft(tmp_path, model).deltas, params.deltas)


def test_where_peft_has_wrapped_a_wrapper(tmp_path):
    """Its forward raises on a Marian, and its file has a key of PEFT's own modules."""
    model = toy("marian")
    wrapped = peft_of(model)
    save_with_peft(wrapped, tmp_path)
    (delta,) = load_peft(tmp_path, model).deltas.values()
    rows = {name: one for name, one in wrapped.named_parameters() if "trainable_tokens" in name}
    assert all(delta.equal(one) for one in rows.values())


@pytest.mark.parametrize(
    ("name", "idx"),
    [
        ("llama_tied", IDX),
        ("llama_untied", IDX),
        ("t5", IDX),
        ("bart", IDX),
        ("llama_tied", {"embed_tokens": IDX}),
        ("llama_tied", {"embed_tokens": IDX, "lm_head": IDX}),
        ("llama_untied", {"embed_tokens": IDX, "lm_head": IDX}),
        ("llama_untied", {"embed_tokens": [7, 3], "lm_head": [3, 41, 0]}),
        ("llama_untied", {"tokens": [3], "head": [7]}),
    ],
)
def test_the_token_rows_of_a_lora(name: str, idx, tmp_path):
    model = toy(name)
    # PEFT takes the end of a name without a dot, too.
    ours = idx if isinstance(idx, list) else {TWO["head" in end]: ids for end, ids in idx.items()}
    wrapped = peft_of(model, idx, random_rows(model, ours), lora=True)
    save_with_peft(wrapped, tmp_path)
    with pytest.warns(UserWarning, match=r"only the token rows .* such as .*lora_A.weight'"):
        check_loaded(tmp_path, model, wrapped)


@pytest.mark.parametrize("lora", [False, True], ids=["standalone", "lora"])
@pytest.mark.parametrize("wide", [True, False], ids=["float32", "as the base"])
@pytest.mark.filterwarnings("ignore:only the token rows")
def test_an_adapter_of_a_base_in_half_precision(wide: bool, lora: bool, tmp_path):
    model = toy("llama_tied").to(torch.bfloat16)
    options = {"autocast_adapter_dtype": wide}
    wrapped = peft_of(model, IDX, random_rows(model, IDX), wrap=options, lora=lora)
    params = check_loaded(save_with_peft(wrapped, tmp_path), model, wrapped)
    assert params.deltas[EMBEDDING].dtype == (torch.float32 if wide else torch.bfloat16)
    assert params.originals[EMBEDDING].dtype == torch.bfloat16


def test_there_and_back_again(tmp_path):
    model = toy("llama_tied")
    wrapped = peft_of(model, IDX, random_rows(model, IDX))
    theirs = load_peft(save_with_peft(wrapped, tmp_path / "theirs"), model)
    save_peft(theirs, tmp_path / "ours")
    check_peft_reads(tmp_path / "ours", model, theirs)
    ours = load_peft(tmp_path / "ours", model)
    assert ours.specs == theirs.specs
    assert same_bits(ours.deltas, theirs.deltas)


@pytest.mark.parametrize("name", RIGHT)
def test_a_skeleton_on_meta(name: str, tmp_path):
    model = toy(name)
    params = random_rows(model, IDX)
    save_peft(params, tmp_path)
    loaded = load_peft(tmp_path, on_meta(model))
    assert loaded.tied == params.tied
    assert same_bits(loaded.deltas, params.deltas)
    assert all(rows.is_meta for rows in loaded.originals.values())
    assert same_bits(merge(model.state_dict(), loaded), edited(model, params).state_dict())


# --- What cannot be saved


class Bare(nn.Module):
    """A head that is a parameter of the model, tied to its embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(V, D)
        self.output = self.embedding.weight


@pytest.mark.parametrize(
    ("spoil", "match"),
    [
        (lambda p: optree.tree_map(lambda r: torch.stack([r, r]), p), r"shape \(2, 3, 16\), and"),
        (lambda p: optree.tree_map(lambda r: r.double() + 1e-12, p), "more digits than"),
        (lambda p: optree.tree_map(lambda r: r.double() * 1e300, p), "more digits than"),
        (lambda p: optree.tree_map(lambda r: r.to("meta"), p), "on the meta device"),
        (lambda p: optree.tree_map(lambda r: r.int(), p), "torch.int32, and a float dtype"),
        (lambda p: init_deltas(Bare(), IDX), "weight of a named module, and not 'output'"),
        (lambda p: init_deltas(nn.Embedding(V, D), IDX, targets=""), "and not 'weight'"),
        (
            lambda p: TokenDeltas(
                {**p.deltas, "a": p.deltas[EMBEDDING]},
                {**p.specs, "a": replace(p.specs[EMBEDDING])},
            ),
            "belongs to two matrices",
        ),
        (lambda p: TokenDeltas({}, {}), "there are no rows"),
    ],
    ids=["stacked", "digits", "range", "meta", "int", "attribute", "root", "twice", "none"],
)
def test_what_cannot_be_saved_is_refused_first(spoil, match: str, saved: Path, tmp_path):
    before = files_of(saved)
    for directory in (saved, tmp_path / "new"):
        with pytest.raises(ValueError, match=match):
            save_peft(spoil(random_rows(toy("llama_tied"), IDX)), directory)
    assert files_of(saved) == before
    assert not (tmp_path / "new").exists()


def test_doubles_that_float32_has(tmp_path):
    model = toy("llama_tied").double()
    params = random_rows(model.float(), IDX)
    wide = optree.tree_map(lambda rows: rows.double(), params)
    save_peft(wide, tmp_path)
    assert same_bits(load_peft(tmp_path, model).deltas, params.deltas)


@pytest.mark.parametrize("requires_grad", [False, True])
def test_rows_that_are_ready_to_be_trained(requires_grad: bool, saved: Path):
    loaded = load_peft(saved, toy("llama_tied"), requires_grad=requires_grad)
    assert [delta.requires_grad for delta in loaded.deltas.values()] == [requires_grad]
    assert all(delta.is_leaf for delta in loaded.deltas.values())
    assert not any(rows.requires_grad for rows in loaded.originals.values())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_rows_in_a_dtype_of_the_caller_s(dtype: torch.dtype, saved: Path):
    model = toy("llama_tied")
    loaded = load_peft(saved, model, dtype=dtype, requires_grad=True)
    for name, rows in load_peft(saved, model).deltas.items():
        assert torch.equal(loaded.deltas[name], rows.to(dtype))
        assert loaded.deltas[name].is_leaf
        assert loaded.deltas[name].requires_grad
    with pytest.raises(TypeError, match=r"dtype=torch.int64 cannot be trained"):
        load_peft(saved, model, dtype=torch.int64)


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")  # PEFT asks for it
@pytest.mark.parametrize("kind", ["rows alone", "beside a LoRA"])
def test_a_model_into_which_peft_has_loaded_the_rows(kind: str, tmp_path):
    model = toy("llama_tied").requires_grad_(False)
    if kind == "rows alone":
        params = random_rows(model, IDX)
        save_peft(params, tmp_path)
    else:
        config = peft.LoraConfig(target_modules=["q_proj"], init_lora_weights=False)
        lora = peft.get_peft_model(copy.deepcopy(model), config)
        params = random_rows(lora, IDX)
        save_peft(params, tmp_path, adapter=lora)
    theirs = load_with_peft(peft.PeftModel.from_pretrained, copy.deepcopy(model), str(tmp_path))
    with pytest.raises(ValueError, match=r"has rows of tokens already.*model.unload\(\)"):
        load_peft(tmp_path, theirs)
    told = contextlib.nullcontext()
    if kind == "beside a LoRA":
        told = pytest.warns(UserWarning, match="only the token rows")
    with told:
        loaded = load_peft(tmp_path, theirs.unload())
    assert [*map(torch.equal, loaded.deltas.values(), params.deltas.values())] == [True]


def test_arguments_in_another_order(saved: Path, tmp_path):
    model = toy("llama_tied")
    params = random_rows(model, IDX)
    with pytest.raises(TypeError, match=r"got TokenDeltas. The order is save_peft.params, direct"):
        save_peft(tmp_path / "new", params)
    with pytest.raises(TypeError, match=r"got LlamaFor.*. The order is load_peft.directory, model"):
        load_peft(model, saved)
    with pytest.raises(TypeError, match=r"a model is needed, got str. The order is load_peft.dir"):
        load_peft(saved, "model")
    assert not (tmp_path / "new").exists()
