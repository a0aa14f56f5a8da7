"""PEFT's adapter directories, with PEFT itself at the other end."""

from __future__ import annotations

import copy
import errno
import json
import os
import warnings
from dataclasses import replace
from pathlib import Path

import optree
import peft
import pytest
import torch
import transformers
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from tests.helpers.models import Language
from tests.helpers.oracle import edited, same_bits, snapshot
from tests.helpers.peft_reference import (
    EMBEDDING,
    HEAD,
    IDX,
    RIGHT,
    D,
    V,
    far,
    filled,
    inputs_of,
    logits,
    peft_deltas,
    peft_of,
    quiet,
    run,
    toy,
)
from tests.helpers.rows import random_rows
from ttfunc import TokenDeltas, init_deltas, merge, unmerge
from ttfunc.peft.convert import load_peft, save_peft

KEY = "base_model.model.{}.trainable_tokens_delta"
TWO = ["embed_tokens", "lm_head"]
APART = {"embed_tokens": [7, 3], "lm_head": [3, 41, 0]}


def gpt2() -> nn.Module:
    """A tied matrix and another embedding beside it."""
    sizes = {"n_embd": D, "n_layer": 1, "n_head": 2, "n_positions": 32, "vocab_size": V}
    return filled(transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes)))


def save_with_peft(wrapped: peft.PeftModel, directory: Path) -> Path:
    with quiet():
        wrapped.save_pretrained(directory)
    return directory


def load_with_peft(load, *args) -> peft.PeftModel:
    """PEFT's model, and nothing that it warns of but what is deprecated in transformers."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        wrapped = load(*args)
    said = [str(warning.message) for warning in caught]
    assert [text for text in said if "is_gradient_checkpointing" not in text] == []
    return wrapped.eval()


def check_peft_reads(directory: Path, model: nn.Module, params: TokenDeltas) -> None:
    """PEFT gives the logits that ttfunc does, which are not the model's."""
    inputs = inputs_of(model, 7, 3)
    expected = run(model, params, inputs)
    assert far(expected, logits(model, inputs))
    wrapped = load_with_peft(peft.PeftModel.from_pretrained, copy.deepcopy(model), str(directory))
    torch.testing.assert_close(logits(wrapped, inputs), expected)
    assert same_bits(
        {name: delta.detach() for name, delta in peft_deltas(wrapped).items()},
        {name: delta.float() for name, delta in params.deltas.items()},
    )


def files_of(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}


def config_of(directory: Path) -> dict:
    return json.loads((directory / "adapter_config.json").read_text())


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
    assert sorted(files_of(ours)) == ["adapter_config.json", "adapter_model.safetensors"]
    paths = [folder / "adapter_model.safetensors" for folder in (ours, theirs)]
    assert same_bits(*(load_file(path) for path in paths))
    for path in paths:
        with safe_open(path, "pt") as file:
            assert file.metadata() == {"format": "pt"}
    assert config_of(ours)["token_indices"] == config_of(theirs)["token_indices"] == IDX
    assert config_of(ours).keys() <= config_of(theirs).keys()


@pytest.mark.parametrize(
    ("build", "idx", "targets", "kind"),
    [
        (lambda: toy("llama_untied"), IDX, TWO, "TRAINABLE_TOKENS"),
        (lambda: toy("llama_untied"), APART, None, "LORA"),
        (lambda: toy("llama_untied"), IDX, ["lm_head"], "TRAINABLE_TOKENS"),
        (lambda: toy("bart_untied"), IDX, ["encoder.embed_tokens", "decoder.embed_tokens"], None),
        (gpt2, [7, 3], ["wte", "wpe"], "TRAINABLE_TOKENS"),
        (gpt2, {"wte": [7, 3], "wpe": [3, 0]}, None, "LORA"),
    ],
    ids=["two", "two apart", "head", "encoder and decoder", "tied and another", "these apart"],
)
def test_several_matrices(build, idx, targets, kind, tmp_path):
    model = build()
    params = random_rows(model, idx, targets=targets)
    save_peft(params, tmp_path / "adapter")
    check_peft_reads(tmp_path / "adapter", model, params)
    assert config_of(tmp_path / "adapter")["peft_type"] == kind or kind is None
    loaded = load_peft(tmp_path / "adapter", model)
    assert optree.tree_structure(loaded) == optree.tree_structure(params)
    assert same_bits(loaded.deltas, params.deltas)


class Nested(nn.Module):
    """Full names of which one is the end of another."""

    def __init__(self) -> None:
        super().__init__()
        self.embed_tokens, self.inner = nn.Embedding(23, 8), Language(tie=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.inner.head(self.inner.mix(self.embed_tokens(x) + self.inner.embed(x)))


@pytest.mark.parametrize("target", ["embed_tokens", "inner.embed_tokens"])
def test_a_name_that_is_the_end_of_another(target: str, tmp_path):
    model = filled(Nested())
    params = random_rows(model, [7, 3], targets=target)
    save_peft(params, tmp_path)
    check_peft_reads(tmp_path, model, params)
    assert list(load_peft(tmp_path, model).deltas) == [f"{target}.weight"]


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


def check_loaded(directory: Path, model: nn.Module, wrapped: peft.PeftModel) -> TokenDeltas:
    """The logits are PEFT's, the rows too, bit for bit, and the model is as it was."""
    before, inputs = snapshot(model), inputs_of(model, 7, 3)
    params = load_peft(directory, model)
    assert snapshot(model) == before
    theirs = {name: delta.detach() for name, delta in peft_deltas(wrapped).items()}
    assert same_bits(params.deltas, theirs)
    expected = logits(wrapped, inputs)
    torch.testing.assert_close(run(model, params, inputs), expected)
    assert far(expected, logits(model, inputs))
    state = model.state_dict()
    assert same_bits(unmerge(merge(state, params), params), state)
    assert not any(delta.requires_grad for delta in params.deltas.values())
    return params


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
    save_with_peft(peft_of(model), tmp_path)
    refused(
        tmp_path, "no parameter 'model.encoder.embed_tokens.base_layer.weight'", model, KeyError
    )


@pytest.mark.parametrize(
    "targets", [TWO, ["lm_head"], ["embed_tokens"], r".*embed_tokens|lm_head", "lm_head", "lm_.*"]
)
def test_targets_of_peft(targets, tmp_path):
    model = toy("llama_untied")
    ours = targets if isinstance(targets, list) else ["lm_head"] if "|" not in targets else TWO
    wrapped = peft_of(model, IDX, random_rows(model, IDX, targets=ours), target_modules=targets)
    params = check_loaded(save_with_peft(wrapped, tmp_path), model, wrapped)
    assert len(params.deltas) == len(ours)


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
    assert ours.rows == theirs.rows
    assert same_bits(ours.deltas, theirs.deltas)


def on_meta(model: nn.Module) -> nn.Module:
    with torch.device("meta"):
        return type(model)(model.config)


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


def test_the_least_config(tmp_path):
    model = toy("llama_tied")
    params = random_rows(model, IDX)
    save_peft(params, tmp_path)
    least = {"peft_type": "TRAINABLE_TOKENS", "token_indices": IDX}
    (tmp_path / "adapter_config.json").write_text(json.dumps(least))
    check_peft_reads(tmp_path, model, params)
    assert same_bits(load_peft(tmp_path, model).deltas, params.deltas)


# --- A vocabulary that was resized: PEFT saves whole matrices as well


def resized(name: str, folder: Path, **options) -> tuple[nn.Module, peft.PeftModel]:
    """A model with two rows more than its folder has, and PEFT around it; the last row trains."""
    toy(name).save_pretrained(folder / "base")
    with quiet():
        model = transformers.AutoModelForCausalLM.from_pretrained(folder / "base").eval()
        model.resize_token_embeddings(V + 2)
    wrapped = peft_of(model, [7, 3, V + 1], random_rows(model, [7, 3, V + 1]), **options)
    wrapped.peft_config["default"].base_model_name_or_path = str(folder / "base")
    save_with_peft(wrapped, folder / "adapter")
    keys = load_file(folder / "adapter" / "adapter_model.safetensors")
    assert any(key.endswith(".base_layer.weight") for key in keys)
    return model, wrapped


@pytest.mark.filterwarnings("ignore:only the token rows")
@pytest.mark.parametrize("lora", [False, True], ids=["standalone", "lora"])
@pytest.mark.parametrize("name", ["llama_tied", "llama_untied"])
def test_whole_matrices_that_are_the_models(name: str, lora: bool, tmp_path):
    model, wrapped = resized(name, tmp_path, lora=lora)
    check_loaded(tmp_path / "adapter", model, wrapped)
    with torch.no_grad():  # a row that is trained may be another one
        model.model.embed_tokens.weight[V + 1] += 1
    params = load_peft(tmp_path / "adapter", model)
    assert torch.equal(params.originals[EMBEDDING][2], model.model.embed_tokens.weight[V + 1])


@pytest.mark.filterwarnings("ignore:only the token rows")
@pytest.mark.parametrize("lora", [False, True], ids=["standalone", "lora"])
@pytest.mark.parametrize("name", ["llama_tied", "llama_untied"])
def test_whole_matrices_that_are_not_the_models(name: str, lora: bool, tmp_path):
    model, _ = resized(name, tmp_path, lora=lora)
    with torch.no_grad():
        model.model.embed_tokens.weight[V] += 1  # as another resizing would draw it
    with pytest.raises(ValueError, match=r"whole, and 1 rows that are not trained, from 60 on"):
        load_peft(tmp_path / "adapter", model)
    with pytest.raises(ValueError, match=r"\[61\] are past the end of .* Resize the model first"):
        load_peft(tmp_path / "adapter", toy(name))
    with pytest.warns(UserWarning, match="whole, which is not loaded"):
        load_peft(tmp_path / "adapter", on_meta(model))


def test_a_whole_matrix_of_another_size(tmp_path):
    resized("llama_tied", tmp_path)
    change_config(tmp_path / "adapter", token_indices=[7, 3, 41])
    with pytest.raises(ValueError, match=r"whole, \(62, 16\) .* has \(60, 16\)\. Resize the model"):
        load_peft(tmp_path / "adapter", toy("llama_tied"))


# --- What cannot be loaded


@pytest.fixture
def saved(tmp_path) -> Path:
    save_peft(random_rows(toy("llama_tied"), IDX), tmp_path / "adapter")
    return tmp_path / "adapter"


def change_config(directory: Path, **values) -> None:
    (directory / "adapter_config.json").write_text(json.dumps({**config_of(directory), **values}))


def change_keys(directory: Path, change) -> None:
    path = directory / "adapter_model.safetensors"
    save_file(dict(change(*item) for item in load_file(path).items()), path, {"format": "pt"})


def refused(directory: Path, match: str, model=None, error=ValueError) -> None:
    """With a message that names the adapter, and the model as it was."""
    model = toy("llama_tied") if model is None else model
    before = snapshot(model)
    with pytest.raises(error, match=match) as caught:
        load_peft(directory, model)
    assert str(directory) in str(caught.value)
    assert snapshot(model) == before


@pytest.mark.parametrize(
    ("values", "match"),
    [
        ({"peft_type": "IA3"}, r"of type 'IA3', and only \['TRAINABLE_TOKENS', 'LORA'\]"),
        ({"peft_type": None}, "of type None"),
        ({"peft_type": ["LORA"]}, r"of type \['LORA'\]"),
        ({"peft_type": "LORA"}, "'trainable_token_indices' is missing"),
        ({"token_indices": None}, "'token_indices' is missing"),
        ({"token_indices": [7, 3, 7]}, r"\[7\] .* more than once"),
        ({"token_indices": [7, 3, -1]}, r"negative token indices \[-1\]"),
        ({"token_indices": [7, 3, V]}, r"\[60\] are past the end .* Resize the model"),
        ({"token_indices": [7, 3, 2**70]}, "are past the end"),
        ({"token_indices": [7, 3]}, r"shape \(3, 16\), and \(2, 16\) is needed"),
        ({"token_indices": []}, "no token indices"),
        ({"token_indices": [7, 3, 4.0]}, "must be integers, got float"),
        ({"token_indices": [7, 3, True]}, "got the boolean True"),
        ({"token_indices": [7, 3, "4"]}, "must be integers, got the text"),
        ({"token_indices": 7}, "are 7, not a list"),
        ({"token_indices": "734"}, "not a list"),
        ({"target_modules": "("}, "is no pattern"),
        ({"target_modules": 3}, "its targets are 3"),
        ({"target_modules": [3]}, r"its targets are \[3\]"),
        ({"target_modules": "nowhere"}, r"which is none of its targets \[\]"),
        ({"target_modules": ["tokens"]}, r"which is none of its targets \[\]"),
        ({"target_modules": ["q_proj"]}, r"no rows for its targets \['model.layers.0.self_attn.q"),
    ],
)
def test_configs_that_lie(values: dict, match: str, saved: Path):
    change_config(saved, **values)
    refused(saved, match)


@pytest.mark.parametrize("text", ["", "[]", "{", "[" * 10**5, "\xff\xfe"])
def test_a_config_that_is_none(text: str, saved: Path):
    (saved / "adapter_config.json").write_bytes(text.encode("latin1"))
    refused(saved, "adapter_config.json' cannot be read")


@pytest.mark.parametrize(
    ("change", "error", "match"),
    [
        (lambda key, rows: (key.removeprefix("base_model.model."), rows), ValueError, "if untrain"),
        (lambda key, rows: (key.removeprefix("base_model."), rows), ValueError, "if untrained"),
        (lambda key, rows: (f"base_model.{key}", rows), ValueError, "if untrained|no parameter"),
        (lambda key, rows: (f"base_model.model.{key}", rows), KeyError, "Did you mean '"),
        (lambda key, rows: (key.replace("embed", "embad"), rows), KeyError, "Did you mean 'model."),
        (lambda key, rows: (key + ".default", rows), ValueError, "belongs to no TRAINABLE_TOKENS"),
        (
            lambda key, rows: (key.replace(".train", ".token_adapter.train"), rows),
            ValueError,
            "is not what a TRAINABLE_TOKENS adapter has",
        ),
        (lambda key, rows: (key, rows[:2]), ValueError, r"shape \(2, 16\), and \(3, 16\)"),
        (lambda key, rows: (key, rows[0]), ValueError, r"shape \(16,\), and \(3, 16\)"),
        (lambda key, rows: (key, rows[0, 0]), ValueError, r"shape \(\), and \(3, 0\)"),
        (lambda key, rows: (key, rows[:, :8].clone()), ValueError, r"\(3, 8\), and the weight is"),
        (lambda key, rows: (key, rows.long()), ValueError, "torch.int64, and a float dtype"),
        (lambda key, rows: (key, rows.int()), ValueError, "has dtype I32"),
        (lambda key, rows: (key, rows + ("head" in key)), ValueError, "different rows .*tied here"),
        (lambda key, rows: ("base_model.model.lm_head.weight", rows), ValueError, "no tensor base"),
    ],
)
def test_tensors_that_lie(change, error, match: str, saved: Path):
    change_keys(saved, change)
    refused(saved, match, error=error)


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")  # transformers
def test_what_peft_loads_as_if_it_were_untrained(saved: Path):
    """The same file: PEFT warns, and has the logits of the base."""
    change_keys(saved, lambda key, rows: (key.removeprefix("base_model."), rows))
    model = toy("llama_tied")
    with pytest.warns(UserWarning, match="missing adapter keys"):
        wrapped = peft.PeftModel.from_pretrained(copy.deepcopy(model), str(saved))
    inputs = inputs_of(model, 7, 3)
    assert torch.equal(logits(wrapped, inputs), logits(model, inputs))
    refused(saved, "does not begin with 'base_model.model.': PEFT would load such an adapter as if")


def test_files_that_are_missing_or_damaged(saved: Path):
    path = saved / "adapter_model.safetensors"
    whole = path.read_bytes()
    for length in range(0, len(whole), 7):
        path.write_bytes(whole[:length])
        refused(saved, "no safetensors file, or damaged")
    path.unlink()
    refused(saved, "there is no file .*adapter_model.safetensors", error=FileNotFoundError)
    (saved / "adapter_model.bin").touch()
    refused(saved, r"adapter_model.bin' is a pickle, .* load it with PEFT and save it again")
    (saved / "adapter_config.json").unlink()
    refused(saved, "there is no file .*adapter_config.json", error=FileNotFoundError)
    refused(saved / "nowhere", "there is no file", error=FileNotFoundError)


def test_a_tied_adapter_on_an_untied_model_and_the_reverse(saved: Path, tmp_path):
    untied = toy("llama_untied")
    refused(saved, r"rows for \[\('lm_head.weight',\)\], which is none of its targets", untied)
    save_peft(random_rows(untied, IDX), tmp_path / "one")
    assert load_peft(tmp_path / "one", toy("llama_tied")).tied == {EMBEDDING: (EMBEDDING, HEAD)}
    save_peft(random_rows(untied, IDX, targets=TWO), tmp_path / "two")
    refused(tmp_path / "two", "different rows or token indices for .* tied here")
    apart = random_rows(untied, {"embed_tokens": [7], "lm_head": [3]})
    save_peft(optree.tree_map(torch.ones_like, apart), tmp_path / "apart")
    refused(tmp_path / "apart", "different rows or token indices for .* tied here")


@pytest.mark.filterwarnings("ignore:only the token rows")
def test_a_lora_that_lies(tmp_path):
    model = toy("llama_untied")
    save_with_peft(peft_of(model, APART, lora=True), tmp_path)
    load_peft(tmp_path, model)
    for indices, match in (
        ({"lm_head": [3, 41, 0]}, "0 lists of indices for 'model.embed_tokens'"),
        ({**APART, "tokens": [1, 2]}, "2 lists of indices for 'model.embed_tokens'"),
        ({**APART, "q_proj": [1]}, r"no rows for its targets \['model.layers.0.self_attn.q_proj"),
        ({**APART, "lm_head": {"3": 1}}, "not a list"),
        ([7, 3], r"shape \(3, 16\), and \(2, 16\)"),
    ):
        change_config(tmp_path, trainable_token_indices=indices)
        refused(tmp_path, match, model)
    change_config(tmp_path, trainable_token_indices=APART)
    change_keys(tmp_path, lambda key, rows: (key.replace(".token_adapter", ""), rows))
    refused(tmp_path, "is not what a LORA adapter has: <module>.token_adapter", model)


def test_a_second_target_that_has_no_rows(tmp_path):
    model = toy("llama_untied")
    save_with_peft(peft_of(model, IDX, target_modules=TWO), tmp_path)
    path = tmp_path / "adapter_model.safetensors"
    tensors = load_file(path)
    del tensors[KEY.format("lm_head")]
    save_file(tensors, path)
    refused(tmp_path, r"no rows for its targets \['lm_head.weight'\]", model)


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
                {**p.deltas, "a": p.deltas[EMBEDDING]}, {**p.rows, "a": replace(p.rows[EMBEDDING])}
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


def test_another_adapter_is_not_lost(saved: Path, tmp_path):
    model = toy("llama_tied")
    (saved / "tokenizer.json").write_text("{}")
    params = random_rows(model, [1, 2], seed=1)
    save_peft(params, saved)
    assert same_bits(load_peft(saved, model).deltas, params.deltas)
    assert sorted(files_of(saved)) == [
        "adapter_config.json",
        "adapter_model.safetensors",
        "tokenizer.json",
    ]
    lora = save_with_peft(peft_of(model, IDX, lora=True), tmp_path / "lora")
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    (foreign / "adapter_config.json").write_text("{}")
    for directory in (lora, foreign):
        before = files_of(directory)
        with pytest.raises(FileExistsError, match="not of token rows alone, and would be lost"):
            save_peft(params, directory)
        assert files_of(directory) == before
    with pytest.raises(FileExistsError, match="is a file. Name a directory"):
        save_peft(params, foreign / "adapter_config.json")


@pytest.mark.parametrize("there", [True, False], ids=["replaced", "new"])
@pytest.mark.parametrize("step", [1, 2], ids=["weights", "config"])
def test_no_half_adapter_is_left(step: int, there: bool, saved: Path, tmp_path, monkeypatch):
    directory = saved if there else tmp_path / "new"
    before, fsync, calls = files_of(saved), os.fsync, []

    def full(descriptor: int) -> None:
        calls.append(descriptor)
        if len(calls) == step:
            raise OSError(errno.ENOSPC, "No space left on device")
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        save_peft(random_rows(toy("llama_tied"), [1, 2]), directory)
    assert files_of(saved) == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter"]


def test_an_interruption_between_the_files_leaves_the_old_adapter(saved: Path, monkeypatch):
    before = files_of(saved)
    replaced, replace_file = [], Path.replace

    def killed(path: Path, target: Path) -> None:
        if replaced:
            raise KeyboardInterrupt
        replaced.append(replace_file(path, target))

    monkeypatch.setattr(Path, "replace", killed)
    params = random_rows(toy("llama_tied"), [1, 2, 3])
    with pytest.raises(KeyboardInterrupt):
        save_peft(params, saved)
    monkeypatch.undo()
    assert files_of(saved) == before
    save_peft(params, saved)
    assert same_bits(load_peft(saved, toy("llama_tied")).deltas, params.deltas)


@pytest.mark.parametrize("lora", [False, True], ids=["standalone", "lora"])
def test_an_adapter_of_one_half_of_a_tie_is_refused(lora: bool, tmp_path):
    model = toy("llama_tied")
    config = (
        peft.LoraConfig(
            r=1, target_modules="dummy-target-modules", trainable_token_indices={"lm_head": IDX}
        )
        if lora
        else peft.TrainableTokensConfig(token_indices=IDX, target_modules=["lm_head"])
    )
    with quiet(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        save_with_peft(peft.get_peft_model(toy("llama_tied"), config), tmp_path)
    refused(tmp_path, r"PEFT trained \['lm_head.weight'\] without .*one matrix", model)


def test_ties_that_the_config_denies_are_not_saved_for_peft(tmp_path):
    model = toy("llama_untied")
    model.lm_head.weight = model.model.embed_tokens.weight
    with pytest.raises(ValueError, match="tie_word_embeddings is False in the config of Llama"):
        save_peft(random_rows(model, IDX), tmp_path / "a", base_model=model)
    model = toy("llama_tied")
    model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach().clone())
    with pytest.raises(ValueError, match="tie_word_embeddings is True in the config of Llama"):
        save_peft(random_rows(model, IDX), tmp_path / "a", base_model=model)
    assert not (tmp_path / "a").exists()


def test_names_that_peft_takes_for_one_another_are_refused(tmp_path):
    model = nn.ModuleDict({"embed": nn.Embedding(V, D), "pos_embed": nn.Embedding(V, D)})
    params = init_deltas(model, {"embed": [7, 3], "pos_embed": [3, 7]})
    with pytest.raises(ValueError, match="would give 'pos_embed' the token indices of 'emb"):
        save_peft(params, tmp_path / "a")
    assert not (tmp_path / "a").exists()


@pytest.mark.parametrize("pattern", ["(([a-z_.0-9]+)+)+!", ".*" * 30 + "z", "(a|a|.)*" * 30 + "z"])
def test_a_pattern_that_backtracks_is_refused(pattern: str, saved: Path):
    change_config(saved, target_modules=pattern)
    refused(saved, "may take for ever: .*Name the modules", toy("llama_tied"))


def test_a_config_that_changes_meanwhile_is_refused(saved: Path, monkeypatch):
    from ttfunc.peft import adapter

    read_json, seen = adapter.read_json, []

    def meanwhile(path: Path):
        if seen:
            change_config(saved, token_indices=[1, 2])
        seen.append(path)
        return read_json(path)

    monkeypatch.setattr(adapter, "read_json", meanwhile)
    refused(saved, "was written to while it was read", toy("llama_tied"))


@pytest.mark.parametrize("requires_grad", [False, True])
def test_rows_that_are_ready_to_be_trained(requires_grad: bool, saved: Path):
    loaded = load_peft(saved, toy("llama_tied"), requires_grad=requires_grad)
    assert [delta.requires_grad for delta in loaded.deltas.values()] == [requires_grad]
    assert all(delta.is_leaf for delta in loaded.deltas.values())
    assert not any(rows.requires_grad for rows in loaded.originals.values())


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
