"""The README's code runs, as it stands and in its order."""

from __future__ import annotations

import re
import textwrap
from pathlib import Path

from tests.oracle import same_bits

README = Path(__file__).parents[1].joinpath("README.md").read_text()


def test_the_code_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"^( *)```python\n(.*?)^ *```", README, re.M | re.S)
    assert len(blocks) == 8
    namespace: dict[str, object] = {}
    for _, block in blocks:
        exec(compile(textwrap.dedent(block), "README.md", "exec"), namespace)  # noqa: S102
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
