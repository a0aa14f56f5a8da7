"""The pages: the code on them, what they say that it prints, and where their links lead."""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[2]
JOBS = sorted(path for path in (ROOT / "examples").glob("*.md") if path.name != "README.md")
PAGES = [ROOT / "README.md", *sorted(ROOT.glob("*/*.md"))]
_BLOCK = re.compile(
    r"^(?P<indent> *)```python\n(?P<code>.*?)^ *```\n(?:\s*^ *```text\n(?P<prints>.*?)^ *```\n)?",
    re.M | re.S,
)
_NUMBER = r"\d[\d,]*(?:\.\d+)?(?:e[+-]?\d+)?"


class Block(NamedTuple):
    """A block of Python, and the block of text after it, if there is one: what it prints."""

    code: str
    prints: str | None


def blocks(page: Path) -> list[Block]:
    """The code of a page, in its order."""
    found = _BLOCK.finditer(page.read_text())
    return [Block(textwrap.dedent(one["code"]), one["prints"]) for one in found]


def run(page: Path) -> Iterator[str]:
    """Run the code of a page in one namespace, as a reader would; what each block prints."""
    # Told its accelerator, DeepSpeed, which transformers imports where it is, prints nothing of it.
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    namespace: dict[str, object] = {"__name__": "__main__"}
    for code, _ in blocks(page):
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            exec(compile(code, str(page), "exec"), namespace)  # noqa: S102
        yield printed.getvalue()


def agrees(printed: str, shown: str, *, numbers: bool) -> bool:
    """Whether a page shows what was printed, but for `…`; without `numbers`, these may differ."""
    printed, shown = " ".join(printed.split()), " ".join(shown.split())
    pattern = re.escape(shown).replace("…", ".*")
    if not numbers:
        printed = re.sub(_NUMBER, "0", printed)
        pattern = re.escape(re.sub(_NUMBER, "0", shown)).replace("…", ".*")
    return re.fullmatch(pattern, printed, re.S) is not None


def anchors(text: str) -> set[str]:
    """The anchors that GitHub gives to the headings of a page."""
    headings = re.findall(r"^#+ (.*)", re.sub(r"^```.*?^```", "", text, flags=re.M | re.S), re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


if __name__ == "__main__":  # in a process of its own: what each block of the page printed, as JSON
    everything = list(run(Path(sys.argv[1])))
    Path(sys.argv[2]).write_text(json.dumps(everything))
