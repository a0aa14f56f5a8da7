"""The page of each job runs and prints what it shows; links of all pages lead somewhere."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers.hub import folder_in
from tests.helpers.llama import llama
from tests.helpers.pages import JOBS, PAGES, ROOT, agrees, anchors, blocks
from tests.helpers.tokenizers import tokenizer


def names(pages: list[Path]) -> list[str]:
    return [str(page.relative_to(ROOT)) for page in pages]


@pytest.fixture(scope="session")
def hub(tmp_path_factory) -> Path:
    """A cache in which a toy stands for SmolLM2."""
    cache = tmp_path_factory.mktemp("hub")
    known = tokenizer("byte-level BPE")
    known.save_pretrained(folder_in(cache))
    options = {"attn_implementation": "eager", "max_position_embeddings": 512}
    llama(vocabulary=len(known), width=32, **options).save_pretrained(folder_in(cache))
    return cache


def printed_by(page: Path, hub: Path, folder: Path) -> list[str]:
    """What each block of a page prints, in a process of its own."""
    found = folder / "printed.json"
    environment = {**os.environ, "HF_HUB_CACHE": str(hub), "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "tests.helpers.pages", str(page), str(found)]
    done = subprocess.run(  # noqa: S603
        command, cwd=folder, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(found.read_text())


def test_the_front_page_does_its_job(hub: Path, tmp_path: Path):
    """What it prints is what SmolLM2 says: `tests.helpers.real_pages` compares that."""
    (printed,) = printed_by(ROOT / "README.md", hub, tmp_path)
    assert re.fullmatch(r"before: .*\nafter: .*\n2 rows more than the model has\n", printed)
    assert (tmp_path / "calc.safetensors").stat().st_size < 20_000


@pytest.mark.parametrize("name", names([page for page in JOBS if blocks(page)]))
def test_the_code_of_a_page_runs_and_prints_what_it_shows(name: str, hub: Path, tmp_path: Path):
    page = ROOT / name
    for block, printed in zip(blocks(page), printed_by(page, hub, tmp_path), strict=True):
        if block.prints is not None:
            # The toy has other numbers than SmolLM2.
            assert agrees(printed, block.prints, numbers=False), (block.prints, printed)


@pytest.mark.parametrize("name", names(JOBS))
def test_a_page_of_a_job_is_short_and_prints_a_result(name: str):
    page = ROOT / name
    assert len(page.read_text().splitlines()) <= 120
    assert not blocks(page) or any(block.prints for block in blocks(page))


def test_the_front_page_is_short_and_has_the_three_calls():
    lines = (ROOT / "README.md").read_text().splitlines()
    assert len(lines) <= 120
    (job,) = (block.code for block in blocks(ROOT / "README.md"))
    calls = ("init_deltas(", "functional_call(model, ttfunc.patch(params)", "merge(model.state")
    assert all(call in job for call in calls)


def test_every_job_is_on_the_page_of_examples():
    index = (ROOT / "examples" / "README.md").read_text()
    for page in JOBS:
        assert f"]({page.name})" in index, page.name


@pytest.mark.parametrize("name", names(PAGES))
def test_the_links_and_the_named_files_lead_somewhere(name: str):
    text = (ROOT / name).read_text()
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        if link.startswith(("https://", "http://")):
            continue
        path, _, anchor = link.partition("#")
        target = (ROOT / name).parent / path if path else ROOT / name
        assert target.exists(), link
        if anchor:
            assert anchor in anchors(target.read_text()), link
    for file in re.findall(r"`((?:tests|examples|bench|ttfunc)/[\w./-]+\.\w+)`", text):
        assert (ROOT / file).exists() or "NAME" in file, file
    for module in re.findall(r"python -m ((?:examples|bench|tests)\.[\w.]+)", text):
        assert (ROOT / f"{module.replace('.', '/')}.py").exists() or (
            ROOT / module.replace(".", "/") / "__main__.py"
        ).exists(), module
