"""From PEFT to ttfunc, back to PEFT, and into a checkpoint that any server loads.

PEFT trains two rows of a toy model and saves them; ttfunc loads them, trains on, saves them for
PEFT, and merges them into a copy of the model's folder. Nothing is downloaded.

    python examples/from_peft.py
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import optree
import peft
import torch
import transformers
from torch import Tensor, nn

import ttfunc

TOKENS = [998, 999]


def main() -> None:
    torch.manual_seed(0)
    transformers.utils.logging.disable_progress_bar()
    x = torch.randint(0, 1000, (8, 16))
    x[:, 3], x[:, 7] = torch.tensor(TOKENS)
    with tempfile.TemporaryDirectory() as folder:
        round_trip(Path(folder), x)


def round_trip(folder: Path, x: Tensor) -> None:
    toy().save_pretrained(folder / "base")

    # 1. PEFT trains the two rows, and saves them.
    base = transformers.AutoModelForCausalLM.from_pretrained(folder / "base")
    wrapped = peft.get_peft_model(base, peft.TrainableTokensConfig(token_indices=TOKENS))
    train_in_peft(wrapped, x)
    wrapped.save_pretrained(str(folder / "adapter"))

    # 2. ttfunc loads them onto the plain model, which stays as it is.
    model = transformers.AutoModelForCausalLM.from_pretrained(folder / "base").requires_grad_(False)
    params = ttfunc.load_peft(folder / "adapter", model)
    print(params)
    print("as PEFT saved them: logits differ by", distance(wrapped, model, params, x))

    # 3. It trains on, and saves them in a file of its own and for PEFT.
    params = train(model, params, x)
    ttfunc.save(params, folder / "rows.safetensors")
    ttfunc.save_peft(params, folder / "trained", base_model=folder / "base")
    wrapped = peft.AutoPeftModelForCausalLM.from_pretrained(folder / "trained")
    print("as PEFT loads them: logits differ by", distance(wrapped, model, params, x))

    # 4. The rows go into a copy of the folder, at the level of bytes.
    ttfunc.merge_checkpoint(folder / "base", params, folder / "merged")
    merged = transformers.AutoModelForCausalLM.from_pretrained(folder / "merged")
    difference = distance(merged, model, params, x)
    print("as transformers loads the merged folder: logits differ by", difference)
    assert difference == 0


def toy() -> transformers.PreTrainedModel:
    """A Llama with random weights, its head tied to its embedding."""
    config = transformers.LlamaConfig(
        vocab_size=1000,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        tie_word_embeddings=True,
    )
    return transformers.LlamaForCausalLM(config)


def train_in_peft(wrapped: nn.Module, x: Tensor) -> None:
    rows = [parameter for parameter in wrapped.parameters() if parameter.requires_grad]
    optimizer = torch.optim.SGD(rows, lr=0.5)
    for _ in range(20):
        loss = wrapped(input_ids=x, labels=x).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def train(model: nn.Module, params: ttfunc.TokenDeltas, x: Tensor) -> ttfunc.TokenDeltas:
    """The same steps, as a function of the rows."""

    def loss_of(params: ttfunc.TokenDeltas) -> Tensor:
        out = ttfunc.functional_call(model, ttfunc.patch(params), x, {"labels": x})
        loss: Tensor = out.loss
        return loss

    for _ in range(20):
        gradient, loss = torch.func.grad_and_value(loss_of)(params)
        params = optree.tree_map(lambda row, slope: row - 0.5 * slope, params, gradient)  # type: ignore[arg-type, assignment]
    print(f"loss {loss.item():.4f}")
    return params


@torch.no_grad()
def distance(other: nn.Module, model: nn.Module, params: ttfunc.TokenDeltas, x: Tensor) -> float:
    """The largest difference between the logits of a model and those of the patched one."""
    patched = ttfunc.functional_call(model.eval(), ttfunc.patch(params, dense=True), x).logits
    return float((other.eval()(x).logits - patched).abs().max())


if __name__ == "__main__":
    main()
