"""Serve adapters from one compiled program: torch and the files alone, without ttfunc.

python examples/shared/serve.py PACKAGE ROWS WIDTH REQUESTS

PACKAGE is what AOTInductor made of a `ttfunc.Exportable` for `(ROWS, WIDTH)` rows. REQUESTS is
JSON: a list of a file of rows (or null, for the plain model) and the token ids of a text each. The
answer is JSON too: three more tokens for each request, and the tokens a second of a longer batch.
"""

from __future__ import annotations

import json
import sys
import time
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

NEW, BATCH, LENGTH = 3, 4, 64


def read_rows(path: str | None, count: int, width: int) -> tuple[Tensor, Tensor]:
    """`(count, width)` rows and their `(count,)` ids, from a file that `ttfunc.save` wrote."""
    rows, ids = torch.zeros(count, width), torch.full((count,), -1)
    if path is not None:
        with safe_open(path, "pt") as file:
            (matrix,) = json.loads(file.metadata()["ttfunc"])["matrices"]
            name = matrix["names"][0]
            own, tokens = (
                file.get_tensor(f"deltas/{name}"),
                file.get_tensor(f"token_indices/{name}"),
            )
        # What the program cannot check.
        assert len(tokens) <= count, f"{path} has more than {count} rows"
        assert matrix["shape"][1] == width, f"{path} is of another model"
        assert tokens.min() >= 0, f"{path} has negative ids"
        assert tokens.max() < matrix["shape"][0], f"{path} has new tokens"
        assert len(tokens.unique()) == len(tokens), f"{path} has a token twice"
        rows[: len(tokens)], ids[: len(tokens)] = own, tokens
    return rows, ids


def answer(program: Any, rows: Tensor, ids: Tensor, text: list[int]) -> list[int]:
    """The next tokens, each the likeliest."""
    for _ in range(NEW):
        (logits,) = program(rows, ids, torch.tensor([text]))
        text = [*text, int(logits[0, -1].argmax())]
    return text[-NEW:]


def speed(program: Any, rows: Tensor, ids: Tensor) -> float:
    """Tokens a second, of the best of five."""
    x = torch.arange(BATCH * LENGTH).view(BATCH, LENGTH)
    seconds = []
    for _ in range(6):
        begin = time.perf_counter()
        program(rows, ids, x)
        seconds.append(time.perf_counter() - begin)
    return x.numel() / min(seconds[1:])


def main() -> None:
    package, count, width, requests = sys.argv[1:]
    program = torch._inductor.aoti_load_package(package)
    answers = []
    for path, text in json.loads(requests):
        rows, ids = read_rows(path, int(count), int(width))
        answers.append(answer(program, rows, ids, text))
    assert "ttfunc" not in sys.modules
    assert "transformers" not in sys.modules
    print(json.dumps({"answers": answers, "tokens a second": speed(program, rows, ids)}))


if __name__ == "__main__":
    with torch.inference_mode():
        main()
