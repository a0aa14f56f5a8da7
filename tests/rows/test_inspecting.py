"""The table of trained rows: its numbers are those of the slow way, over the whole matrix."""

from __future__ import annotations

import re
from collections.abc import Sequence

import optree
import pytest
import torch
from torch import Tensor

from tests.helpers.models import D, V, make
from tests.helpers.rows import random_rows
from tests.helpers.tokenizers import KINDS, tokenizer
from ttfunc import TokenModule, init_deltas, stack, summary
from ttfunc.rows.inspecting import Base, Inspected, table, text_with

NAME = "embed_tokens.weight"


def slowly(
    ids: Sequence[int], rows: Tensor, starts: Tensor, matrix: Tensor
) -> list[tuple[str, ...]]:
    """For each token: moved, norm, of the median, nearest before and after, as `table` has them."""
    matrix, rows, starts = (one.detach().double() for one in (matrix, rows, starts))
    height = max(len(matrix), max(ids) + 1)
    found = []
    wholes = []
    for values in (starts, rows):
        whole = torch.zeros(height, matrix.shape[1], dtype=torch.float64)
        whole[: len(matrix)] = matrix
        whole[list(ids)] = values
        wholes.append(whole)
    for token, row, start in zip(ids, rows, starts, strict=True):
        near = []
        for whole in wholes:
            cosines = torch.nn.functional.cosine_similarity(whole[token], whole)
            order = [i for i in cosines.argsort(descending=True).tolist() if i != token]
            near.append(", ".join(f"{i} {cosines[i]:.2f}" for i in order[:3]))
        moved = float((row - start).norm() / start.norm())
        median = float(row.norm() / matrix.norm(dim=1).median())
        found.append((f"{moved:.2f}", f"{row.norm():.2f}", f"{median:.2f}", *near))
    return found


def cells(lines: Sequence[str]) -> list[tuple[str, ...]]:
    """What stands in the columns, without the header."""
    return [tuple(re.split(r"\s{2,}", line.strip())) for line in lines[1:]]


def shared(
    height: int = V, ids: Sequence[int] = (7, V + 1, 3, V), dtype: torch.dtype = torch.float32
) -> tuple[Inspected, Tensor]:
    noise = torch.Generator().manual_seed(0)
    matrix = torch.randn(height, D, generator=noise).to(dtype)
    rows = torch.randn(len(ids), D, generator=noise)
    starts = torch.randn(len(ids), D, generator=noise).to(dtype)
    for place, token in enumerate(ids):
        if token < height:
            starts[place] = matrix[token]
    return Inspected((NAME,), tuple(ids), rows, starts), matrix


@pytest.mark.parametrize(
    ("height", "ids"), [(V, (7, V + 1, 3, V)), (9000, (8999, 9000, 4095, 4096, 0)), (2, (0, 1))]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_the_numbers_are_those_of_the_whole_matrix(height, ids, dtype):
    given, matrix = shared(height, ids, dtype)
    found = cells(table(given, None, Base(matrix, height)))
    assert [int(row[0]) for row in found] == list(ids)
    assert [row[1:] for row in found] == slowly(given.ids, given.rows, given.starts, matrix)


def test_without_the_matrix_there_is_less_to_tell():
    given, matrix = shared()
    lines = table(given)
    assert lines[0].split() == ["id", "moved", "norm"]
    full = slowly(given.ids, given.rows, given.starts, matrix)
    assert [row[1:] for row in cells(lines)] == [row[:2] for row in full]


def test_columns_are_aligned_whatever_the_text():
    given, matrix = shared()
    texts = {7: "'a'", V + 1: "'トークン'", 3: "'a long one'"}
    lines = table(given, lambda token: texts.get(token, str(token)), Base(matrix, V))
    at = lines[0].index("nearest before")
    for line, (_, text, *_) in zip(lines[1:], cells(lines), strict=True):
        wide = sum(one > "\u3000" for one in text)  # takes two places each
        assert line[at - wide - 2 : at - wide] == "  "
        assert line[at - wide] != " "
    assert cells(lines)[1][1] == "'トークン'"


def test_rows_that_did_not_move_and_starts_that_are_not_known():
    given, matrix = shared(dtype=torch.bfloat16)
    rows = given.rows.clone()
    rows[0] = given.starts[0].float()
    rows[1] = given.starts[1].float() * (1 + 1e-4)  # it is the same in the matrix's dtype
    starts = given.starts.clone()
    starts[[2, 3]] = 0
    found = cells(table(given._replace(rows=rows, starts=starts)))
    assert [row[1] for row in found] == ["0", "0", "?", "?"]
    # With the matrix, that of token 3 is its row there; that of the new one is not known still.
    known = cells(table(given._replace(rows=rows, starts=starts), None, Base(matrix, V)))
    moved = (rows[2] - matrix[3].float()).norm() / matrix[3].float().norm()
    assert known[2][1] == f"{moved:.2f}"
    assert known[3][1] == known[3][4] == "?"
    assert known[3][5] != "?"


def test_rows_far_too_long_tiny_or_not_finite():
    given, matrix = shared()
    rows = given.rows.clone()
    rows[0], rows[1] = rows[0] * 1e6, torch.nan
    rows[2] = given.starts[2] * (1 + 1e-5)
    rows[3] = 0
    found = cells(table(given._replace(rows=rows), None, Base(matrix, V)))
    assert float(found[0][1]) > 1e5
    assert found[1][1:3] == ("nan", "nan")
    assert found[1][5] == "?"
    assert 5e-6 < float(found[2][1]) < 2e-5
    assert found[3][2:4] == ("0", "0")
    assert found[3][5] == "?"
    assert all(" nan" not in near for row in found for near in row[4:])


@pytest.mark.parametrize("kind", KINDS)
def test_the_text_of_a_token(kind: str):
    known = tokenizer(kind)
    text = text_with(known)
    known.add_tokens(["<new>"])
    (token,) = known.convert_tokens_to_ids(["<new>"])
    assert text(token) in ("'<new>'", "' <new>'")  # its normalizer may put a space before it
    assert text(token + 1) == "(no token)"
    pieces = known.encode("the row the", add_special_tokens=False)
    spelled = "".join(text(one).strip("'") for one in pieces)
    assert spelled.removeprefix(" ") == "the row the" or kind == "WordPiece"


def test_what_is_no_tokenizer():
    with pytest.raises(TypeError, match="tokenizer is a list without convert_ids_to_tokens"):
        text_with([])


@pytest.mark.parametrize("case", ["tied", "untied"])
def test_summary_with_a_tokenizer(case: str):
    model = make(case).requires_grad_(False)
    starts = random_rows(model, [V, 7], grow=True)
    params = optree.tree_map(lambda row: row + 1, starts)
    found = summary(model, params, tokenizer=tokenizer("byte-level BPE"))
    assert found.rows.keys() == params.deltas.keys()
    for name, lines in found.rows.items():
        originals = params.originals[name]
        matrix = model.get_parameter(name)
        slow = slowly([V, 7], params.deltas[name], originals, matrix)
        for row, expected in zip(cells(lines.splitlines()), slow, strict=True):
            assert row[2:5] == expected[:3]
            assert re.findall(r"-?\d\.\d\d", row[5]) == re.findall(r"-?\d\.\d\d", expected[3])
    assert all(line in str(found) for line in found.rows.values())
    module = TokenModule(model, params)
    assert summary(module, tokenizer=tokenizer("byte-level BPE")).rows == found.rows
    assert summary(model, params).rows == {}
    # The lines are those without a tokenizer, with each table below its matrix.
    plain, lines = str(summary(model, params)).splitlines(), str(found).splitlines()
    assert [line for line in lines if not line.startswith("  ")] == plain
    assert [lines.index(line) for line in plain] == [4 * i for i in range(len(plain))]


def test_summary_of_what_has_no_table():
    model, known = make("tied"), tokenizer("byte-level BPE")
    with pytest.raises(ValueError, match=r"shape \(2, 1, 8\), and \(1, 8\) is needed"):
        summary(model, stack([init_deltas(model, [7])] * 2), tokenizer=known)
    with pytest.raises(TypeError, match="tokenizer is a str without convert_ids_to_tokens"):
        summary(model, init_deltas(model, [7]), tokenizer="folder")
    meta = make("tied").to("meta")
    with pytest.raises(ValueError, match="'embed_tokens.weight' are on meta, without values"):
        summary(meta, init_deltas(meta, [7]), tokenizer=known)
