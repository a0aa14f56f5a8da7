"""What became of each trained row: how far it moved, how long it is, and what is near to it."""

from __future__ import annotations

import unicodedata
from collections.abc import Callable, Iterable, Sequence
from reprlib import Repr
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ttfunc.model.memory import same_bits

_BLOCK = 4096  # rows of a matrix that are read at a time
_NEAREST = 3
_BRIEF = Repr()
_BRIEF.maxstring = 18

UNKNOWN = "(no token)"  # the text of an id that a tokenizer lacks
LEGEND = (
    "moved: the distance from its start, by the norm of the start; ? where that is not known",
    "of median: the norm, by the median norm of the matrix's rows; nearest: by their cosine",
)


class Inspected(NamedTuple):
    """`(k, D)` rows of a matrix, and where they started; zeros where that is not known."""

    names: tuple[str, ...]
    ids: tuple[int, ...]
    rows: Tensor
    starts: Tensor


class Base(NamedTuple):
    """A matrix of `height` rows; slices of it are tensors."""

    rows: Any
    height: int

    def blocks(self) -> Iterable[tuple[Tensor, Tensor]]:
        """The ids and the rows, some at a time."""
        for start in range(0, self.height, _BLOCK):
            block = self.rows[start : min(start + _BLOCK, self.height)].detach().cpu()
            yield torch.arange(start, start + len(block), device=block.device), block


def text_with(tokenizer: Any) -> Callable[[int], str]:
    """A function from an id to its text, in quotes. Raises TypeError for what is no tokenizer."""
    tokenizer = getattr(tokenizer, "tokenizer", tokenizer)  # of a processor
    if not callable(getattr(tokenizer, "convert_ids_to_tokens", None)):
        raise TypeError(
            f"tokenizer is a {type(tokenizer).__name__} without convert_ids_to_tokens: give a "
            "tokenizer of transformers."
        )

    def text(token: int) -> str:
        try:
            piece = tokenizer.convert_ids_to_tokens(token)
        except IndexError:  # of SentencePiece
            piece = None
        # Some tokenizers give the unknown token for an id that they lack.
        unknown = getattr(tokenizer, "unk_token", None)
        if piece is None or (piece == unknown and token != tokenizer.unk_token_id):
            return UNKNOWN
        spelled = piece.replace("▁", " ") if "▁" in piece else tokenizer.decode([token])
        return _BRIEF.repr(piece if "\N{REPLACEMENT CHARACTER}" in spelled else spelled)

    return text


def table(
    given: Inspected, text: Callable[[int], str] | None = None, base: Base | None = None
) -> list[str]:
    """The lines of a table with a row for each token.

    text: of an id, for a column of its own. base: the matrix, for columns with the norm by the
    median of its rows, and with the nearest rows before training and after it.
    """
    ids, rows, starts = given.ids, given.rows.detach().cpu(), given.starts.detach().cpu()
    if base is not None:
        starts = _known_from(base, ids, starts)
    norms = rows.double().norm(dim=1)
    columns = {"id": [str(token) for token in ids]}
    if text is not None:
        columns["text"] = [text(token) for token in ids]
    columns["moved"] = list(map(_moved, rows, starts))
    columns["norm"] = list(map(_number, norms.tolist()))
    if base is not None:
        median, (before, after) = _beside_others(ids, (starts, rows), base)
        columns["of median"] = [_number(norm / median) for norm in norms.tolist()]
        columns["nearest before"] = before.in_words(text or str)
        columns["nearest after"] = after.in_words(text or str)
    return _aligned(columns)


def _known_from(base: Base, ids: Sequence[int], starts: Tensor) -> Tensor:
    """The starts, with the row of the matrix where one is not known."""
    starts = starts.clone()
    for row, token in enumerate(ids):
        if token < base.height and not starts[row].float().any():
            known = base.rows[token : token + 1].detach().cpu()
            starts = starts.to(torch.promote_types(starts.dtype, known.dtype))
            starts[row] = known[0]
    return starts


def _moved(row: Tensor, start: Tensor) -> str:
    if not start.float().any():
        return "?"
    if same_bits(row.to(start.dtype), start):  # a start is kept in the matrix's dtype
        return "0"
    row, start = row.double(), start.double()
    return _number(((row - start).norm() / start.norm()).item())


class _Nearest(NamedTuple):
    """For each of k rows of length 1 (or 0) the nearest among the rows seen so far."""

    unit: Tensor
    cosines: Tensor
    tokens: Tensor

    def among(self, ids: Tensor, tokens: Tensor, rows: Tensor) -> _Nearest:
        """The nearest with further rows, which are those of `tokens`; the k rows are at `ids`."""
        others = F.normalize(rows, dim=1)
        usable = (ids[:, None] != tokens) & others.any(1)  # not itself, and no row of zeros
        cosines = (self.unit @ others.T).nan_to_num(-torch.inf).masked_fill(~usable, -torch.inf)
        cosines = torch.cat([self.cosines, cosines], 1)
        tokens = torch.cat([self.tokens, tokens.expand(len(ids), -1)], 1)
        cosines, columns = cosines.topk(min(_NEAREST, cosines.shape[1]))
        return _Nearest(self.unit, cosines, tokens.gather(1, columns))

    def in_words(self, text: Callable[[int], str]) -> list[str]:
        """The nearest of each row, for a person; a question mark for a row of zeros."""
        return [
            ", ".join(
                f"{text(int(token))} {cosine:.2f}"
                for token, cosine in zip(tokens, cosines, strict=True)
                if row.any() and cosine > -torch.inf
            )
            or "?"
            for row, cosines, tokens in zip(*self, strict=True)
        ]


def _beside_others(
    ids: Sequence[int], each: Sequence[Tensor], base: Base
) -> tuple[float, list[_Nearest]]:
    """The median norm of a matrix's rows; and what is nearest to its rows at `ids`.

    The latter for each `(k, D)` of values that these rows had. The matrix is read once.
    """
    ours, lengths, found = torch.tensor(ids, device="cpu"), [], []
    for rows in each:
        empty = torch.empty(len(ids), 0, device="cpu")
        nearest = _Nearest(F.normalize(rows.float(), dim=1), empty, empty.long())
        for tokens, block in zip(ours.split(_BLOCK), rows.split(_BLOCK), strict=True):
            nearest = nearest.among(ours, tokens, block.float())
        found.append(nearest)
    for tokens, block in base.blocks():
        block = block.float()
        lengths.append(block.norm(dim=1))
        others = ~torch.isin(tokens, ours)
        found = [one.among(ours, tokens[others], block[others]) for one in found]
    return torch.cat(lengths).median().item(), found


def _number(number: float) -> str:
    return f"{number:.2f}" if 0.01 <= number < 10_000 else f"{number:.2g}"


def _aligned(columns: dict[str, list[str]]) -> list[str]:
    """The columns side by side: text from the left, and numbers from the right."""
    padded = []
    for name, column in columns.items():
        cells, left = [name, *column], name == "text" or name.startswith("nearest")
        width = max(map(_width, cells))
        spaces = [" " * (width - _width(cell)) for cell in cells]
        pairs = zip(cells, spaces, strict=True)
        padded.append([cell + space if left else space + cell for cell, space in pairs])
    return ["  ".join(row).rstrip() for row in zip(*padded, strict=True)]


def _width(text: str) -> int:
    """How many places it takes on a terminal."""
    return sum(1 + (unicodedata.east_asian_width(one) in "WF") for one in text)
