"""Starting a new token as the mean of the pieces that spelled it before it was a token."""

from __future__ import annotations

import contextlib
import reprlib
import warnings
from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

import torch
from torch import Tensor

from ttfunc.rows.given import shortened

Start: TypeAlias = Callable[[Tensor, Tensor], Tensor]

# Pieces depend on what stands before a word: SentencePiece puts a space before a text. Nearly all
# tokenizers keep a line break apart from what follows it; some drop it.
_BREAK = "\n"


def mean_of_pieces(before: Any, after: Any, *, left_space: bool | None = None) -> Start:
    """For `init=`: start each new token at the mean of the pieces that spelled it before.

    R[i] is the mean of W[p] over the pieces p of the text of token i. A token that was there before
    starts as it is.

    >>> class Letters:  # like a tokenizer of transformers, with a token for each letter
    ...     def encode(self, text, add_special_tokens=False):
    ...         return ["abc".index(letter) for letter in text.strip()]
    >>> model = torch.nn.Embedding(4, 8)
    >>> start = mean_of_pieces(Letters(), {4: "ab"})
    >>> params = ttfunc.init_deltas(model, [4], grow=True, init=start)
    >>> torch.equal(params.deltas["weight"][0], model.weight[[0, 1]].mean(0))
    True

    Args:
        before: the tokenizer without the new tokens. Its `encode(text, add_special_tokens=False)`
            gives ids, as in transformers. `tokenizer.add_tokens` changes a tokenizer, so make a
            `copy.deepcopy` first.
        after: the tokenizer with the new tokens. Or a mapping from token id to text, which need not
            be the token's own: `{49152: " calculator"}` for `<calc>`.
        left_space: whether the text begins with a space. By default it does if the token begins
            with one, or takes one in (`AddedToken(lstrip=True)`). Give True for a word that mostly
            follows a space: tokenizers split " word" and "word" differently.

    Returns:
        A function that takes the `(V, D)` matrix and the `(k,)` ids, and returns `(k, D)` rows, in
        float32 for a half-precision matrix. It changes nothing.

    Raises:
        TypeError: `before` or `after` is not a tokenizer.
        ValueError: one tokenizer is given as both, or the two are swapped. In `init_deltas`: a
            token that `after` does not have; one without text, or with pieces past the end of the
            matrix; or the unknown token, where `after` has no token that `before` has not.

    Warns:
        UserWarning: in `init_deltas`, the unknown token is among the ids.
    """
    if not callable(getattr(before, "encode", None)):
        raise TypeError(
            f"before is a {type(before).__name__} without encode: give the tokenizer as it was, "
            "without the new tokens, for example from AutoTokenizer.from_pretrained."
        )
    if before is after:
        raise ValueError(
            "before and after are the same tokenizer, which has the new tokens already: its pieces "
            "of each are the token itself. Make a copy.deepcopy of it before add_tokens."
        )
    if not isinstance(after, Mapping):
        if not callable(getattr(after, "decode", None)):
            raise TypeError(
                f"after is a {type(after).__name__} without decode: give the tokenizer that has "
                "the new tokens, or a mapping from token id to text."
            )
        _check_order(before, after)

    def start(base: Tensor, idx: Tensor) -> Tensor:
        if not isinstance(after, Mapping):
            _check_known(before, after, idx.tolist())
        rows = []
        for token in idx.tolist():
            text = _text(after, token, left_space)
            pieces = _after_a_break(before, text)
            _check(pieces, text, token, len(base))
            found = base.index_select(0, torch.tensor(pieces, device=base.device))
            rows.append(found.to(torch.promote_types(torch.float32, found.dtype)).mean(0))
        return torch.stack(rows)

    return start


def _only_in(one: Any, other: Any) -> set[str] | None:
    """The tokens that one tokenizer has and another has not; None where they do not tell."""
    if not all(callable(getattr(each, "get_vocab", None)) for each in (one, other)):
        return None
    only: set[str] = {*one.get_vocab()} - other.get_vocab().keys()
    return only


def _check_order(before: Any, after: Any) -> None:
    """Raise ValueError if it is the first tokenizer that has more tokens."""
    gone = _only_in(before, after)
    if gone and not _only_in(after, before):
        raise ValueError(
            f"before and after are swapped: before has {reprlib.repr(sorted(gone))}, which after "
            "does not have. The order is mean_of_pieces(before, after), and after is the tokenizer "
            "with the new tokens."
        )


def _check_known(before: Any, after: Any, ids: list[int]) -> None:
    """Raise ValueError for tokens that a tokenizer was not given; warn where that may be so."""
    for token in ids if callable(getattr(after, "convert_ids_to_tokens", None)) else ():
        piece = None
        with contextlib.suppress(IndexError):  # of SentencePiece
            piece = after.convert_ids_to_tokens(token)
        if piece is None:
            raise ValueError(
                f"after has no token {token}. Add it first, after.add_tokens([...]), or give a "
                f"text for it: after={{{token}: '...'}}."
            )
    unknown = getattr(after, "unk_token_id", None)
    if unknown is None or unknown not in ids:
        return
    what = (
        f"token {unknown} is {after.unk_token!r}, which the tokenizer after gives for every token "
        "that it does not know"
    )
    if _only_in(after, before) == set():
        raise ValueError(
            f"{what}, and it has no token that before does not have. Add the new tokens to it "
            "first: after.add_tokens([...])."
        )
    warnings.warn(
        f"{what}: was one of these not added? Its row is trained like the others.", stacklevel=6
    )


def _text(after: Any, token: int, left_space: bool | None) -> str:
    """What the token stands for in a text."""
    text: str
    if isinstance(after, Mapping):
        if token not in after:
            raise ValueError(
                f"there is no text for token {token}: after has {shortened(list(after))}. Give one "
                "for each id."
            )
        text, takes_space = after[token], False
        if not isinstance(text, str):
            raise TypeError(f"the text of token {token} is {text!r}: give a string.")
    else:
        added = getattr(after, "added_tokens_decoder", {}).get(token)
        takes_space = getattr(added, "lstrip", False)
        # A tokenizer decodes the first token of a text without the space that it begins with.
        text = getattr(added, "content", None) or _decoded_after_a_break(after, token)
    if left_space is False:
        return text.removeprefix(" ")
    return f" {text.removeprefix(' ')}" if left_space or takes_space else text


def _after_a_break(tokenizer: Any, text: str) -> list[int]:
    """The pieces of a text that starts a line."""
    lead = _encoded(tokenizer, _BREAK)
    pieces = _encoded(tokenizer, _BREAK + text)
    return pieces[len(lead) :] if pieces[: len(lead)] == lead else _encoded(tokenizer, text)


def _decoded_after_a_break(tokenizer: Any, token: int) -> str:
    lead = _encoded(tokenizer, _BREAK)
    before, both = tokenizer.decode(lead), tokenizer.decode([*lead, token])
    text: str = both.removeprefix(before) if both.startswith(before) else tokenizer.decode([token])
    return text


def _encoded(tokenizer: Any, text: str) -> list[int]:
    return list(tokenizer.encode(text, add_special_tokens=False))


def _check(pieces: list[int], text: str, token: int, height: int) -> None:
    """Raise ValueError unless all pieces are rows of a matrix of this height."""
    if not pieces:
        raise ValueError(
            f"before finds no pieces in {text!r}, the text of token {token}. Give another text: "
            f"after={{{token}: '...'}}."
        )
    if beyond := [piece for piece in pieces if piece >= height]:
        raise ValueError(
            f"before splits {text!r}, the text of token {token}, into {shortened(pieces)}, and the "
            f"matrix has no row for {shortened(beyond)} (0 to {height - 1}). Give a tokenizer that "
            "has none of the new tokens: a copy.deepcopy of it from before add_tokens."
        )
