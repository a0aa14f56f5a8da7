"""A cache of the model hub, so that a page loads by name what stands there for the model."""

from __future__ import annotations

from pathlib import Path

SMOLLM2 = "HuggingFaceTB/SmolLM2-135M-Instruct"
_REVISION = "0" * 40


def folder_in(cache: Path, name: str = SMOLLM2) -> Path:
    """The folder, made if needed, from which `from_pretrained(name)` loads without a network.

    The process has the cache in `HF_HUB_CACHE`, and `HF_HUB_OFFLINE=1`.
    """
    repository = cache / f"models--{name.replace('/', '--')}"
    (repository / "refs").mkdir(parents=True, exist_ok=True)
    (repository / "refs" / "main").write_text(_REVISION)
    folder = repository / "snapshots" / _REVISION
    folder.mkdir(parents=True, exist_ok=True)
    return folder
