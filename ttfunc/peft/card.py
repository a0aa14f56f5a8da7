"""The model card of an adapter: the README.md that the hub shows, with the metadata it reads."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

from ttfunc.peft.adapter import INDICES

README = "README.md"

# What may be the name of a repository on the hub; the hub refuses a card with a path instead.
_REPOSITORY = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?", re.ASCII)


def card_of(config: Mapping[str, Any]) -> bytes:
    """The card of the adapter that has this config: the same for the same config."""
    base = config.get("base_model_name_or_path")
    known = isinstance(base, str) and _REPOSITORY.fullmatch(base) is not None
    is_lora = config.get("peft_type") == "LORA"
    head = [f"base_model: {json.dumps(base)}"] if known else []
    tags = [*["lora"] * is_lora, "ttfunc", *[f"base_model:adapter:{base}"] * known]
    lines = ["---", *head, "library_name: peft", "tags:", *(f"- {json.dumps(tag)}" for tag in tags)]
    model = json.dumps(base) if known else "the folder or the name of the base model"
    text = _AS_LORA if is_lora and config.get(INDICES["LORA"]) is None else _ROWS
    return "\n".join([*lines, "---", "", text.format(model=model)]).encode()


_LOAD = """
```python
from peft import PeftModel
from transformers import AutoModelForCausalLM

base = AutoModelForCausalLM.from_pretrained({model})
model = PeftModel.from_pretrained(base, "the folder or the name of this adapter")
```
"""

_ROWS = f"""# Trained tokens

This adapter has trained rows of the base model's token matrices. `adapter_config.json` says of
which tokens.
{_LOAD}
`ttfunc.load_peft` reads the rows too.
"""

_AS_LORA = f"""# Trained tokens, as a LoRA

This adapter has trained rows of the base model's token matrices in the form of a LoRA. Keep it
beside the base. If the base ties its head to its embedding, `merge_and_unload` adds both parts to
the one matrix, and the result is wrong: merge the rows themselves (`ttfunc.merge_checkpoint`).
{_LOAD}"""
