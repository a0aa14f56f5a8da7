"""What comes of a cell: it is right, or refused for a reason that is known, or wrong."""

from __future__ import annotations

import re
import traceback
import warnings
from collections.abc import Callable
from typing import NamedTuple

import transformers

from tests.grid.cells import Cell
from tests.grid.trials import Trial
from tests.grid.ways import compare
from tests.helpers.oracle import snapshot


class Reason(NamedTuple):
    """Why a cell may be refused: what the message says, and in which cells it may say so."""

    words: str
    fits: Callable[[Cell], bool]


def _grows(cell: Cell) -> bool:
    return cell.rows != "old"


def _is_program(cell: Cell) -> bool:
    return cell.way.startswith(("program", "exported"))


REASONS = {
    "max_norm is not mixed": Reason(
        "max_norm.*cannot be mixed", lambda cell: (cell.family, cell.way) == ("max_norm", "mixed")
    ),
    "a module under several names is exported strictly": Reason(
        "shows other modules .* strict=True",
        lambda cell: cell.family == "encoder_decoder" and _is_program(cell),
    ),
    "max_norm is not sharded": Reason(
        "the patch is a copy of .*an engine has sharded|rescales it in place, which needs all",
        lambda cell: (cell.family, cell.way) == ("max_norm", "fsdp2"),
    ),
    "max_norm is in no program": Reason(
        "max_norm.*cannot be in a program",
        lambda cell: cell.family == "max_norm" and _is_program(cell),
    ),
    "a program has no new tokens": Reason(
        "a program has as many logits in each call",
        lambda cell: _grows(cell) and _is_program(cell),
    ),
    "the embedding is trained whole": Reason(
        "among modules_to_save|modules_to_save.default",
        lambda cell: cell.wrap == "saved_embedding",
    ),
    "the head is trained whole": Reason(
        "PEFT trains a whole copy of",
        lambda cell: cell.wrap == "saved_head" and _grows(cell),
    ),
    "only a lookup and a product are mixed": Reason(
        "reads its token matrix in a way that cannot be mixed",
        lambda cell: (
            cell.family in ("reading", "function", "by_frequency") and cell.way.endswith("mixed")
        ),
    ),
    # The same without a patch:
    "the model's own operation has no vmap": Reason(
        "Fused, but it does not have vmap support",
        lambda cell: (cell.family, cell.way) == ("function", "vmap"),
    ),
    "FSDP2 gathers for the forward of the root alone": Reason(
        "is not gathered here: its engine gathers it while|got mixed torch.Tensor and DTensor",
        lambda cell: (
            (cell.way, cell.look) == ("fsdp2", "generate")
            and (cell.wrap != "plain" or cell.family in ("bart", "t5"))
        ),
    ),
    "a hook of PEFT's has no vmap": Reason(
        r"requires_grad_\(\).*inside of a function being transformed",
        lambda cell: (
            (cell.family, cell.way) == ("encoder_decoder", "vmap") and cell.wrap != "plain"
        ),
    ),
}


def outcome(cell: Cell) -> str:
    """`right`, `refused: REASON` or `wrong: ERROR`."""
    transformers.utils.logging.disable_progress_bar()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trial = Trial(cell)
        before = snapshot(trial.model)
        try:
            trial.make_rows()
            compare(trial)
            found = "right"
        except Exception as error:
            found = refusal(cell, error) or f"wrong: {_shown(error)}"
        if cell.way != "fsdp2" and snapshot(trial.model) != before:
            found = f"wrong: the model was changed ({found})"
    return found


def refusal(cell: Cell, error: Exception) -> str | None:
    """The reason, if it is one that a cell like this may have."""
    text = " ".join([str(error), *getattr(error, "__notes__", [])])
    for name, reason in REASONS.items():
        if re.search(reason.words, text, re.DOTALL) and reason.fits(cell):
            return f"refused: {name}"
    return None


def _shown(error: Exception) -> str:
    """The error in a line, with the place in the library that raised it."""
    frames = traceback.extract_tb(error.__traceback__)
    places = [f"{frame.filename.split('/')[-1]}:{frame.lineno}" for frame in frames][-2:]
    text = " ".join(" ".join([str(error), *getattr(error, "__notes__", [])]).split())
    return f"{type(error).__name__}: {text[:200]} ({', '.join(places)})"
