"""What trainers saved of a TokenModule, as rows on the model."""

from __future__ import annotations

from pathlib import Path

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import Trainer

import tests.helpers.models as models
from tests.helpers.lessons import IDS, NAME, ROWS, TOKENS, arguments, bridge, lessons, student
from tests.helpers.llama import llama
from tests.helpers.oracle import edited, same_bits, snapshot
from tests.helpers.rows import random_rows
from ttfunc import functional_call, init_deltas, load, load_peft, merge, patch, save, unmerge
from ttfunc.disk.rows_file import read
from ttfunc.module.token_module import TokenModule


def saved(module: TokenModule, folder: Path) -> Path:
    """The file of a checkpoint, as Trainer writes it."""
    path = folder / "model.safetensors"
    save_file(module.state_dict(), path, metadata={"format": "pt"})
    return path


def test_what_a_trainer_saved_is_loaded_from_the_folder_and_from_the_file(tmp_path):
    module = bridge()
    options = {"max_steps": 2, "save_strategy": "steps", "save_steps": 2}
    Trainer(module, arguments(tmp_path, **options), train_dataset=lessons()).train()
    folder, model = tmp_path / "checkpoint-2", student()
    before = snapshot(model)
    for path in (folder, folder / "model.safetensors"):
        params = load(path, model, requires_grad=True)
        assert same_bits(params.deltas, module.params().deltas)
        assert params.specs == module.params().specs
        assert params.deltas[NAME].is_leaf
        assert params.deltas[NAME].requires_grad
    assert snapshot(model) == before
    merged = merge(model.state_dict(), params)
    assert same_bits(merged, merge(module.base.state_dict(), module.params()))
    assert same_bits(unmerge(merged, params), model.state_dict())


@pytest.mark.parametrize("case", models.CORPUS)
def test_of_every_model(case: str, tmp_path):
    model, x = models.make(case).requires_grad_(False), models.tokens(2, 7)
    params = random_rows(model, [7, 2])
    path = saved(TokenModule(model, params), tmp_path)
    loaded = load(path, model)
    assert loaded.specs == params.specs
    assert same_bits(loaded.deltas, params.deltas)
    expected = edited(model, params)(x)
    torch.testing.assert_close(functional_call(model, patch(loaded), x), expected)


@pytest.mark.parametrize("tie", [True, False], ids=["tied", "untied"])
def test_new_tokens_among_others(tie: bool, tmp_path):
    model = llama(tie=tie).requires_grad_(False)
    params = random_rows(model, [models.V + 1, 3, models.V], grow=True)
    path = saved(TokenModule(model, params), tmp_path)
    loaded = load(path, model)
    assert loaded.specs == params.specs
    assert same_bits(loaded.deltas, params.deltas)
    save(loaded, tmp_path / "rows")
    assert same_bits(read(tmp_path / "rows").deltas, params.deltas)


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")  # PEFT asks for it
def test_what_was_trained_beside_the_rows_is_named(tmp_path):
    config = peft.LoraConfig(target_modules=["q_proj"], r=2, init_lora_weights=False)
    lora = peft.get_peft_model(student(), config)
    module = TokenModule(lora, random_rows(lora, TOKENS), train_base=True)
    path = saved(module, tmp_path)
    for model in (lora, student()):
        with pytest.warns(UserWarning, match=r"4 other tensors are not, such as .*lora_A.*To load"):
            loaded = load(path, model)
        assert [*map(torch.equal, loaded.deltas.values(), module.params().deltas.values())] == [
            True
        ]
    again = TokenModule(lora, loaded := load_quietly(path, lora), train_base=True)
    again.load_state_dict(load_file(path))  # as the warning says
    assert same_bits(again.params().deltas, loaded.deltas)


def load_quietly(path, model):
    with pytest.warns(UserWarning, match="only the token rows"):
        return load(path, model)


def test_names_lead_to_another_model(tmp_path):
    module = bridge()
    path = saved(module, tmp_path)
    wrapped = torch.nn.Sequential(student())
    loaded = load(path, wrapped, names={NAME: f"0.{NAME}"})
    assert same_bits(loaded.deltas, {f"0.{NAME}": module.params().deltas[NAME]})
    with pytest.raises(KeyError, match=r"no parameter 'model.embed_tokens.weight'.*without a wrap"):
        load(path, wrapped)
    with pytest.raises(ValueError, match=r"names has \['other'\], and the rows are for"):
        load(path, wrapped, names={"other": NAME})


def ids(*tokens: int) -> torch.Tensor:
    return torch.tensor(tokens)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({IDS: None}, r"does not fit LlamaForCausalLM: .*lacks \['token_indices/"),
        ({IDS: ids(1, 2)}, r"have shape \(3, 16\), and \(2, 16\) is needed"),
        ({IDS: ids(1, 2, 2)}, "does not fit .*more than once"),
        ({IDS: ids(1, 52, 54)}, "does not fit .*leave out 53"),
        ({IDS: ids(1, 2, 3).float()}, r"are torch.float32 of shape \(3,\)"),
        ({ROWS: torch.ones(3, 8)}, r"have shape \(3, 8\), and \(3, 16\) is needed"),
        ({ROWS: torch.ones(3, 16, dtype=torch.int64)}, "float dtype of safetensors is needed"),
        ({ROWS: None}, "has no metadata of ttfunc. For a PEFT adapter use load_peft"),
    ],
)
def test_what_does_not_fit_is_refused(change, match: str, tmp_path):
    state = {**bridge().state_dict(), **change}
    path = tmp_path / "model.safetensors"
    save_file({name: one for name, one in state.items() if one is not None}, path)
    with pytest.raises(ValueError, match=match):
        load(tmp_path, student())


def test_where_it_cannot_be_read(tmp_path):
    path = saved(bridge(), tmp_path)
    with pytest.raises(
        FileNotFoundError, match=r"no adapter_config.json .*ttfunc.load\(directory, "
    ):
        load_peft(tmp_path, student())
    with pytest.raises(
        ValueError, match=r"a trainer saved it, .* give what load\(path, model\) returns"
    ):
        read(path)
    with torch.device("meta"):
        skeleton = student()
    with pytest.raises(ValueError, match="on meta there are no rows as they were"):
        load(path, skeleton)
    untied = llama(vocabulary=50, width=16, tie=False).requires_grad_(False)
    params = init_deltas(untied, {"embed_tokens": [3], "lm_head": [3]})
    with pytest.raises(ValueError, match=r"which are one matrix in this LlamaForCausalLM"):
        load(saved(TokenModule(untied, params), tmp_path), student())
