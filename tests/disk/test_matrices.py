"""Checkpoints that name a token matrix in another way than the model does."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from safetensors.torch import save_file

from tests.helpers.architectures import build
from tests.helpers.checkpoints import (
    HEAD,
    NAME,
    contents,
    names_in,
    raw_of,
    saved,
    tensors_of,
    written,
)
from tests.helpers.llama import llama
from tests.helpers.oracle import same_bits
from tests.helpers.rows import random_rows
from ttfunc import TokenDeltas, load, merge, patch, save
from ttfunc.__main__ import main
from ttfunc.disk import matrices
from ttfunc.disk.checkpoint import merge_checkpoint, unmerge_checkpoint
from ttfunc.model.origin import Origin

OTHER = {NAME: "text.wte", HEAD: "text.output"}

# Some that transformers itself saves under other names than those in the model.
RENAMED = {
    "Gemma3ForConditionalGeneration": {
        "model.language_model.embed_tokens.weight": "language_model.model.embed_tokens.weight"
    },
    "NemotronHForCausalLM": {"model.embeddings.weight": "backbone.embeddings.weight"},
    "VoxtralForConditionalGeneration": {
        "model.language_model.embed_tokens.weight": "language_model.model.embed_tokens.weight"
    },
}


@pytest.fixture(params=["both halves", "one"])
def given(request, tmp_path):
    """A tied model's rows, its checkpoint under other names, and the names."""
    model = llama()
    state = {OTHER.get(n, n): t.clone() for n, t in model.state_dict().items()}
    names = dict(OTHER)
    if request.param == "one":
        del state[names.pop(HEAD)]
    return random_rows(model), written(tmp_path / "a", state), names


def test_rows_go_to_the_names_that_are_given(given, tmp_path):
    params, source, names = given
    before = contents(source)
    merge_checkpoint(source, params, tmp_path / "b", names=names)
    raw = before["model.safetensors"]
    old = raw_of(llama().state_dict()[NAME])
    new = raw_of(merge(llama().state_dict(), params)[NAME])
    assert raw.count(old) == len(names)
    assert contents(tmp_path / "b") == {**before, "model.safetensors": raw.replace(old, new)}
    unmerge_checkpoint(tmp_path / "b", params, tmp_path / "c", names=names)
    assert contents(tmp_path / "c") == contents(source) == before


def test_the_parameters_are_not_renamed(given, tmp_path):
    params, source, names = given
    tied = params.tied
    merge_checkpoint(source, params, tmp_path / "b", names=names)
    assert params.tied == tied
    assert isinstance(patch(params), dict)


@pytest.mark.parametrize("name", RENAMED)
def test_what_transformers_renames(name: str, tmp_path):
    model, _ = build(name)
    params, names = random_rows(model), RENAMED[name]
    model.save_pretrained(tmp_path / "a")
    merge_checkpoint(tmp_path / "a", params, tmp_path / "b")
    loaded, info = type(model).from_pretrained(tmp_path / "b", output_loading_info=True)
    assert not info["missing_keys"]
    plain = type(model).from_pretrained(tmp_path / "a")
    assert same_bits(loaded.state_dict(), merge(plain.state_dict(), params))
    unmerge_checkpoint(tmp_path / "b", params, tmp_path / "c", names=names)
    assert contents(tmp_path / "c") == contents(tmp_path / "a")
    # Rows that do not know where they come from, as of an earlier version.
    specs = {key: replace(spec, origin=Origin()) for key, spec in params.specs.items()}
    with pytest.raises(
        KeyError, match=f"none of the names.*Nearest: '{next(iter(names.values()))}'"
    ):
        merge_checkpoint(tmp_path / "a", TokenDeltas(params.deltas, specs), tmp_path / "d")


def test_from_the_command_line(given, tmp_path, capsys):
    params, source, names = given
    save(params, tmp_path / "rows")
    paths = [str(source), str(tmp_path / "rows"), str(tmp_path / "b")]
    options = [f"--name={name}={other}" for name, other in names.items()]
    assert main(["merge", *paths]) == 1
    assert "--name" in capsys.readouterr().err
    assert main(["merge", *paths, *options]) == 0
    merge_checkpoint(source, params, tmp_path / "c", names=names)
    assert contents(tmp_path / "b") == contents(tmp_path / "c")
    with pytest.raises(SystemExit, match="2"):
        main(["merge", *paths, "--name", "text.wte"])
    assert "'text.wte' is not MODEL=CHECKPOINT" in capsys.readouterr().err


WRONG = {
    "no mapping": ([(NAME, "text.wte")], TypeError, "must map strings to strings, got \\["),
    "no string": ({NAME: None}, TypeError, "must map strings to strings, got {"),
    "not of the parameters": ({"wte": "text.wte"}, KeyError, "parameters are for .*embed_tokens"),
    "not of the checkpoint": ({NAME: "wte"}, KeyError, r"none of the names .*wte.*Nearest: 'text"),
    "one for two": (dict.fromkeys(OTHER, "text.wte"), ValueError, "more than once"),
    "another shape": ({NAME: "model.norm.weight"}, ValueError, r"has shape \(8,\) in the check"),
}


@pytest.mark.parametrize("case", WRONG)
def test_names_that_lead_astray(case, given, tmp_path):
    params, source, _ = given
    names, error, match = WRONG[case]
    for write in (merge_checkpoint, unmerge_checkpoint):
        with pytest.raises(error, match=match):
            write(source, params, tmp_path / "b", names=names)
    assert names_in(tmp_path) == ["a"]


def test_a_matrix_that_would_stay_as_it_is(tmp_path):
    model = llama()
    state = {n: t.clone() for n, t in model.state_dict().items()}
    source = written(tmp_path / "a", {**state, "ema.wte": state[NAME].clone()})
    with pytest.raises(ValueError, match=f"has '{NAME}' too, which would be left"):
        merge_checkpoint(source, random_rows(model), tmp_path / "b", names={NAME: "ema.wte"})
    merge_checkpoint(source, random_rows(model), tmp_path / "b", names={NAME: NAME})
    assert names_in(tmp_path) == ["a", "b"]


def test_the_wrong_one_of_two_warns(tmp_path):
    model = llama()
    state = {f"text.{n}": t.clone() for n, t in model.state_dict().items()}
    state["text.other"] = torch.randn_like(state[f"text.{NAME}"])
    source = written(tmp_path / "a", state)
    with pytest.warns(UserWarning, match="'text.other'.* are not the originals"):
        merge_checkpoint(source, random_rows(model), tmp_path / "b", names={NAME: "text.other"})


# --- One end of a tie

ENDS = {"head": HEAD, "input": NAME}


@pytest.fixture(params=ENDS)
def one_end(request, tmp_path):
    """Rows of one end of an untied model, as a file has them, and the name of this end."""
    save(random_rows(llama(tie=False), [7], targets=ENDS[request.param][: -len(".weight")]),
         tmp_path / "rows")  # fmt: skip
    return tmp_path / "rows", ENDS[request.param]


def without_config(folder, change):
    """The folder with another config: `change` of what it says of ties."""
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(change(config)))
    return folder


TIED_BY = {
    "the whole": lambda config: config | {"tie_word_embeddings": True},
    "a part": lambda config: {"text_config": {"tie_word_embeddings": True}},
}


@pytest.mark.parametrize("write", [merge_checkpoint, unmerge_checkpoint])
@pytest.mark.parametrize("tied_by", TIED_BY)
def test_a_tied_checkpoint_takes_no_rows_of_one_end(write, tied_by, one_end, tmp_path):
    rows, name = one_end
    source = without_config(saved(llama(), tmp_path / "a"), TIED_BY[tied_by])
    match = "was another matrix|another matrix.*A checkpoint that stores the two as one tensor"
    with pytest.raises((KeyError, ValueError), match=match) as error:
        write(source, rows, tmp_path / "b")
    assert "names" not in error.value.args[0].partition(" It has ")[2]  # which would be wrong too
    if name == HEAD:
        with pytest.raises(ValueError, match=r"cannot be written to \['model.embed_tokens"):
            write(source, rows, tmp_path / "b", names={HEAD: NAME})
    assert names_in(tmp_path) == ["a", "rows"]


def test_an_untied_checkpoint_takes_them(one_end, tmp_path):
    rows, name = one_end
    model = llama(tie=False)
    merge_checkpoint(saved(model, tmp_path / "a"), rows, tmp_path / "b")
    loaded = type(model).from_pretrained(tmp_path / "b")
    assert same_bits(loaded.state_dict(), merge(model.state_dict(), load(rows, model)))
    assert not torch.equal(loaded.state_dict()[name], model.state_dict()[name])


def test_a_checkpoint_without_the_head_takes_rows_of_the_input(tmp_path):
    """Its config says that there is no tie; one that does not say is warned of."""
    params = random_rows(llama(tie=False), [7])
    model = llama(tie=False).model
    model.save_pretrained(tmp_path / "a")
    names = {NAME: "embed_tokens.weight"}
    merge_checkpoint(tmp_path / "a", params, tmp_path / "b", names=names)
    without_config(tmp_path / "a", lambda c: {k: v for k, v in c.items() if k[:4] != "tie_"})
    with pytest.warns(UserWarning, match="does not say whether it ties") as caught:
        merge_checkpoint(tmp_path / "a", params, tmp_path / "c", names=names)
    assert caught[0].filename == __file__
    assert (
        contents(tmp_path / "b")["model.safetensors"]
        == contents(tmp_path / "c")["model.safetensors"]
    )
    unmerge_checkpoint(tmp_path / "c", params, tmp_path / "d", names=names)
    assert contents(tmp_path / "d") == contents(tmp_path / "a")


def test_what_was_apart_may_have_any_name_in_the_checkpoint(tmp_path):
    """Another tensor of the shape may be it: transformers renames some heads too."""
    params, model = random_rows(llama(tie=False), [7]), llama(tie=False)
    model.save_pretrained(tmp_path / "a")
    state = {n.replace("lm_head", "text.out"): t for n, t in model.state_dict().items()}
    save_file(state, tmp_path / "a" / "model.safetensors", {"format": "pt"})
    without_config(tmp_path / "a", TIED_BY["the whole"])
    merge_checkpoint(tmp_path / "a", params, tmp_path / "b")
    assert same_bits(tensors_of(tmp_path / "b"), merge(state, params))


def test_no_number_of_names_makes_an_error_slow(tmp_path, monkeypatch):
    """Those that are compared with the one that is missing are few, and short."""
    compared = []

    def compare(word: str, others: list[str], **_: object) -> list[str]:
        compared.extend(others)
        return others[:1]

    monkeypatch.setattr(matrices.difflib, "get_close_matches", compare)
    tensors = {f"{i}.weight": torch.zeros(1) for i in range(3000)} | {"x" * 1000: torch.zeros(1)}
    source = written(tmp_path / "a", tensors)
    with pytest.raises(KeyError, match=r"none of the names .*Nearest: '\d+.weight' \(1,\)"):
        merge_checkpoint(source, random_rows(llama()), tmp_path / "b")
    assert len(compared) == 1000
    assert max(map(len, compared)) < 300
