"""New tokens in a checkpoint on disk: longer tensors, and back to the original bytes.

The reference is a model that transformers resized, with the same rows assigned.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from tests.helpers.llama import llama
from tests.helpers.models import D, V
from tests.helpers.oracle import same_bits
from tests.helpers.rows import random_rows
from ttfunc import (
    combine,
    functional_call,
    init_deltas,
    merge,
    merge_checkpoint,
    patch,
    unmerge_checkpoint,
)

NEW = [V + 1, 7, V]
X = torch.tensor([[3, V, 7, V + 1, 5]])


def phi() -> Any:
    """A toy with an untied head and a bias of its logits."""
    torch.manual_seed(3)
    config = transformers.PhiConfig(
        vocab_size=V, hidden_size=D, intermediate_size=16, num_hidden_layers=1,
        num_attention_heads=2, bos_token_id=1, eos_token_id=2, pad_token_id=0,
    )  # fmt: skip
    model = transformers.PhiForCausalLM(config).eval().requires_grad_(False)
    for parameter in model.parameters():
        parameter.normal_(std=0.3)
    return model


MODELS = {
    "tied": llama,
    "untied": lambda: llama(tie=False),
    "bfloat16": lambda: llama(dtype="bfloat16"),
    "biased": phi,
}


def bytes_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("size", ["1GB", "2KB"])
@pytest.mark.parametrize("kind", MODELS)
def test_a_merged_folder_is_that_of_a_resized_model_and_goes_back(kind: str, size: str, tmp_path):
    model = MODELS[kind]()
    model.save_pretrained(tmp_path / "model", max_shard_size=size)
    params = random_rows(model, NEW, grow=True)
    done: list[tuple[int, int]] = []
    merge_checkpoint(
        tmp_path / "model", params, tmp_path / "merged", progress=lambda *seen: done.append(seen)
    )
    assert done[-1][0] == done[-1][1]
    merged = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    assert merged.config.vocab_size == V + 2
    assert same_bits(merged.state_dict(), merge(model.state_dict(), params))
    ours = functional_call(model, patch(params), X, {"labels": X})
    theirs = merged(X, labels=X)
    torch.testing.assert_close(ours.logits, theirs.logits)
    torch.testing.assert_close(ours.loss, theirs.loss)

    # transformers writes the same sizes for that model.
    merged.save_pretrained(tmp_path / "saved", max_shard_size="1GB")
    assert json.loads((tmp_path / "saved/config.json").read_text())["vocab_size"] == V + 2
    if size == "2KB":
        text = (tmp_path / "merged/model.safetensors.index.json").read_text()
        shards = [load_file(path) for path in (tmp_path / "merged").glob("*.safetensors")]
        total = sum(t.numel() * t.element_size() for shard in shards for t in shard.values())
        assert json.loads(text)["metadata"]["total_size"] == total

    unmerge_checkpoint(tmp_path / "merged", params, tmp_path / "back")
    assert bytes_of(tmp_path / "back") == bytes_of(tmp_path / "model")


def test_one_merge_after_another(tmp_path):
    model = phi()
    model.save_pretrained(tmp_path / "model")
    first = random_rows(model, NEW, grow=True)
    then = random_rows(model, [V + 2, 5, V + 3], 1, grow=first)
    merge_checkpoint(tmp_path / "model", first, tmp_path / "first")
    merge_checkpoint(tmp_path / "first", then, tmp_path / "then")
    merge_checkpoint(tmp_path / "model", combine(first, then), tmp_path / "both")
    assert bytes_of(tmp_path / "then") == bytes_of(tmp_path / "both")
    unmerge_checkpoint(tmp_path / "then", then, tmp_path / "back")
    assert bytes_of(tmp_path / "back") == bytes_of(tmp_path / "first")
    with pytest.raises(ValueError, match=r"shape \(23, 8\) in the checkpoint, .* for \(25, 8\)"):
        merge_checkpoint(tmp_path / "model", then, tmp_path / "wrong")
    with pytest.raises(ValueError, match=r"shape \(27, 8\) in the checkpoint, .* for \(25, 8\)"):
        unmerge_checkpoint(tmp_path / "both", first, tmp_path / "wrong")


def test_nested_configs_follow(tmp_path):
    llama().save_pretrained(tmp_path / "model")
    config = tmp_path / "model/config.json"
    text = '{"text_config": {"vocab_size":23}, "vision": {"size": 23}, "vocab_size" : 230}'
    config.write_text(text)
    params = random_rows(llama(), NEW, grow=True)
    merge_checkpoint(tmp_path / "model", params, tmp_path / "merged")
    assert (tmp_path / "merged/config.json").read_text() == text.replace(
        '"vocab_size":23}', '"vocab_size":25}'
    )
    unmerge_checkpoint(tmp_path / "merged", params, tmp_path / "back")
    assert (tmp_path / "back/config.json").read_text() == text


def test_a_single_file(tmp_path):
    model = llama(tie=False)
    state = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    save_file(state, tmp_path / "model.safetensors", {"format": "pt", "ü": "ß"})
    params = random_rows(model, NEW, grow=True)
    merge_checkpoint(tmp_path / "model.safetensors", params, tmp_path / "merged.safetensors")
    assert same_bits(load_file(tmp_path / "merged.safetensors"), merge(state, params))
    unmerge_checkpoint(tmp_path / "merged.safetensors", params, tmp_path / "back.safetensors")
    whole = (tmp_path / "model.safetensors").read_bytes()
    assert (tmp_path / "back.safetensors").read_bytes() == whole


def test_a_header_in_other_bytes_is_refused(tmp_path):
    llama().save_pretrained(tmp_path / "model")
    path = tmp_path / "model/model.safetensors"
    whole = path.read_bytes()
    length = int.from_bytes(whole[:8], "little")
    header = whole[8 : 8 + length].rstrip() + b" " * 16
    path.write_bytes(len(header).to_bytes(8, "little") + header + whole[8 + length :])
    params = random_rows(llama(), NEW, grow=True)
    with pytest.raises(ValueError, match="header that the safetensors library would write in"):
        merge_checkpoint(tmp_path / "model", params, tmp_path / "merged")
    assert not (tmp_path / "merged").exists()
    plain = random_rows(llama(), [7])
    merge_checkpoint(tmp_path / "model", plain, tmp_path / "merged")  # which moves nothing


def test_a_checkpoint_of_another_height(tmp_path):
    model = llama()
    model.resize_token_embeddings(V + 2, mean_resizing=False)
    model.save_pretrained(tmp_path / "taller")
    params = random_rows(llama(), NEW, grow=True)
    with pytest.warns(UserWarning, match="are not the originals"):
        merge_checkpoint(tmp_path / "taller", params, tmp_path / "merged")
    merged = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert torch.equal(merged.lm_head.weight[NEW], params.deltas["model.embed_tokens.weight"])
    assert len(merged.lm_head.weight) == V + 2

    llama(vocabulary=V - 3).save_pretrained(tmp_path / "shorter")
    with pytest.raises(ValueError, match=r"has shape \(20, 8\).* made for \(23, 8\)"):
        merge_checkpoint(tmp_path / "shorter", params, tmp_path / "other")
    llama().save_pretrained(tmp_path / "model")
    with pytest.raises(ValueError, match=r"has shape \(23, 8\).* made for \(25, 8\)"):
        unmerge_checkpoint(tmp_path / "model", params, tmp_path / "other")
    taller = init_deltas(model, [V + 1])
    with pytest.raises(ValueError, match=r"has shape \(23, 8\).* made for \(25, 8\)"):
        merge_checkpoint(tmp_path / "model", taller, tmp_path / "other")


def test_what_has_the_new_length_by_chance_is_left_and_given_back(tmp_path):
    model = llama(tie=False)
    params = random_rows(model, NEW, grow=True)
    state = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    state["lm_head.other_bias"] = torch.randn(V + 2)
    (tmp_path / "model").mkdir()
    save_file(state, tmp_path / "model/model.safetensors", {"format": "pt"})
    config = {"model_type": "llama", "vocab_size": V, "audio_config": {"vocab_size": V + 2}}
    (tmp_path / "model/config.json").write_text(json.dumps(config))
    merge_checkpoint(tmp_path / "model", params, tmp_path / "merged")
    merged = json.loads((tmp_path / "merged/config.json").read_text())
    assert merged == config | {"vocab_size": V + 2}
    unmerge_checkpoint(tmp_path / "merged", params, tmp_path / "back")
    assert bytes_of(tmp_path / "back") == bytes_of(tmp_path / "model")


def test_a_config_of_another_size_is_refused_before_anything_is_written(tmp_path):
    model = llama()
    model.save_pretrained(tmp_path / "model")
    path = tmp_path / "model/config.json"
    path.write_text(path.read_text().replace(f'"vocab_size": {V}', '"vocab_size": 30'))
    with pytest.raises(ValueError, match="config.json has 30 for 'vocab_size', and the model"):
        merge_checkpoint(tmp_path / "model", random_rows(model, NEW, grow=True), tmp_path / "m")
    assert not (tmp_path / "m").exists()
