"""Merging into a sharded checkpoint on disk: time and memory, beside copying it and beside PEFT.

python -m bench.checkpoint [--gib 4] [--repeats 5] [--folder /tmp] [--quick]
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import peft
import torch
import transformers
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

import ttfunc
from bench.memory import growth
from bench.report import print_table
from bench.timing import in_turns, seconds_of
from ttfunc.disk.checkpoint import merge_checkpoint
from ttfunc.disk.rows_file import save

SHARD = 2**30
ROWS_FILE = "rows.safetensors"


def config(size: int) -> transformers.LlamaConfig:
    """A Llama whose bfloat16 checkpoint has about that size, tied as Llama 3.2 1B is."""
    width, vocabulary = (2048, 128_256) if size >= 2**30 else (256, 8_000)
    layer = width * width * (2 + 2 / 4 + 3 * 4) * 2
    return transformers.LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=max(1, round((size - 2 * vocabulary * width) / layer)),
        num_attention_heads=width // 64,
        num_key_value_heads=width // 256,
        tie_word_embeddings=True,
        dtype="bfloat16",
    )


def build(folder: Path, size: int, rows: int) -> None:
    """A random checkpoint, made shard by shard, and beside it rows for some of its tokens."""
    with torch.device("meta"):
        model = transformers.LlamaForCausalLM(config(size)).bfloat16()
    folder.mkdir()
    model.config.save_pretrained(folder)
    weight_map, generator = {}, torch.Generator().manual_seed(0)
    shards = list(_shards(model.state_dict(), min(SHARD, size // 4)))
    for number, shard in enumerate(shards, 1):
        name = f"model-{number:05}-of-{len(shards):05}.safetensors"
        tensors = {n: torch.empty_like(t, device="cpu") for n, t in shard.items()}
        for tensor in tensors.values():
            tensor.normal_(std=0.02, generator=generator)
        save_file(tensors, folder / name, {"format": "pt"})
        weight_map.update(dict.fromkeys(tensors, name))
        if "model.embed_tokens.weight" in tensors:
            idx = range(0, model.config.vocab_size, model.config.vocab_size // rows)
            embedding = torch.nn.Module()
            embedding.model = torch.nn.Module()
            weight = tensors["model.embed_tokens.weight"]
            embedding.model.embed_tokens = torch.nn.Embedding.from_pretrained(weight)
            params = ttfunc.init_deltas(embedding, idx[:rows], init="normal", generator=generator)
            save(params, folder.parent / ROWS_FILE)
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def _shards(state: dict[str, Tensor], most: int) -> Iterator[dict[str, Tensor]]:
    shard: dict[str, Tensor] = {}
    for name, tensor in state.items():
        if name == "lm_head.weight":  # tied
            continue
        if shard and sum(t.nbytes for t in shard.values()) + tensor.nbytes > most:
            yield shard
            shard = {}
        shard[name] = tensor
    yield shard


def copied(source: Path, destination: Path) -> None:
    """What copying the folder takes; its bytes may still be on the way to the disk."""
    command = ["cp", "-r", "--reflink=auto", str(source), str(destination)]
    subprocess.run(command, check=True)  # noqa: S603


def copied_and_synced(source: Path, destination: Path) -> None:
    """The same, and the bytes are on the disk, as after a merge."""
    copied(source, destination)
    subprocess.run(["sync", *map(str, destination.iterdir())], check=True)  # noqa: S603, S607


def merged(source: Path, destination: Path) -> None:
    """On disk."""
    merge_checkpoint(source, source.parent / ROWS_FILE, destination)


def merged_by_peft(source: Path, destination: Path) -> None:
    """Loading the model, wrapping it, merging, and saving it."""
    with safe_open(source.parent / ROWS_FILE, "pt") as file:
        idx = file.get_tensor("token_indices/model.embed_tokens.weight")
        rows = file.get_tensor("deltas/model.embed_tokens.weight")
    model: Any = transformers.AutoModelForCausalLM.from_pretrained(source, dtype="auto")
    wrapped: Any = peft.get_peft_model(
        model, peft.TrainableTokensConfig(token_indices=idx.tolist())
    )
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if "trainable_tokens_delta" in name:
                parameter.copy_(rows)
    wrapped.merge_and_unload().save_pretrained(destination, max_shard_size=SHARD)


CONTESTANTS: dict[str, Callable[[Path, Path], None]] = {
    "cp -r": copied,
    "cp -r, then sync": copied_and_synced,
    "ttfunc": merged,
    "PEFT": merged_by_peft,
}


def prepare(source: Path, destination: Path) -> None:
    """Each finds no destination, the source in the cache as far as it fits, and an idle disk."""
    shutil.rmtree(destination, ignore_errors=True)
    for path in source.iterdir():
        with path.open("rb", buffering=0) as file:
            while file.read(SHARD // 64):
                pass
    os.sync()


def run(name: str, source: Path, destination: Path) -> tuple[float, int]:
    """Seconds of one contestant, and how many bytes the memory of this process grew."""
    transformers.utils.logging.disable_progress_bar()
    prepare(source, destination)
    seconds: list[float] = []
    call = functools.partial(CONTESTANTS[name], source, destination)
    grown = growth(lambda: seconds.append(seconds_of(call)))
    return seconds[0], grown


def run_apart(name: str, source: Path, destination: Path) -> tuple[float, int]:
    """`run` in a process of its own."""
    command = [sys.executable, "-m", "bench.checkpoint", "--only", name, "--folder", str(source)]
    out = subprocess.run(  # noqa: S603
        [*command, "--output", str(destination)], check=True, capture_output=True, text=True
    )
    seconds, growth = json.loads(out.stdout.splitlines()[-1])
    return seconds, growth


def embedding(folder: Path) -> Tensor:
    """The token matrix of a checkpoint."""
    for path in folder.glob("*.safetensors"):
        with safe_open(path, "pt") as file:
            if "model.embed_tokens.weight" in file.keys():  # noqa: SIM118, it has nothing else
                return file.get_tensor("model.embed_tokens.weight")  # type: ignore[no-any-return]
    raise FileNotFoundError(folder)


def compare(folder: Path, size: int, repeats: int) -> None:
    """All contestants on one checkpoint; what copies takes turns."""
    source, destination = folder / "source", folder / "destination"
    build(source, size, rows=16)
    turns = ("cp -r", "cp -r, then sync", "ttfunc")
    seconds = in_turns(
        {name: functools.partial(CONTESTANTS[name], source, destination) for name in turns},
        repeats,
        prepare=functools.partial(prepare, source, destination),
    )
    # Last, since the gigabytes that PEFT takes slow down whatever runs next.
    of_peft = [run_apart("PEFT", source, destination) for _ in range((repeats + 2) // 3)]
    seconds["PEFT"] = statistics.median(taken for taken, _ in of_peft)
    found = embedding(destination)
    _, grown = run_apart("ttfunc", source, destination)
    assert torch.equal(embedding(destination), found)
    assert not torch.equal(embedding(source), found)
    total = sum(path.stat().st_size for path in source.iterdir())
    report(
        f"a sharded folder of {total / 2**30:.2f} GiB, 16 rows; medians of {repeats} interleaved "
        f"runs ({len(of_peft)} of PEFT)",
        seconds,
        {"ttfunc": grown, "PEFT": max(grown for _, grown in of_peft)},
    )


def report(title: str, seconds: dict[str, float], growths: dict[str, int]) -> None:
    """Medians, their ratios to the two copies, and the growth of memory where it is measured."""
    copies = ("cp -r", "cp -r, then sync")
    lines = [
        [
            name,
            f"{median:.2f}",
            *(f"{median / seconds[copy]:.2f}" for copy in copies),
            f"{growths[name] / 2**20:,.1f}" if name in growths else "",
        ]
        for name, median in seconds.items()
    ]
    columns = ["", "seconds", *(f"times {copy}" for copy in copies), "growth of memory, MiB"]
    print_table(title, columns, lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n\n")[0])
    parser.add_argument("--gib", type=float, default=4)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--folder", type=Path, help="to work in: twice the size")
    parser.add_argument("--quick", action="store_true", help="32 MiB, once")
    parser.add_argument("--only", choices=CONTESTANTS, help="one contestant, in this process")
    parser.add_argument("--output", type=Path, help="what this one writes")
    options = parser.parse_args()
    if options.only:
        print(json.dumps(run(options.only, options.folder, options.output)))
        return
    size = 2**25 if options.quick else int(options.gib * 2**30)
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        compare(Path(folder), size, 1 if options.quick else options.repeats)


if __name__ == "__main__":
    main()
