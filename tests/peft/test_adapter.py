"""What a folder of PEFT's must hold to be read, and what is said of one that lies."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.helpers.oracle import same_bits
from tests.helpers.peft_folders import (
    APART,
    change_config,
    check_peft_reads,
    refused,
    save_with_peft,
)
from tests.helpers.peft_reference import IDX, V, inputs_of, logits, peft_of, toy
from tests.helpers.rows import random_rows
from ttfunc.peft.load_peft import load_peft
from ttfunc.peft.save_peft import save_peft


def test_the_least_config(tmp_path):
    model = toy("llama_tied")
    params = random_rows(model, IDX)
    save_peft(params, tmp_path)
    least = {"peft_type": "TRAINABLE_TOKENS", "token_indices": IDX}
    (tmp_path / "adapter_config.json").write_text(json.dumps(least))
    check_peft_reads(tmp_path, model, params)
    assert same_bits(load_peft(tmp_path, model).deltas, params.deltas)


def change_keys(directory: Path, change) -> None:
    path = directory / "adapter_model.safetensors"
    save_file(dict(change(*item) for item in load_file(path).items()), path, {"format": "pt"})


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
        (lambda key, rows: (f"base_model.model.{key}", rows), ValueError, "one .*: PEFT would"),
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
    refused(
        saved, "does not begin with one 'base_model.model.': PEFT would load such an adapter as if"
    )


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
