"""New tokens that start as the mean of their pieces, under the tokenizers that people have."""

from __future__ import annotations

import copy
import re

import pytest
import torch
from tokenizers import AddedToken
from torch import nn

from tests.helpers.models import make
from tests.helpers.tokenizers import KINDS, tokenizer
from ttfunc import init_deltas, mean_of_pieces

NEW = "tokenization"


def pieces_of(before, after, token, left_space=None):
    """The pieces of one token, as text: each row of the matrix is its own number."""
    numbers = torch.arange(float(len(before))).unsqueeze(1)
    seen = []

    class Watched(torch.Tensor):
        def index_select(self, dim, index):
            seen.extend(index.tolist())
            return super().index_select(dim, index)

    rows = mean_of_pieces(before, after, left_space=left_space)(
        numbers.as_subclass(Watched), torch.tensor([token])
    )
    assert rows.item() == pytest.approx(sum(seen) / len(seen))
    return before.convert_ids_to_tokens(seen)


def spelled(pieces):
    """What pieces say, with a space where one begins with a space."""
    return "".join(pieces).replace("▁", " ").replace("Ġ", " ").replace("##", "")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("space", ["", " "])
def test_the_pieces_are_those_of_the_text_with_its_own_left_space(kind, space):
    before, after = tokenizer(kind), tokenizer(kind)
    after.add_tokens([space + NEW])
    pieces = pieces_of(before, after, len(before))
    assert len(pieces) > 1
    # WordPiece drops all spaces; the others tell a word after a space from a bare one.
    assert spelled(pieces) == (NEW if kind == "WordPiece" else space + NEW)


@pytest.mark.parametrize("kind", KINDS)
def test_the_left_space_is_what_the_caller_says(kind):
    before, after = tokenizer(kind), tokenizer(kind)
    after.add_tokens([NEW, " " + NEW])
    for token in (len(before), len(before) + 1):
        bare = pieces_of(before, after, token, left_space=False)
        spaced = pieces_of(before, after, token, left_space=True)
        assert spelled(bare) == NEW
        assert spelled(spaced) == (NEW if kind == "WordPiece" else " " + NEW)


@pytest.mark.parametrize("kind", ["byte-level BPE", "SentencePiece"])
def test_a_token_that_takes_the_space_to_its_left_starts_as_the_word_after_one(kind):
    before, after = tokenizer(kind), tokenizer(kind)
    after.add_tokens([AddedToken(NEW, lstrip=True)])
    assert spelled(pieces_of(before, after, len(before))) == " " + NEW


@pytest.mark.parametrize("kind", KINDS)
def test_a_special_token_starts_as_its_characters(kind):
    before, after = tokenizer(kind), tokenizer(kind)
    after.add_tokens(["<note>"], special_tokens=True)
    pieces = pieces_of(before, after, len(before))
    assert pieces == before.tokenize("a\n<note>")[len(before.tokenize("a\n")) :]


@pytest.mark.parametrize("kind", KINDS)
def test_a_token_of_the_old_vocabulary_starts_as_it_is(kind):
    before = tokenizer(kind)
    after = copy.deepcopy(before)
    token = before.encode("one token")[-1]  # in the middle of a text, with its space
    assert pieces_of(before, after, token) == before.convert_ids_to_tokens([token])


def test_a_text_of_ones_own():
    before = tokenizer("byte-level BPE")
    assert spelled(pieces_of(before, {7: " the token"}, 7)) == " the token"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("model", ["tied", "untied"])
def test_both_ends_start_as_the_mean_of_their_own_rows(model, dtype):
    class Spelled:
        def encode(self, text, add_special_tokens=False):
            assert not add_special_tokens
            return [ord(letter) - ord("a") for letter in text if letter != "\n"]

    built = make(model).to(dtype)
    height = built.embed_tokens.num_embeddings
    after = {height: "abc", height + 1: "d"}
    params = init_deltas(
        built, [height + 1, height], grow=True, init=mean_of_pieces(Spelled(), after)
    )
    assert len(params.deltas) == (1 if model == "tied" else 2)
    for name, rows in params.deltas.items():
        weight = built.get_parameter(name).detach()
        wide = weight.to(rows.dtype)
        assert rows.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        torch.testing.assert_close(rows, torch.stack([wide[3], wide[:3].mean(0)]))


def test_what_is_refused_and_the_way_out():
    before = tokenizer("byte-level BPE")
    model, new = nn.Embedding(len(before), 4), len(before)

    def start(after, using=before):
        return init_deltas(model, [new], grow=True, init=mean_of_pieces(using, after))

    with pytest.raises(TypeError, match="before is a list without encode: give the tokenizer as"):
        start({new: "a"}, using=["a"])
    with pytest.raises(TypeError, match=re.escape("after is a list without decode")):
        start(["a"])
    with pytest.raises(ValueError, match="same tokenizer.*copy.deepcopy of it before add_tokens"):
        start(before)
    with pytest.raises(ValueError, match=rf"no text for token {new}: after has \[1, 2\]"):
        start({1: "a", 2: "b"})
    with pytest.raises(TypeError, match="text of token .* is 3: give a string"):
        start({new: 3})
    with pytest.raises(ValueError, match="finds no pieces in '', the text of token"):
        start({new: ""})
    has_it = copy.deepcopy(before)
    has_it.add_tokens([NEW])
    with pytest.raises(ValueError, match=rf"into \[{new}\], and the matrix has no row for \[{new}"):
        start(copy.deepcopy(has_it), using=has_it)


@pytest.mark.parametrize("kind", ["SentencePiece", "Metaspace", "WordPiece"])
def test_a_forgotten_token_is_told_of(kind):
    before = tokenizer(kind)
    after = copy.deepcopy(before)
    model = nn.Embedding(len(before), 4)
    idx = after.convert_tokens_to_ids(["<a>"])  # which was not added
    assert idx == [before.unk_token_id]
    match = "'<unk>', which the tokenizer after gives .* no token that before .*add_tokens"
    with pytest.raises(ValueError, match=match):
        init_deltas(model, idx, grow=True, init=mean_of_pieces(before, after))
    with pytest.raises(ValueError, match=r"more than once.*unknown token: add the tokens first"):
        init_deltas(model, after.convert_tokens_to_ids(["<a>", "<b>"]), grow=True)
    after.add_tokens(["<a>"])
    idx = after.convert_tokens_to_ids(["<a>", "<b>"])  # one of the two
    with pytest.warns(UserWarning, match="was one of these not added") as caught:
        init_deltas(model, idx, grow=True, init=mean_of_pieces(before, after))
    assert caught[0].filename == __file__
    init_deltas(model, idx[:1], grow=True, init=mean_of_pieces(before, after))


@pytest.mark.parametrize("kind", KINDS)
def test_swapped_tokenizers_and_tokens_of_neither_are_told_of(kind):
    before = tokenizer(kind)
    after = copy.deepcopy(before)
    after.add_tokens([NEW])
    with pytest.raises(ValueError, match=rf"are swapped: before has \['{NEW}'\], which after"):
        mean_of_pieces(after, before)
    model, idx = nn.Embedding(len(before), 4), [len(before), len(before) + 1]
    with pytest.raises(ValueError, match=rf"after has no token {len(before) + 1}\. Add it first"):
        init_deltas(model, idx, grow=True, init=mean_of_pieces(before, after))
