"""The axes of the grid, and which of their combinations mean something."""

from __future__ import annotations

import random
from collections.abc import Iterable
from dataclasses import dataclass, fields
from itertools import product

from tests.grid.subjects import FAMILIES, WRAPS

# Which tokens: of the vocabulary, past its end, or of both kinds.
ROWS = ("old", "new", "both")
# At which end of the model: of the same tokens at each, or of others. New ones are given no end.
ENDS = ("default", "input", "head", "each", "apart")
# The ways to call that cost milliseconds, those that compile, and an engine of two ranks.
QUICK = ("patch", "dense", "deferred", "mixed", "vmap", "module", "program", "program_mixed")
COMPILED = ("compiled", "exported", "exported_mixed")
WAYS = (*QUICK, *COMPILED, "fsdp2")
LOOKS = ("logits", "loss", "gradient", "state_dict", "folder", "generate")


@dataclass(frozen=True)
class Cell:
    """One combination. The seed draws the rest: values, ids, how many adapters, the text."""

    family: str
    wrap: str
    rows: str
    ends: str
    way: str
    look: str
    seed: int = 0

    def __str__(self) -> str:
        return "/".join(str(getattr(self, field.name)) for field in fields(self))

    @classmethod
    def parse(cls, text: str) -> Cell:
        """The cell that prints so."""
        *words, seed = text.split("/")
        return cls(*words, int(seed))

    def has_meaning(self) -> bool:
        family = FAMILIES[self.family]
        untied = not family.tied or self.wrap.startswith("saved")
        ends = self.ends == "default" or (self.rows == "old" and (untied or self.ends == "head"))
        whole = self.wrap == "saved_embedding" or (self.wrap == "saved_head" and self.rows != "old")
        if whole and (self.way, self.look) != ("patch", "logits"):
            return False  # refused as the rows are made, whatever is then called
        if self.family == "max_norm" and self.ends == "head" and untied:
            return False  # the embedding, with no row of it trained, rescales the model's own
        if self.family == "max_norm" and self.wrap == "lora_embedding":
            return False  # PEFT rescales the adapter in place, in any call
        if self.family == "storage_tied" and self.way == "fsdp2":
            return False  # FSDP2 makes two parameters of it, in a model without rows too
        looks = {
            "generate": family.generates
            and self.way not in ("vmap", "program", "program_mixed", *COMPILED),
            "state_dict": self.way in ("patch", "fsdp2"),
            # A folder has the base alone, and so no head that was trained whole.
            "folder": family.generates
            and (self.way == "patch" or (self.way == "module" and self.wrap == "plain"))
            and not self.wrap.startswith("saved"),
        }
        return ends and looks.get(self.look, True)


def kinds(ways: Iterable[str] = QUICK) -> list[Cell]:
    """Each combination of these ways that means something, in a fixed order."""
    every = product(FAMILIES, WRAPS, ROWS, ENDS, WAYS, LOOKS)
    chosen = set(ways)
    return [
        cell
        for cell in (Cell(*words) for words in every)
        if cell.way in chosen and cell.has_meaning()
    ]


def drawn(count: int, seed: int, ways: Iterable[str] = QUICK) -> list[Cell]:
    """So many cells; the same ones for the same seed, whatever the library does with them."""
    rng, each = random.Random(seed), kinds(ways)  # noqa: S311
    return [Cell(**{**vars(rng.choice(each)), "seed": rng.randrange(2**16)}) for _ in range(count)]
