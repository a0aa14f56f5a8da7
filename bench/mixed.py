"""One batch of 16 adapters on SmolLM2-135M: a mixed patch, a call of each, PEFT's `adapter_names`.

python -m bench.mixed [--adapters 16] [--tokens 16] [--new 8] [--repeats 5] [--quick]
"""

from __future__ import annotations

import argparse
import functools
from collections.abc import Callable, Sequence
from typing import Any

import peft
import torch
import transformers
from torch import Tensor

import ttfunc
from bench.contestants import Work
from bench.report import print_table
from bench.timing import agreeing
from examples.shared.smollm2 import fetch_smollm2, load

MIXED = "ttfunc, patch_mixed"


def model_of(name: str) -> Any:
    """SmolLM2, or a toy in its place."""
    if name == "SmolLM2-135M":
        return load(fetch_smollm2())[0]
    return Work(vocabulary=500, width=64).model().eval()


def tokens_of(adapter: int) -> list[int]:
    """Adapters differ in their tokens and in how many they have: one to three."""
    return list(range(20 + 2 * adapter, 20 + 2 * adapter + 1 + adapter % 3))


def adapters_of(model: Any, count: int) -> list[ttfunc.TokenDeltas]:
    """With random rows."""
    generator = torch.Generator().manual_seed(0)
    return [
        ttfunc.init_deltas(model, tokens_of(number), init="normal", generator=generator)
        for number in range(count)
    ]


def texts_of(model: Any, count: int, tokens: int) -> Tensor:
    """`(count, tokens)`, text i with the tokens of adapter i."""
    vocabulary = model.get_input_embeddings().num_embeddings
    generator = torch.Generator().manual_seed(1)
    texts = torch.randint(0, vocabulary, (count, tokens), generator=generator)
    for number, text in enumerate(texts):
        text[: len(tokens_of(number))] = torch.tensor(tokens_of(number))
    return texts


def peft_of(model: Any, adapters: Sequence[ttfunc.TokenDeltas]) -> Any:
    """PEFT with the same rows. It mixes batches in LoRA alone, which is as small as it can be."""
    wrapped: Any = None
    for number in range(len(adapters)):
        config = peft.LoraConfig(
            r=1,
            target_modules=["q_proj"],
            layers_to_transform=[0],
            trainable_token_indices=tokens_of(number),
        )
        if wrapped is None:
            wrapped = peft.get_peft_model(model, config, adapter_name=str(number))
        else:
            wrapped.add_adapter(str(number), config)
    for name, parameter in wrapped.named_parameters():
        if "trainable_tokens_delta" in name:
            (rows,) = adapters[int(name.rpartition(".")[2])].deltas.values()
            parameter.data.copy_(rows)
    return wrapped.eval()


def contestants(name: str, count: int, tokens: int) -> dict[str, Callable[..., Tensor]]:
    """Each takes a method of the model and its options, and gives what it says of all texts."""
    model = model_of(name)
    adapters, texts = adapters_of(model, count), texts_of(model, count, tokens)
    wrapped = peft_of(model_of(name), adapters)

    def call(weights: dict[str, Tensor], x: Tensor, method: str, **options: Any) -> Tensor:
        kwargs = {"input_ids": x, "attention_mask": torch.ones_like(x), **options}
        return logits(ttfunc.functional_call(model, weights, kwargs=kwargs, method=method))

    def mixed(method: str, **options: Any) -> Tensor:
        return call(ttfunc.patch_mixed(adapters, range(count)), texts, method, **options)

    def separate(method: str, **options: Any) -> Tensor:
        pairs = zip(adapters, texts.split(1), strict=True)
        return torch.cat([call(ttfunc.patch(p), x, method, **options) for p, x in pairs])

    def by_peft(method: str, **options: Any) -> Tensor:
        names = [str(number) for number in range(count)]
        options |= {"attention_mask": torch.ones_like(texts), "adapter_names": names}
        run = wrapped if method == "forward" else getattr(wrapped, method)
        return logits(run(input_ids=texts, **options))

    return {MIXED: mixed, f"ttfunc, {count} calls": separate, "PEFT, adapter_names": by_peft}


def logits(out: Any) -> Tensor:
    """Of a forward call; what is generated is a tensor already."""
    return out if isinstance(out, Tensor) else out.logits


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n\n")[0])
    parser.add_argument("--adapters", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=16, help="of each text")
    parser.add_argument("--new", type=int, default=8, help="tokens to generate")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--quick", action="store_true", help="a toy model, once")
    options = parser.parse_args()
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    name = "a toy" if options.quick else "SmolLM2-135M"
    found = contestants(name, options.adapters, options.tokens)
    generation = {
        "max_new_tokens": options.new,
        "min_new_tokens": options.new,
        "do_sample": False,
        "pad_token_id": 0,
    }
    works: dict[str, dict[str, Any]] = {
        "a forward call": {"method": "forward", "use_cache": False},
        f"generating {options.new} tokens": {"method": "generate", **generation},
    }
    for work, kwargs in works.items():
        calls = {n: functools.partial(call, **kwargs) for n, call in found.items()}
        with torch.no_grad():
            seconds = agreeing(calls, 1 if options.quick else options.repeats)
        print_table(
            f"{work}: {name}, {options.adapters} adapters, a text of {options.tokens} tokens each",
            ["", "median, ms", "times the mixed patch"],
            [[n, f"{1e3 * s:,.0f}", f"{s / seconds[MIXED]:.2f}"] for n, s in seconds.items()],
        )


if __name__ == "__main__":
    main()
