"""Peak memory of one training step over the loaded model, each contestant in a process of its own.

python -m bench.memory [--vocabulary 128000] [--width 1024] [--tokens 16] [--rows 4]
"""

from __future__ import annotations

import argparse
import json
import platform
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import torch
import transformers
from rich.console import Console
from rich.table import Table
from torch import Tensor

import ttfunc


def make(vocabulary: int, width: int) -> Any:
    """A Llama of one layer, its head tied to the embedding."""
    config = transformers.LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=1,
        num_attention_heads=width // 64,
        tie_word_embeddings=True,
    )
    return transformers.LlamaForCausalLM(config).requires_grad_(False)


def frozen_floor(model: Any, x: Tensor, idx: list[int]) -> Callable[[], None]:
    """Running the frozen model: the embedding's output alone requires grad."""

    def step() -> None:
        h = model.model.embed_tokens(x).requires_grad_()
        model(inputs_embeds=h, labels=x).loss.backward()

    return step


def deferred(model: Any, x: Tensor, idx: list[int], dense: bool = False) -> Callable[[], None]:
    params = ttfunc.init_deltas(model, idx, requires_grad=True)
    kwargs = {"input_ids": x, "labels": x}

    def step() -> None:
        weights = ttfunc.patch(params, dense=dense)
        ttfunc.functional_call(model, weights, kwargs=kwargs).loss.backward()

    return step


def dense(model: Any, x: Tensor, idx: list[int]) -> Callable[[], None]:
    return deferred(model, x, idx, dense=True)


def peft_tokens(model: Any, x: Tensor, idx: list[int]) -> Callable[[], None]:
    wrapped = peft.get_peft_model(model, peft.TrainableTokensConfig(token_indices=idx))

    def step() -> None:
        wrapped(input_ids=x, labels=x).loss.backward()

    return step


def full_embedding(model: Any, x: Tensor, idx: list[int]) -> Callable[[], None]:
    model.get_input_embeddings().requires_grad_()

    def step() -> None:
        model(input_ids=x, labels=x).loss.backward()

    return step


CONTESTANTS = {
    "frozen floor": frozen_floor,
    "ttfunc, deferred": deferred,
    "ttfunc, dense": dense,
    "PEFT": peft_tokens,
    "full embedding": full_embedding,
}


def resident(field: str) -> float:
    """A figure of this process in MiB, as Linux keeps it."""
    (kib,) = re.findall(rf"^{field}:\s+(\d+) kB", Path("/proc/self/status").read_text(), re.M)
    return int(kib) / 1024


def measure(name: str, options: argparse.Namespace) -> float:
    """MiB that the peak of a step is above the loaded model."""
    torch.manual_seed(0)
    model = make(options.vocabulary, options.width)
    idx = list(range(7, 7 + options.rows))
    x = torch.randint(0, options.vocabulary, (1, options.tokens))
    x[0, : min(4, options.rows)] = torch.tensor(idx[:4])
    # What the libraries themselves load with their first step is not the step's.
    CONTESTANTS[name](make(50 + options.rows, options.width), x % 7, idx)()
    step = CONTESTANTS[name](model, x, idx)
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    loaded = resident("VmRSS")
    step()
    return resident("VmHWM") - loaded


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--vocabulary", type=int, default=128_000)
    parser.add_argument("--width", type=int, default=1024)
    parser.add_argument("--tokens", type=int, default=16)
    parser.add_argument("--rows", type=int, default=4)
    parser.add_argument("--only", choices=CONTESTANTS, help="one contestant, in this process")
    return parser.parse_args()


def main() -> None:
    options = arguments()
    if options.only:
        print(json.dumps(measure(options.only, options)))
        return
    found = {}
    for name in CONTESTANTS:
        command = [sys.executable, "-m", "bench.memory", *sys.argv[1:], "--only", name]
        out = subprocess.run(command, check=True, capture_output=True, text=True)  # noqa: S603
        found[name] = json.loads(out.stdout.splitlines()[-1])

    matrix = options.vocabulary * options.width * 4 / 2**20
    table = Table(
        title=f"peak of a step over the loaded model, tied {options.vocabulary:,}×{options.width:,}"
        f" float32 ({matrix:.0f} MiB), {options.tokens} tokens, {options.rows} rows"
    )
    for column in ("contestant", "peak, MiB", "above the floor, % of the matrix"):
        table.add_column(column, justify="left" if column == "contestant" else "right")
    for name, peak in found.items():
        table.add_row(name, f"{peak:.0f}", f"{(peak - found['frozen floor']) / matrix:.1%}")
    Console(width=100).print(table)
    print(
        f"torch {torch.__version__}, transformers {transformers.__version__}, peft "
        f"{peft.__version__}, {platform.machine()}, {torch.get_num_threads()} threads"
    )


if __name__ == "__main__":
    main()
