"""The lessons of teach_a_token.py, taught by TRL's SFTTrainer to a LoRA and two token rows at once.

Two tokens that the model has to spare become `<calc>` and `</calc>`. A `TokenModule` with
`train_base=True` trains their rows and the LoRA's parameters; both are saved as one PEFT adapter,
which a process that knows nothing of ttfunc loads to the same logits.

    python -m examples.teach_beside_lora [--quick] [--model FOLDER_OR_HUB_NAME]
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import peft
import torch
import transformers
import trl
from datasets import Dataset

import ttfunc
from examples.shared.calculator import NEW_TOKENS, check_frozen, digests, read_lessons, report
from examples.shared.options import arguments
from examples.shared.smollm2 import folder_of, load

SPARE = ["<gh_stars>", "<issue_start>"]  # of SmolLM2, which no text here has
WITHOUT_TTFUNC = """
import sys, torch, peft, transformers
model = transformers.AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.float32)
model = peft.PeftModel.from_pretrained(model, sys.argv[2])
given = torch.load(sys.argv[3])
with torch.no_grad():
    far = (model(given["x"]).logits - given["logits"]).abs().max().item()
assert "ttfunc" not in sys.modules
print(f"PEFT, in a process without ttfunc: logits differ by at most {far:.1e}")
"""


def main() -> None:
    options = arguments(__doc__ or "", steps=(120, 2), rate=(0.01, 0.01))
    warnings.simplefilter("ignore", FutureWarning)  # of the libraries' own
    folder, output = folder_of(options.model, options.cache), options.output
    model, tokenizer = load(folder)
    before = digests(model)
    tokenizer = renamed(tokenizer, output / "tokenizer")
    idx = tokenizer.convert_tokens_to_ids(NEW_TOKENS)
    train, held_out = read_lessons(tokenizer)
    held_out = held_out[:4] if options.quick else held_out

    rows = ttfunc.init_deltas(model, idx, init="mean")
    lora = peft.get_peft_model(model, peft.LoraConfig(r=8, target_modules=["q_proj", "v_proj"]))
    module = ttfunc.TokenModule(lora, rows, train_base=True)
    report("before", lora, module.params(), tokenizer, held_out)
    settings = trl.SFTConfig(
        output_dir=str(output / "sft"),
        max_steps=options.steps,
        per_device_train_batch_size=8,
        learning_rate=options.rate,
        lr_scheduler_type="cosine",
        seed=options.seed,
        use_cpu=True,
        bf16=False,  # slow on a CPU
        dataloader_pin_memory=False,
        save_strategy="no",
        logging_strategy="no",
        report_to="none",
    )
    texts = [{"prompt": f"{one.question}\nA:", "completion": f" {one.answer}\n"} for one in train]
    trl.SFTTrainer(
        model=module,
        args=settings,
        train_dataset=Dataset.from_list(texts),
        processing_class=tokenizer,
    ).train()
    module.eval()
    report("after", lora, module.params(), tokenizer, held_out)

    adapter = output / "adapter"
    shutil.rmtree(adapter, ignore_errors=True)  # of an earlier run
    ttfunc.save_peft(module.params(), adapter, adapter=lora)
    size = sum(file.stat().st_size for file in adapter.iterdir())
    print(f"one adapter, of {size / 2**20:.1f} MiB, in {adapter}")
    check_without_ttfunc(module, held_out[0].prompt_ids, folder, adapter)
    check_frozen(lora.unload(), before)


def renamed(tokenizer: Any, folder: Path) -> Any:
    """The tokenizer with other names for its spare tokens."""
    tokenizer.save_pretrained(folder)
    for file in folder.glob("*.json"):
        text = file.read_text()
        for spare, name in zip(SPARE, NEW_TOKENS, strict=True):
            text = text.replace(spare, name)
        file.write_text(text)
    return transformers.AutoTokenizer.from_pretrained(folder)


def check_without_ttfunc(
    module: ttfunc.TokenModule, prompt: list[int], folder: Path, adapter: Path
) -> None:
    """Let another process load the adapter, and compare."""
    x = torch.tensor([prompt])
    with torch.no_grad():
        logits = module(x).logits
    given = adapter.with_suffix(".pt")
    torch.save({"x": x, "logits": logits}, given)
    command = [sys.executable, "-W", "ignore", "-c", WITHOUT_TTFUNC, folder, adapter, given]
    subprocess.run(list(map(str, command)), check=True)  # noqa: S603


if __name__ == "__main__":
    main()
