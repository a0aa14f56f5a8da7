"""Two adapters served from one compiled program, in a process without ttfunc.

A spare token of SmolLM2 is made to mean ` France` by one adapter, and another to mean ` Japan` by
the other. The model is exported once, with rows and ids as inputs, and compiled by AOTInductor. A
process that has torch alone loads the package and reads the rows from the files of `ttfunc.save`.

    python -m examples.serve_any_rows [--quick] [--model FOLDER_OR_HUB_NAME]
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import torch
from torch.export import Dim

import ttfunc
from examples.shared import serve
from examples.shared.options import arguments
from examples.shared.smollm2 import folder_of, load

ROWS = 32
KWARGS = {"use_cache": False, "return_dict": False}
MEANINGS = {"<reponame>": " France", "<file_sep>": " Japan"}  # of tokens that SmolLM2 never met
QUESTION = "The capital city of{} is called"


def main() -> None:
    options = arguments(__doc__ or "")
    folder = folder_of(options.model, options.cache)
    model, tokenizer = load(folder)
    if options.quick:  # compiled in less time
        model.model.layers = model.model.layers[:2]
    files = [
        write_adapter(model, tokenizer, token, meaning, options.output)
        for token, meaning in MEANINGS.items()
    ]
    package = options.output / "any_rows.pt2"
    compile_program(model, files[0], package)
    questions = [tokenizer.encode(QUESTION.format(token)) for token in MEANINGS]
    requests = [[str(path), text] for path, text in zip(files, questions, strict=True)]
    requests.append([None, questions[0]])
    width = model.get_input_embeddings().embedding_dim
    served = serve_in_a_process(package, width, requests)
    for (path, text), answer in zip(requests, served["answers"], strict=True):
        name = Path(path).name if path else "no adapter"
        print(f"{name:>18}: {tokenizer.decode(text)}{tokenizer.decode(answer)}")
    for path, text, answer in zip(files, questions, served["answers"], strict=False):
        assert answer == in_this_process(model, path, text), path
    print("the same tokens as by ttfunc in this process")
    report_speed(model, files[0], served["tokens a second"])


def write_adapter(model: Any, tokenizer: Any, token: str, meaning: str, folder: Path) -> Path:
    """A file with one row: that of the word which the token is to mean."""
    idx = [tokenizer.convert_tokens_to_ids(token)]
    (word,) = tokenizer.encode(meaning)
    row = model.get_input_embeddings().weight[[word]]
    path = folder / f"{meaning.strip().lower()}.safetensors"
    ttfunc.save(ttfunc.init_deltas(model, idx, init=row), path)
    return path


def compile_program(model: Any, file: Path, package: Path) -> None:
    """One program for any rows, batch and length."""
    program = ttfunc.Exportable(model, kwargs=KWARGS)
    rows, ids = program.inputs(ttfunc.load(file, model), rows=ROWS)
    batch, length = Dim("batch", max=64), Dim("length", max=1024)
    shapes = (None, None, ({0: batch, 1: length},))
    x = torch.arange(32).view(4, 8)
    begin = time.perf_counter()
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's own
        exported = torch.export.export(program, (rows, ids, x), dynamic_shapes=shapes)
        torch._inductor.aoti_compile_and_package(exported, package_path=str(package))
    print(
        f"compiled in {time.perf_counter() - begin:.0f} s: {package.stat().st_size / 2**20:,.0f} "
        f"MiB; an adapter is {file.stat().st_size / 2**10:,.0f} KiB"
    )


def serve_in_a_process(package: Path, width: int, requests: list[Any]) -> Any:
    """What `serve` answers, which imports no ttfunc."""
    command = [serve.__file__, str(package), str(ROWS), str(width), json.dumps(requests)]
    done = subprocess.run([sys.executable, *command], check=True, capture_output=True, text=True)  # noqa: S603
    return json.loads(done.stdout.splitlines()[-1])


@torch.no_grad()
def in_this_process(model: Any, file: Path, text: list[int]) -> list[int]:
    """The same tokens, by `functional_call`."""
    weights = ttfunc.patch(ttfunc.load(file, model))

    def program(_rows: object, _ids: object, x: torch.Tensor) -> Any:
        return ttfunc.functional_call(model, weights, (x,), KWARGS)

    nothing = torch.empty(0)
    return serve.answer(program, nothing, nothing, text)


@torch.no_grad()
def report_speed(model: Any, file: Path, served: float) -> None:
    """The compiled program beside `functional_call` and the merged model."""
    params = ttfunc.load(file, model)
    weights, nothing = ttfunc.patch(params), torch.empty(0)

    def eager(_rows: object, _ids: object, x: torch.Tensor) -> Any:
        return ttfunc.functional_call(model, weights, (x,), KWARGS)

    def merged(_rows: object, _ids: object, x: torch.Tensor) -> Any:
        return model(x, **KWARGS)

    speeds: dict[str, float] = {"one program, any rows": served}
    speeds["ttfunc, eager"] = serve.speed(eager, nothing, nothing)
    model.load_state_dict(ttfunc.merge(model.state_dict(), params))
    speeds["the merged model, eager"] = serve.speed(merged, nothing, nothing)
    for name, speed in speeds.items():
        print(f"{speed:>8,.0f} tokens a second: {name}")


if __name__ == "__main__":
    main()
