"""How many architectures of transformers get the right logits, from ttfunc and from PEFT.

Right is what an edit in place of a copy of the model gives. The models are those of the test suite.

python -m bench.architectures
"""

from __future__ import annotations

import warnings
from typing import Any

import peft
import torch
import transformers
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor

import ttfunc
from tests.helpers.architecture_sizes import EXCLUDED, TARGETS
from tests.helpers.architectures import ARCHITECTURES, IDS, in_place, logits_of, new_rows, toy


def ttfunc_logits(model: Any, inputs: Any, params: ttfunc.TokenDeltas, dense: bool) -> Tensor:
    weights = ttfunc.patch(params, dense=dense)
    logits: Tensor = logits_of(ttfunc.functional_call(model, weights, kwargs=inputs))
    return logits


def peft_logits(name: str, params: ttfunc.TokenDeltas) -> Tensor:
    target, (model, inputs) = TARGETS.get(name), toy(name)
    config = peft.TrainableTokensConfig(
        token_indices=IDS, target_modules=None if target is None else [target]
    )
    wrapped = peft.get_peft_model(model, config)
    (rows,) = params.deltas.values()
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if "trainable_tokens_delta" in name:
                parameter.copy_(rows)
    logits: Tensor = logits_of(wrapped.eval()(**inputs))
    return logits


def main() -> None:
    transformers.logging.set_verbosity_error()
    warnings.simplefilter("ignore")
    names = [name for name in ARCHITECTURES if name not in EXCLUDED]
    ways = ["ttfunc, deferred", "ttfunc, dense", "PEFT"]
    right: dict[str, list[str]] = {way: [] for way in ways}
    tied, failed = [], []
    for name in track(names, "architectures"):
        model, inputs = toy(name)
        params = new_rows(model, name)
        reference, _ = in_place(model, name, params)
        expected = logits_of(reference(**inputs)).detach()
        if any(len(row.names) > 1 for row in params.specs.values()):
            tied.append(name)
        for way in ways:
            try:
                if way == "PEFT":
                    found = peft_logits(name, params)
                else:
                    found = ttfunc_logits(model, inputs, params, dense="dense" in way)
            except Exception as error:  # a crash is no right answer
                failed.append(f"{way}, {name}: {type(error).__name__}")
            else:
                if torch.allclose(found, expected, rtol=1e-4, atol=1e-4):
                    right[way].append(name)

    table = Table(title="architectures with the right logits")
    table.add_column("")
    table.add_column(f"of all {len(names)}", justify="right")
    table.add_column(f"of the {len(tied)} tied", justify="right")
    for way, good in right.items():
        table.add_row(way, str(len(good)), str(len(set(good) & set(tied))))
    Console(width=100).print(table)
    print("raised:", "; ".join(failed) or "none")
    print(
        f"torch {torch.__version__}, transformers {transformers.__version__}, "
        f"peft {peft.__version__}"
    )


if __name__ == "__main__":
    main()
