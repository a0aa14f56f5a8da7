"""One exported program for any rows: how far its logits are from eager ones, its time and its size.

python -m bench.export [--rows 32] [--layers 30] [--batch 4] [--tokens 64] [--repeats 5] [--quick]
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import functools
import io
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnxruntime
import torch
import transformers
from torch import Tensor
from torch.export import Dim

import ttfunc
from bench.contestants import Work
from bench.report import print_table
from bench.timing import agreeing
from examples.shared.smollm2 import fetch_smollm2, load

KWARGS = {"use_cache": False, "return_dict": False}
BATCH, LENGTH = Dim("batch", max=64), Dim("length", max=1024)
Call = Callable[[Tensor, Tensor, Tensor], Tensor]
# A call of the logits, the seconds that it took to make, and the bytes on disk.
Runtime = tuple[Call, float | None, int | None]


def model_of(quick: bool, layers: int | None) -> Any:
    """SmolLM2, or its first layers, or a toy in its place."""
    if quick:
        return Work(vocabulary=500, width=64).model().eval()
    model = load(fetch_smollm2())[0]
    model.model.layers = model.model.layers[:layers]
    return model


def draw(model: Any, rows: int, batch: int, tokens: int, seed: int) -> tuple[Any, Tensor]:
    """Random rows of random tokens, and a text that holds them."""
    generator = torch.Generator().manual_seed(seed)
    vocabulary = model.get_input_embeddings().num_embeddings
    count = int(torch.randint(1, rows + 1, (1,), generator=generator))
    ids = torch.randperm(vocabulary, generator=generator)[:count]
    with warnings.catch_warnings():  # the padding may be among them
        warnings.simplefilter("ignore")
        params = ttfunc.init_deltas(model, ids, init="normal", generator=generator)
    text = torch.randint(0, vocabulary, (batch, tokens), generator=generator)
    place = torch.rand(text.shape, generator=generator) < 0.3
    return params, torch.where(place, ids[text % count], text)


class Plain(torch.nn.Module):
    """The model alone, for the size of its package."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Any:
        return self.model(x, **KWARGS)


def compiled(exported: Any, path: Path) -> Any:
    """By AOTInductor, which prints."""
    with contextlib.redirect_stdout(io.StringIO()):
        torch._inductor.aoti_compile_and_package(exported, package_path=str(path))
    return torch._inductor.aoti_load_package(str(path))


def runtimes(program: ttfunc.Exportable, example: tuple[Tensor, ...], folder: Path) -> Any:
    """The ways to run the program, each made when it is asked for."""
    shapes = (None, None, ({0: BATCH, 1: LENGTH},))

    def by_export(strict: bool) -> Runtime:
        begin = time.perf_counter()
        exported = torch.export.export(program, example, dynamic_shapes=shapes, strict=strict)
        module = exported.module()
        return (lambda *args: module(*args)[0]), time.perf_counter() - begin, None

    def by_inductor() -> Runtime:
        begin = time.perf_counter()
        exported = torch.export.export(program, example, dynamic_shapes=shapes)
        package = compiled(exported, folder / "any_rows.pt2")
        seconds = time.perf_counter() - begin
        return (lambda *args: package(*args)[0]), seconds, (folder / "any_rows.pt2").stat().st_size

    def by_onnx() -> Runtime:
        begin = time.perf_counter()
        with contextlib.redirect_stdout(io.StringIO()):
            made = torch.onnx.export(
                program, example, dynamic_shapes=shapes, dynamo=True, verbose=False
            )
        assert made is not None
        made.save(str(folder / "any_rows.onnx"))
        session = onnxruntime.InferenceSession(str(folder / "any_rows.onnx"))
        names = [one.name for one in session.get_inputs()]

        def call(*args: Tensor) -> Tensor:
            inputs = {name: one.numpy() for name, one in zip(names, args, strict=True)}
            return torch.from_numpy(session.run(None, inputs)[0])

        size = sum(path.stat().st_size for path in folder.glob("any_rows.onnx*"))
        return call, time.perf_counter() - begin, size

    return {
        "torch.export": functools.partial(by_export, strict=False),
        "torch.export, strict": functools.partial(by_export, strict=True),
        "AOTInductor": by_inductor,
        "ONNX Runtime": by_onnx,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n\n")[0])
    parser.add_argument("--rows", type=int, default=32, help="of the program")
    parser.add_argument("--layers", type=int, help="of SmolLM2; by default all")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=64, help="of each text")
    parser.add_argument("--draws", type=int, default=5, help="of rows, ids, batch and length")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--quick", action="store_true", help="a toy model, once")
    options = parser.parse_args()
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    warnings.filterwarnings("ignore")  # torch's own, of its exporters
    if options.quick:
        options.draws = options.repeats = 1
    model = model_of(options.quick, options.layers)
    with torch.no_grad(), tempfile.TemporaryDirectory() as folder:
        compare(model, options, Path(folder))


def compare(model: Any, options: argparse.Namespace, folder: Path) -> None:
    """Make each runtime, compare its logits with those of an edited model, and time it."""
    program = ttfunc.Exportable(model, kwargs=KWARGS)
    params, text = draw(model, options.rows, options.batch, options.tokens, 0)
    rows, ids = program.inputs(params, rows=options.rows)
    merged = copy.deepcopy(model)
    merged.load_state_dict(ttfunc.merge(model.state_dict(), params))
    weights = ttfunc.patch(params)
    calls: dict[str, Call] = {
        "the merged model, eager": lambda _rows, _ids, x: merged(x, **KWARGS)[0],
        "ttfunc, eager": lambda _rows, _ids, x: ttfunc.functional_call(
            model, weights, (x,), KWARGS
        )[0],
    }
    notes: dict[str, list[str]] = {name: ["", "", ""] for name in calls}
    for name, make in runtimes(program, (rows, ids, text), folder).items():
        calls[name], seconds, size = make()
        worst = 0.0
        for seed in range(1, options.draws + 1):
            batch, length = 1 + seed % 4, 8 + 13 * seed
            other, x = draw(model, options.rows, batch, length, seed)
            expected = ttfunc.functional_call(model, ttfunc.patch(other), (x,), KWARGS)[0]
            other_rows, other_ids = program.inputs(other, rows=options.rows)
            found = calls[name](other_rows, other_ids, x)
            worst = max(worst, (found - expected).abs().max().item())
        notes[name] = [f"{worst:.0e}", f"{seconds:.0f}", f"{size / 2**20:,.1f}" if size else ""]
    plain = torch.export.export(Plain(model), (text,), dynamic_shapes=({0: BATCH, 1: LENGTH},))
    compiled(plain, folder / "plain.pt2")
    timed = {name: functools.partial(call, rows, ids, text) for name, call in calls.items()}
    times = agreeing(timed, options.repeats)
    count = text.numel()
    print_table(
        f"one program for {options.rows} rows, {options.batch}×{options.tokens} tokens",
        ["", "tokens a second", "largest difference", "made in, s", "on disk, MiB"],
        [[name, f"{count / times[name]:,.0f}", *notes[name]] for name in calls],
    )
    own = sum(one.numel() * one.element_size() for one in model.parameters()) / 2**20
    matrix = model.get_input_embeddings().weight
    print(
        f"the model {own:,.1f} MiB, of which the tied matrix "
        f"{matrix.numel() * matrix.element_size() / 2**20:,.1f}; AOTInductor's package of the "
        f"plain model {(folder / 'plain.pt2').stat().st_size / 2**20:,.1f}; the inputs of an "
        f"adapter {sum(one.nbytes for one in (rows, ids)) / 2**10:,.0f} KiB"
    )


if __name__ == "__main__":
    main()
