"""An ensemble, and gradients of each example, on SmolLM2-135M: `vmap`, a Python loop, and PEFT.

python -m bench.ensemble [--members 8] [--tokens 16] [--repeats 5] [--quick]
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeAlias

import optree
import peft
import torch
import transformers
from torch import Tensor
from torch.func import grad, vmap
from torch.nn import functional as F

import ttfunc
from bench.contestants import Work
from bench.memory import growth
from bench.report import print_table
from bench.timing import agreeing
from examples.shared.smollm2 import fetch_smollm2, load

IDX = [11, 12]


@dataclass(frozen=True)
class Setting:
    """A frozen model, n adapters for two of its tokens, and n texts that hold them."""

    model: Any
    adapters: list[ttfunc.TokenDeltas]
    texts: Tensor

    @property
    def text(self) -> Tensor:
        """`(1, tokens)`, the one that all members of the ensemble read."""
        return self.texts[:1]

    def logits(self, params: ttfunc.TokenDeltas, text: Tensor) -> Tensor:
        """`(batch, tokens, V)`."""
        kwargs = {"input_ids": text, "use_cache": False}
        out = ttfunc.functional_call(self.model, ttfunc.patch(params), kwargs=kwargs)
        return out.logits  # type: ignore[no-any-return]

    def loss(self, params: ttfunc.TokenDeltas, text: Tensor) -> Tensor:
        """Of the next token."""
        return next_token_loss(self.logits(params, text), text)


Call: TypeAlias = Callable[[], Tensor]
Way: TypeAlias = Callable[[Setting], Call]


def next_token_loss(logits: Tensor, text: Tensor) -> Tensor:
    """Cross-entropy of each token given those before it."""
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), text[:, 1:].flatten())


def setting(name: str, members: int, tokens: int) -> Setting:
    """Of SmolLM2, or of a toy in its place."""
    if name == "SmolLM2-135M":
        model, _ = load(fetch_smollm2())
    else:
        model = Work(vocabulary=500, width=64).model().eval()
    generator = torch.Generator().manual_seed(0)
    adapters = [
        ttfunc.init_deltas(model, IDX, init="normal", generator=generator) for _ in range(members)
    ]
    vocabulary = model.get_input_embeddings().num_embeddings
    texts = torch.randint(0, vocabulary, (members, tokens), generator=generator)
    texts[:, : len(IDX)] = torch.tensor(IDX)
    return Setting(model, adapters, texts)


def only_leaf(params: ttfunc.TokenDeltas) -> Tensor:
    """The rows of a tied model."""
    (rows,) = params.deltas.values()
    return rows


def logits_by_vmap(given: Setting) -> Call:
    stacked = ttfunc.stack(given.adapters)
    return torch.no_grad()(lambda: vmap(given.logits, (0, None))(stacked, given.text))


def logits_by_loop(given: Setting) -> Call:
    return torch.no_grad()(
        lambda: torch.stack([given.logits(params, given.text) for params in given.adapters])
    )


def members_by_vmap(given: Setting) -> Call:
    stacked = ttfunc.stack(given.adapters)
    return lambda: only_leaf(vmap(grad(given.loss), (0, None))(stacked, given.text))


def members_by_loop(given: Setting) -> Call:
    members = [trainable(params) for params in given.adapters]
    return lambda: torch.stack([backward(given, params, given.text) for params in members])


def examples_by_vmap(given: Setting) -> Call:
    texts = given.texts.unsqueeze(1)
    return lambda: only_leaf(vmap(grad(given.loss), (None, 0))(given.adapters[0], texts))


def examples_by_loop(given: Setting) -> Call:
    params = trainable(given.adapters[0])
    return lambda: torch.stack([backward(given, params, x) for x in given.texts.split(1)])


def examples_by_peft(given: Setting) -> Call:
    """One backward for each example."""
    config = peft.TrainableTokensConfig(token_indices=IDX)
    wrapped: Any = peft.get_peft_model(given.model, config).eval()
    (rows,) = [p for name, p in wrapped.named_parameters() if "tokens_delta" in name]
    rows.data.copy_(only_leaf(given.adapters[0]))

    def gradient(text: Tensor) -> Tensor:
        rows.grad = None
        logits = wrapped(input_ids=text, use_cache=False).logits
        next_token_loss(logits, text).backward()
        found: Tensor = rows.grad
        return found

    return lambda: torch.stack([gradient(text) for text in given.texts.split(1)])


def trainable(params: ttfunc.TokenDeltas) -> ttfunc.TokenDeltas:
    """A copy that requires grad."""
    copied = optree.tree_map(lambda t: t.clone().requires_grad_(), params)  # type: ignore[arg-type]
    return copied  # type: ignore[return-value]


def backward(given: Setting, params: ttfunc.TokenDeltas, text: Tensor) -> Tensor:
    """The gradient of one call, without a transform."""
    (gradient,) = torch.autograd.grad(given.loss(params, text), only_leaf(params))
    return gradient


TASKS: dict[str, dict[str, Way]] = {
    "gradients of each example": {
        "vmap(grad)": examples_by_vmap,
        "loop": examples_by_loop,
        "PEFT, a backward for each": examples_by_peft,
    },
    "logits of each member": {"vmap": logits_by_vmap, "loop": logits_by_loop},
    "gradients of each member": {"vmap(grad)": members_by_vmap, "loop": members_by_loop},
}


def times(ways: dict[str, Way], make: Callable[[], Setting], repeats: int) -> dict[str, float]:
    """Median seconds of each, taking turns. Raises where they do not agree."""
    shared = make()
    # PEFT changes the model that it wraps.
    calls = {n: way(make() if way is examples_by_peft else shared) for n, way in ways.items()}
    return agreeing(calls, repeats)


def peak_of(way: Way, model: str, members: int, tokens: int) -> int:
    """Bytes that the peak of a call is above the loaded model, in this process."""
    way(setting("a toy", members, tokens))()  # what the libraries load is not the call's
    return growth(way(setting(model, members, tokens)))


def measure(task: str, name: str, model: str, members: int, tokens: int) -> int:
    """`peak_of` in a process of its own."""
    options = [f"--members={members}", f"--tokens={tokens}", *(["--quick"] * (model == "a toy"))]
    command = [sys.executable, "-m", "bench.ensemble", *options, "--only", task, name]
    out = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)  # noqa: S603
    return int(json.loads(out.stdout.splitlines()[-1]))


def report(task: str, title: str, seconds: dict[str, float], peaks: dict[str, int]) -> None:
    """A line for each way, and ratios to the first, which is `vmap`."""
    time_of_vmap = next(iter(seconds.values()))
    lines = []
    for name, median in seconds.items():
        line = [name, f"{1e3 * median:,.0f}", f"{median / time_of_vmap:.2f}", "", ""]
        if name in peaks:
            ratio = peaks[name] / max(1, next(iter(peaks.values())))
            line[3:] = [f"{peaks[name] / 2**20:,.0f}", f"{ratio:.2f}"]
        lines.append(line)
    columns = ["", "median, ms", "times vmap", "peak over the model, MiB", "times vmap"]
    print_table(f"{task}: {title}", columns, lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n\n")[0])
    parser.add_argument("--members", type=int, default=8, help="adapters, and texts")
    parser.add_argument("--tokens", type=int, default=16, help="of each text")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--quick", action="store_true", help="a toy, and memory of one way alone")
    parser.add_argument("--only", nargs=2, help="the memory of one way, in this process")
    options = parser.parse_args()
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    # torch's CPU attention has no batching rule, and takes the members one by one.
    warnings.filterwarnings("ignore", ".*not yet implemented the batching rule")
    model = "a toy" if options.quick else "SmolLM2-135M"
    sizes = (model, options.members, options.tokens)
    if options.only:
        task, name = options.only
        print(json.dumps(peak_of(TASKS[task][name], *sizes)))
        return
    for number, (task, ways) in enumerate(TASKS.items()):
        found = times(ways, lambda: setting(*sizes), 1 if options.quick else options.repeats)
        measured = list(ways)[: number == 0] if options.quick else list(ways)
        peaks = {name: measure(task, name, *sizes) for name in measured}
        title = f"{model}, {options.members} of them, {options.tokens} tokens"
        report(task, title, found, peaks)


if __name__ == "__main__":
    main()
