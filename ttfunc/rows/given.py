"""What a caller gives for rows: the ids of tokens and a dtype, in every form, and checked."""

from __future__ import annotations

import contextlib
import itertools
import operator
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ttfunc.rows.token_ids import TokenIndices


def check_dtype(dtype: object) -> None:
    """Raise TypeError unless rows can have this dtype: a float, or None for the one they have."""
    if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        raise TypeError(
            f"dtype={dtype!r} cannot be trained: give a floating-point dtype such as torch.float32."
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
    is_bool = isinstance(token, (bool, np.bool_)) or getattr(token, "dtype", None) == torch.bool
    if not is_bool:
        with contextlib.suppress(TypeError):
            return operator.index(token)
    got = f"got {type(token).__name__}: {token!r}"
    way = "Convert them with int(...) if they are whole."
    if is_bool:
        got, way = f"got the boolean {token!r}", "For a mask, give mask.nonzero().ravel()."
    elif token is None:
        got = "and one is None, which a tokenizer gives for a token that it does not know"
        way = "Add the token first: tokenizer.add_tokens([...])."
    elif isinstance(token, str):
        got = f"got the text {token!r}"
        way = f"The tokenizer knows its id: tokenizer.convert_tokens_to_ids([{token!r}])."
    raise TypeError(f"token indices for {name!r} must be integers, {got}. {way}")


def shortened(ids: Sequence[int], most: int = 8) -> str:
    """Ids for a message: the first of them, and how many there are."""
    first = ", ".join(map(str, ids[:most]))
    return f"[{first}]" if len(ids) <= most else f"[{first}, … {len(ids)} in all]"
