"""The map of the code leads somewhere; scripts and figures are on their pages."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
PAGES = {
    name: (ROOT / name).read_text()
    for name in ("README.md", "bench/README.md", "examples/README.md")
}
README = PAGES["README.md"]


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
    assert len(shown) == 8
    lines = re.findall(r"^\| Qwen2.5-0.5B, 151,936×896 \|(.*)", PAGES["bench/README.md"], re.M)
    (sixteen,) = re.findall(
        r"with 16 rows of Qwen2.5-0.5B's.*?\n\n", PAGES["bench/README.md"], re.S
    )
    known = [one for line in (*lines, sixteen) for one in re.findall(r"\d[\d,]*\b(?:\.\d+)?", line)]
    assert set(shown) <= set(known)
