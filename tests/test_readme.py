"""The pages' code runs, as it stands and in its order; their map leads somewhere."""

from __future__ import annotations

import re
import textwrap
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.helpers.oracle import same_bits

ROOT = Path(__file__).parents[1]
PAGES = {
    name: (ROOT / name).read_text()
    for name in ("README.md", "bench/README.md", "examples/README.md")
}
README = PAGES["README.md"]


def run(name: str, count: int) -> dict[str, object]:
    """What the `count` code blocks of a page leave behind, run in one namespace."""
    blocks = re.findall(r"^( *)```python\n(.*?)^ *```", PAGES[name], re.M | re.S)
    assert len(blocks) == count
    namespace: dict[str, object] = {}
    for _, block in blocks:
        exec(compile(textwrap.dedent(block), name, "exec"), namespace)  # noqa: S102
    return namespace


def test_the_bench_page_has_no_code():
    run("bench/README.md", 0)


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")  # of PEFT's
def test_the_examples_page_s_code_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    namespace = run("examples/README.md", 13)
    assert "2 of 1,000 rows × 64, float32, tied with lm_head.weight" in capsys.readouterr().out
    assert same_bits(namespace["restored"], namespace["model"].state_dict())
    both, merged = (
        load_file(namespace["plain"] + "/both/model.safetensors"),
        namespace["merged_model"],
    )
    assert same_bits(both, {name: merged.state_dict()[name] for name in both})
    assert not same_bits(namespace["restored"], namespace["merged"])
    assert len(namespace["grown"]["lm_head.weight"]) == namespace["vocabulary"] + 2
    assert namespace["out"].logits.shape[-1] == namespace["vocabulary"] + 2
    folder = namespace["folder"]
    weights = [folder / name / "model.safetensors" for name in ("model", "merged", "restored")]
    before, merged, restored = (path.read_bytes() for path in weights)
    assert restored == before != merged
    torch.testing.assert_close(namespace["of_program"], namespace["of_call"])


def test_the_map_has_each_module_and_what_it_names_is_there():
    package = ROOT / "ttfunc"
    page = (package / "README.md").read_text()
    tree = re.search(r"^ttfunc/\n(.*?)^tests/", page, re.M | re.S)[1]
    rooms = re.findall(r"^  (\w+)/ .*\n((?:    .*\n)+)", tree, re.M)
    shown = {f"{room}/{name}.py" for room, names in rooms for name in re.findall(r"\w+", names)}
    shown |= set(re.findall(r"^  (\w+\.py)", tree, re.M))
    modules = {str(path.relative_to(package)) for path in package.rglob("*.py")}
    assert shown == {name for name in modules if not name.endswith("__init__.py")}
    named = re.findall(r"`([\w/]+\.py)`: `(\w+)`", page)
    assert len(named) >= 12
    for file, name in named:
        assert re.search(
            rf"^\s*(def|class) {name}\b|^{name}\b", (package / file).read_text(), re.M
        ), name


def test_each_script_is_on_its_page():
    for folder, shared in (
        ("bench", {"contestants", "report", "timing"}),
        ("examples", {"sentences"}),
    ):
        scripts = {path.stem for path in (ROOT / folder).glob("[!_]*.py")} - shared
        named = re.findall(rf"^\| `{folder}\.(\w+)` \|", PAGES[f"{folder}/README.md"], re.M)
        assert set(named) == scripts


def test_the_front_page_s_figures_are_those_of_the_bench_page():
    rows = re.findall(r"^\| (?:time|peak memory.*?) \|(.*)", README, re.M)
    shown = [one for row in rows for one in re.findall(r"[\d,]+(?:\.\d+)?", row)]
    assert len(shown) == 7
    lines = re.findall(r"^\| Qwen2.5-0.5B, 151,936×896 \|(.*)", PAGES["bench/README.md"], re.M)
    known = [one for line in lines for one in re.findall(r"[\d,]+(?:\.\d+)?", line)]
    assert set(shown) <= set(known)
