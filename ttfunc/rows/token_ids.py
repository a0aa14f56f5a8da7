"""Which rows of a matrix are replaced: token ids, checked once, and the tables for a lookup."""

from __future__ import annotations

import contextlib
import functools
import itertools
import operator
import weakref
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ttfunc.torch_private import is_exported, is_traced, outside_of_modes


class IdTable(NamedTuple):
    """The ids on one device, int64: `(k,)` as given, and sorted.

    id_at, row_at: `(k + 1,)`, the id at each place among the sorted ones, and its row. The place
    after the last has no id, and -1 is there.
    """

    ids: Tensor
    sorted: Tensor
    id_at: Tensor
    row_at: Tensor


class TokenIndices:
    """Distinct token ids in the order given: row i of every `(k, D)` array belongs to id i.

    Compares and hashes by content. The tables for a device are made at its first use and kept, so
    that a training step moves nothing between devices. All that is derived from the ids is kept
    here.
    """

    def __init__(self, ids: tuple[int, ...]) -> None:
        self.ids = ids
        self._hash = hash(ids)
        self._rows = {token: row for row, token in enumerate(ids)}
        self._tables: dict[torch.device, IdTable] = {}
        self._stretches: dict[tuple[int, int], tuple[slice, ...]] = {}
        self._unions: dict[tuple[weakref.ref[TokenIndices], ...], TokenIndices] = {}

    def __len__(self) -> int:
        return len(self.ids)

    def __eq__(self, other: object) -> bool:
        return self is other or (isinstance(other, TokenIndices) and self.ids == other.ids)

    def __hash__(self) -> int:
        return self._hash

    def __reduce__(self) -> tuple[Any, ...]:
        return TokenIndices, (self.ids,)

    def row_of(self, token: int) -> int | None:
        """The row that belongs to `token`, or None."""
        return self._rows.get(token)

    def on(self, device: torch.device) -> IdTable:
        """The tables on `device`."""
        if is_traced():  # these are fake, or belong to the graph
            return self._made(device)
        if device not in self._tables:
            with outside_of_modes():
                self._tables[device] = self._made(device)
        return self._tables[device]

    def _made(self, device: torch.device) -> IdTable:
        ids = torch.tensor(self.ids, dtype=torch.int64, device="cpu")
        ordered, row = torch.sort(ids)
        nowhere = ids.new_tensor([-1])
        id_at, row_at = torch.cat((ordered, nowhere)), torch.cat((row, nowhere + 1))
        return IdTable(*(one.to(device) for one in (ids, ordered, id_at, row_at)))

    def find(self, tokens: Tensor, device: torch.device) -> tuple[Tensor, Tensor]:
        """Which of `(...)` tokens are among the ids, and the row of each (any row for others)."""
        if is_exported():
            return found_among(torch.tensor(self.ids, device=device), tokens)
        table = self.on(device)
        # Static shapes and no table of V entries: a binary search among the k ids.
        place = torch.searchsorted(table.sorted, tokens.to(table.sorted.dtype).contiguous())
        return table.id_at[place] == tokens, table.row_at[place]


def found_among(ids: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """`TokenIndices.find` by comparing each of `(...)` tokens to `(..., k)` ids.

    ONNX has no binary search. Negative ids are those of no token.
    """
    same = (tokens.unsqueeze(-1) == ids) & (ids >= 0)
    return same.any(-1), same.to(torch.int64).argmax(-1)


def gaps(indices: TokenIndices, size: int, most: int) -> tuple[slice, ...]:
    """The slices of `range(size)` between these ids, in order; empty if more than `most`."""
    known = indices._stretches
    if (size, most) not in known:
        bounds = (-1, *sorted(token for token in indices.ids if token < size), size)
        found = (slice(a + 1, b) for a, b in itertools.pairwise(bounds) if b - a > 1)
        first = tuple(itertools.islice(found, most + 1))
        known[size, most] = first if len(first) <= most else ()
    return known[size, most]


def union(each: tuple[TokenIndices, ...]) -> TokenIndices:
    """The ids of all, each once, in the order in which they first come."""
    first, others = each[0], each[1:]
    if not others:
        return first
    if torch.compiler.is_dynamo_compiling():  # Dynamo knows no weak references
        return _union(each)
    # The union is kept with the first, for as long as the others live: so joining at each training
    # step does not sort the ids again, nor move them to the device again.
    forget = functools.partial(_forget_dead, weakref.ref(first))
    key = tuple(weakref.ref(other, forget) for other in others)
    found = first._unions.get(key)
    if found is None:
        found = first._unions[key] = _union(each)
    return found


def _union(each: tuple[TokenIndices, ...]) -> TokenIndices:
    return TokenIndices(tuple(dict.fromkeys(token for one in each for token in one.ids)))


def _forget_dead(first: weakref.ref[TokenIndices], _: object) -> None:
    if (indices := first()) is not None:
        for key in list(indices._unions):  # in one step: another thread may change it
            if any(ref() is None for ref in key):
                indices._unions.pop(key, None)


def check_dtype(dtype: object) -> None:
    """Raise TypeError unless rows can have this dtype: a float, or None for the one they have."""
    if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        raise TypeError(
            f"dtype={dtype!r} cannot be trained: give a floating-point dtype such as torch.float32."
        )


def with_rows(matrix: Tensor, ids: Tensor, rows: Tensor, grown: int = 0) -> Tensor:
    """A copy of `(..., V, D)` with the `(..., k, D)` rows at `ids`; or of `(V,)` with `(k,)`.

    With `grown`, of which so many ids are past the end, the copy has `V + grown` rows.
    """
    with outside_of_autocast(matrix.device):
        if grown:
            matrix = F.pad(matrix, (0, 0, 0, grown))
        return matrix.index_copy(max(matrix.ndim - 2, 0), ids, rows)


@contextlib.contextmanager
def outside_of_autocast(device: torch.device) -> Iterator[None]:
    """Turn autocast off for a copy: it refuses the half-precision dtype that is not its own."""
    known = torch.amp.is_autocast_available(device.type)  # not on meta
    if known and torch.is_autocast_enabled(device.type):
        with torch.autocast(device.type, enabled=False):
            yield
    else:
        yield


def check_apart(a: TokenIndices, b: TokenIndices, name: str, height: int) -> None:
    """Raise ValueError where an id is in both, for a matrix of so many rows."""
    if both := sorted(a._rows.keys() & b._rows.keys()):
        way = "Train or merge the adapters one at a time, or drop the overlap."
        if both[0] >= height:
            way = (
                "If these are other new tokens, number them on from those of the first: "
                "load(path, model, after=first), or init_deltas(model, idx, after=first)."
            )
        raise ValueError(
            f"token indices {shortened(both)} are in more than one of the parameters for {name!r}: "
            f"each token has one row. {way}"
        )


def token_indices(
    idx: Iterable[Any], vocabulary: int, name: str, first_new: int | None = None
) -> TokenIndices:
    """Token ids for the matrix `name` of `vocabulary` rows, from any sequence of integers.

    Takes a list, tuple, range, tensor or numpy array of one dimension. Raises TypeError for what is
    not an integer, ValueError for an empty, repeated or negative one, IndexError past the end. Ids
    from `first_new` on, if it is given, are allowed: IndexError where one of them is left out.
    """
    ids = [_token_id(token, name) for token in _elements(idx, name)]
    if not ids:
        raise ValueError(f"no token indices for {name!r}: got {idx!r}. Give at least one token id.")
    if negative := [token for token in ids if token < 0]:
        raise ValueError(
            f"negative token indices {shortened(negative)} for {name!r}: a token id counts from 0. "
            f"For the last row write {vocabulary - 1}."
        )
    beyond = [token for token in ids if token >= vocabulary]
    if beyond and first_new is None:
        raise IndexError(
            f"token indices {shortened(beyond)} are past the end of {name!r}, which has "
            f"{vocabulary} rows (0 to {vocabulary - 1}). Resize the model first "
            "(model.resize_token_embeddings(len(tokenizer))), or use spare rows that it has. Or "
            "leave the model as it is: init_deltas(..., grow=True) takes new tokens."
        )
    if beyond and first_new is not None:
        _check_new(beyond, first_new, name)
    if len(set(ids)) != len(ids):
        repeated = sorted(token for token, times in Counter(ids).items() if times > 1)
        raise ValueError(
            f"token indices {shortened(repeated)} for {name!r} are given more than once: each "
            "token has one row. One that a tokenizer gives for several tokens is that of its "
            "unknown token: add the tokens first, tokenizer.add_tokens([...]). Else remove the "
            "copies: list(dict.fromkeys(idx)) keeps the order."
        )
    return TokenIndices(tuple(ids))


def _check_new(new: list[int], first_new: int, name: str) -> None:
    if early := [token for token in new if token < first_new]:
        raise IndexError(
            f"the new tokens {shortened(early)} for {name!r} are of the parameters that these are "
            f"to follow on. Give ids from {first_new} on."
        )
    given = set(new)
    # The first that is left out: an id from a file may be any number.
    first = next(token for token in itertools.count(first_new) if token not in given)
    if max(new) > first:
        raise IndexError(
            f"the new tokens {shortened(new)} for {name!r}, which has {first_new} rows, leave "
            f"out {first}: new rows follow on the last one. Give all ids from {first_new} on, or "
            "the TokenDeltas whose new tokens they follow on: init_deltas(..., after=first)."
        )


def _elements(idx: Iterable[Any], name: str) -> list[Any]:
    if isinstance(idx, (Tensor, np.ndarray)):
        if idx.ndim != 1:
            raise TypeError(
                f"token indices for {name!r} must have one dimension, got shape "
                f"{tuple(idx.shape)}. Flatten them: idx.ravel()."
            )
        if isinstance(idx, Tensor) and (idx.is_meta or idx.layout != torch.strided):
            raise TypeError(
                f"token indices for {name!r} must be a plain tensor with values, got one of layout "
                f"{idx.layout} on {idx.device}."
            )
        idx = idx.tolist()
    # A set has no order, and row i must belong to index i; a string iterates over characters.
    if isinstance(idx, (str, bytes, set, frozenset)) or not isinstance(idx, Iterable):
        raise TypeError(
            f"token indices for {name!r} must be a sequence of token ids such as [3, 7], got "
            f"{type(idx).__name__}: {idx!r}. A tokenizer gives them: "
            "tokenizer.convert_tokens_to_ids([...])."
        )
    return list(idx)


def _token_id(token: Any, name: str) -> int:
    if isinstance(token, (bool, np.bool_)) or (
        isinstance(token, Tensor) and token.dtype == torch.bool
    ):
        raise TypeError(
            f"token indices for {name!r} must be integers, got the boolean {token!r}. "
            "For a mask, give mask.nonzero().ravel()."
        )
    if token is None:
        raise TypeError(
            f"a token index for {name!r} is None: a tokenizer gives None for a token that it does "
            "not know. Add the token first: tokenizer.add_tokens([...])."
        )
    if isinstance(token, str):
        raise TypeError(
            f"token indices for {name!r} must be integers, got the text {token!r}. The tokenizer "
            f"knows its id: tokenizer.convert_tokens_to_ids([{token!r}])."
        )
    try:
        return operator.index(token)
    except TypeError:
        raise TypeError(
            f"token indices for {name!r} must be integers, got {type(token).__name__}: {token!r}. "
            "Convert them with int(...) if they are whole."
        ) from None


def shortened(ids: Sequence[int], most: int = 8) -> str:
    """Ids for a message: the first of them, and how many there are."""
    shown = ", ".join(map(str, ids[:most]))
    return f"[{shown}]" if len(ids) <= most else f"[{shown}, … {len(ids)} in all]"
