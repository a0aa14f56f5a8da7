"""Checkpoints on disk to merge into, and what must hold of the result."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from safetensors.torch import load, load_file, save_file
from torch import Tensor, nn

from tests.helpers.oracle import same_bits
from ttfunc import merge

NAME = "model.embed_tokens.weight"
HEAD = "lm_head.weight"


def written(folder: Path, tensors: Mapping[str, Tensor]) -> Path:
    """A folder with one file of these tensors."""
    folder.mkdir()
    save_file(dict(tensors), folder / "model.safetensors", {"format": "pt"})
    return folder


def tensors_of(folder: Path) -> dict[str, Tensor]:
    return {n: t for path in folder.glob("*.safetensors") for n, t in load_file(path).items()}


def contents(root: Path) -> dict[str, bytes]:
    """Every file below a folder, and every empty folder."""
    return {
        path.relative_to(root).as_posix(): path.read_bytes() if path.is_file() else b"folder"
        for path in sorted(root.rglob("*"))
    }


def expected(source: Path, params) -> dict[str, bytes]:
    """The slow way: each file is loaded, merged by `ttfunc.merge`, and its bytes are exchanged."""
    files = contents(source)
    names = {name for row in params.specs.values() for name in row.names}
    for path in source.glob("*.safetensors"):
        raw, state = path.read_bytes(), load_file(path)
        if held := names & state.keys():
            merged = merge(state, keyed(params, held))
            for name in held:
                assert raw_of(state[name]) in raw or raw_of(merged[name]) in raw
                raw = raw.replace(raw_of(state[name]), raw_of(merged[name]))
            assert same_bits(load(raw), merged)
            files[path.name] = raw
    return files


def keyed(params, held: Iterable[str]):
    """The parameters of those matrices alone that have one of these names."""
    keep = [key for key, row in params.specs.items() if set(row.names) & set(held)]
    return type(params)(
        {key: params.deltas[key] for key in keep}, {key: params.specs[key] for key in keep}
    )


def raw_of(tensor: Tensor) -> bytes:
    return tensor.contiguous().view(torch.uint8).numpy().tobytes()


def names_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def leftovers(folder: Path) -> list[str]:
    return [name for name in names_in(folder) if ".ttfunc-" in name]


def saved(model: nn.Module, folder: Path, *, shards: bool = False) -> Path:
    """The model as transformers saves it."""
    model.save_pretrained(folder, max_shard_size="1KB" if shards else "1GB")
    return folder
