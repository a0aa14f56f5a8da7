"""The pages' code runs, as it stands and in its order."""

from __future__ import annotations

import re
import textwrap
from pathlib import Path

from safetensors.torch import load_file

from tests.oracle import same_bits

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


def test_the_front_page_s_code_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = run("README.md", 2)
    (trained,) = names["params"].deltas.values()
    assert load_file("rows.safetensors")["deltas/model.embed_tokens.weight"].equal(trained)
    weight = names["model"].get_input_embeddings().weight
    assert weight[[998, 999]].equal(trained)
    assert names["model"].lm_head.weight is weight


def test_the_bench_page_has_no_code():
    run("bench/README.md", 0)


def test_the_examples_page_s_code_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    namespace = run("examples/README.md", 7)
    assert "2 of 1,000 rows × 64, float32, tied with lm_head.weight" in capsys.readouterr().out
    assert same_bits(namespace["restored"], namespace["model"].state_dict())
    assert not same_bits(namespace["restored"], namespace["merged"])
    folder = namespace["folder"]
    weights = [folder / name / "model.safetensors" for name in ("model", "merged", "restored")]
    before, merged, restored = (path.read_bytes() for path in weights)
    assert restored == before != merged
    assert namespace["members"].shape == (2, *namespace["mixed"].shape)


def test_the_three_lines_stand_at_the_top():
    top = "\n".join(README.splitlines()[:10])
    assert all(f"{call}(" in top for call in ("init_deltas", "functional_call", "patch", "merge"))
