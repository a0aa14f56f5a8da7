"""Ask a model in one engine, in a process without ttfunc.

python examples/shared/engines.py ENGINE FOLDER CONVERTED REQUEST

FOLDER is a model's, as transformers reads it; CONVERTED is what was made of it for the engine.
REQUEST is JSON: texts, and how many tokens an answer may have. What is printed is JSON too: the
version of the engine, the likeliest tokens after each text, and how many of them a second it made
where it was fastest.
"""

from __future__ import annotations

import json
import os
import sys
import time
import urllib.request
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any, TypeAlias

Ask: TypeAlias = Callable[[str, int], list[int]]

THREADS = int(os.environ.get("OMP_NUM_THREADS") or os.cpu_count() or 1)


def tokenizer_of(folder: Path) -> Any:
    import transformers

    return transformers.AutoTokenizer.from_pretrained(folder)


def in_transformers(folder: Path, _: Path) -> Ask:
    import torch
    import transformers

    torch.set_num_threads(THREADS)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer = tokenizer_of(folder)

    def ask(text: str, count: int) -> list[int]:
        x = tokenizer(text, return_tensors="pt")["input_ids"]
        options = {"max_new_tokens": count, "do_sample": False, "pad_token_id": 0}
        with torch.inference_mode():
            said: list[int] = model.generate(x, **options)[0, x.shape[1] :].tolist()
        return said

    return ask


def in_ctranslate2(folder: Path, converted: Path) -> Ask:
    import ctranslate2

    engine = ctranslate2.Generator(str(converted), compute_type="default", intra_threads=THREADS)
    tokenizer = tokenizer_of(folder)

    def ask(text: str, count: int) -> list[int]:
        options = {"max_length": count, "include_prompt_in_result": False}
        (result,) = engine.generate_batch([tokenizer.tokenize(text)], **options)
        said: list[int] = result.sequences_ids[0]
        return said

    return ask


def in_mlx(folder: Path, _: Path) -> Ask:
    import mlx.core as mx
    import mlx_lm
    from mlx_lm.generate import generate_step

    mx.set_default_device(mx.cpu)
    # transformers 5 writes this where mlx-lm does not look for a Llama's.
    rotary = json.loads((folder / "config.json").read_text()).get("rope_parameters") or {}
    given = {key: rotary[key] for key in ("rope_theta",) if key in rotary}
    model, tokenizer = mlx_lm.load(str(folder), model_config=given)

    def ask(text: str, count: int) -> list[int]:
        said: list[int] = []
        for token, _ in generate_step(mx.array(tokenizer.encode(text)), model, max_tokens=count):
            said.append(int(token))
            if said[-1] in tokenizer.eos_token_ids:
                break
        return said

    return ask


def in_llama_cpp(_: Path, converted: Path) -> Ask:
    import xllamacpp

    parameters = xllamacpp.CommonParams()
    parameters.model.path = str(converted)
    parameters.n_ctx = 512
    parameters.n_parallel = 1
    parameters.cpuparams.n_threads = THREADS
    server = xllamacpp.Server(parameters)

    def ask(text: str, count: int) -> list[int]:
        options = {"temperature": 0, "cache_prompt": False, "return_tokens": True}
        request = urllib.request.Request(  # noqa: S310
            f"{server.listening_address}/completion",
            json.dumps({"prompt": text, "n_predict": count, **options}).encode(),
        )
        with urllib.request.urlopen(request) as answer:  # noqa: S310
            said: list[int] = json.load(answer)["tokens"]
        return said

    return ask


def in_onnx_runtime(folder: Path, converted: Path) -> Ask:
    """The rows are an input: they lie beside the program."""
    import numpy as np
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = THREADS
    session = onnxruntime.InferenceSession(converted, options)
    names = [one.name for one in session.get_inputs()]
    with np.load(converted.with_suffix(".npz")) as file:
        rows, ids = file["rows"], file["ids"]
    tokenizer = tokenizer_of(folder)

    def ask(text: str, count: int) -> list[int]:
        x = tokenizer(text)["input_ids"]
        said: list[int] = []
        while len(said) < count and tokenizer.eos_token_id not in said:
            given = dict(zip(names, (rows, ids, np.array([x + said])), strict=True))
            (logits,) = session.run(None, given)
            said.append(int(logits[0, -1].argmax()))
        return said

    return ask


ENGINES = {  # how it is asked, and the package that it comes in
    "transformers": (in_transformers, "transformers"),
    "CTranslate2": (in_ctranslate2, "ctranslate2"),
    "MLX": (in_mlx, "mlx-lm"),
    "llama.cpp": (in_llama_cpp, "xllamacpp"),
    "ONNX Runtime": (in_onnx_runtime, "onnxruntime"),
}


def main() -> None:
    name, folder, converted, request = sys.argv[1:]
    make, package = ENGINES[name]
    texts, count = json.loads(request)
    ask = make(Path(folder), Path(converted))
    ask(texts[0], count)  # what is compiled at the first call does not count
    answers, speeds = [], []
    for text in texts:
        begin = time.perf_counter()
        answers.append(ask(text, count))
        speeds.append(len(answers[-1]) / (time.perf_counter() - begin))
    assert "ttfunc" not in sys.modules
    print(json.dumps({"version": version(package), "answers": answers, "speed": max(speeds)}))


if __name__ == "__main__":
    main()
