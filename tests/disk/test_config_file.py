"""The sizes in a config: those that a model has told of, and where it has not, the usual ones."""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ttfunc.disk.config_file import kind_of, with_sizes
from ttfunc.model.sizes import Entry

SIZES = {23: 25}
BACK = {25: 23}
ENTRY = Entry(23, 25, 23)


def there(text: str, *paths: str, size: int = 23) -> str:
    return with_sizes(text, {path: Entry(size, size + 2, size) for path in paths}, SIZES)


def back(text: str, *paths: str, size: int = 23) -> str:
    return with_sizes(text, {path: Entry(size + 2, size, size) for path in paths}, BACK)


@pytest.mark.filterwarnings("ignore:config.json has the size .* in several places:UserWarning")
def test_the_usual_entries_of_the_old_size_get_the_new_one_and_keep_their_form():
    text = '{"vocab_size": 23,\n "n_words" :23}, "vocab_size":230, "size": 23'
    changed = '{"vocab_size": 25,\n "n_words" :25}, "vocab_size":230, "size": 23'
    assert with_sizes(text, None, SIZES) == changed
    assert with_sizes(changed, None, BACK) == text


def test_several_usual_entries_are_a_guess_and_told_of():
    text = '{"vocab_size": 23, "codec_config": {"vocab_size": 23}}'
    with pytest.warns(UserWarning, match=r"the size \[23\] in several places, .* put on the model"):
        with_sizes(text, None, SIZES)


def test_only_the_entries_that_the_model_told_of_change():
    text = '{"vocab_size": 23, "text_config": {"n": 1, "src": 23}, "audio": {"vocab_size": 23}}'
    changed = text.replace('"src": 23', '"src": 25')
    assert there(text, "text_config.src") == changed
    assert back(changed, "text_config.src") == text


def test_a_size_that_is_not_that_of_the_matrix():
    text = '{"vocab_size": 15}'
    assert there(text, "vocab_size", size=15) == '{"vocab_size": 17}'


def test_an_entry_that_is_left_out_is_added_and_taken_away_again():
    for text in (
        '{"text_config": {"model_type": "a"}, "n": 1}',
        '{"text_config": {}}',
        '{\n  "text_config": {\n    "model_type": "a"\n  }\n}\n',
    ):
        changed = there(text, "text_config.vocab_size")
        assert json.loads(changed)["text_config"]["vocab_size"] == 25
        assert back(changed, "text_config.vocab_size") == text
    # A second merge changes what the first one has added, and gives that back.
    path = "text_config.vocab_size"
    twice = with_sizes(changed, {path: Entry(25, 28, 23)}, {25: 28})
    assert json.loads(twice)["text_config"]["vocab_size"] == 28
    assert with_sizes(twice, {path: Entry(28, 25, 23)}, {28: 25}) == changed


def test_an_older_form_has_the_entries_of_the_text_outside():
    text = '{"vocab_size": 23, "vision_config": {"vocab_size": 23}}'
    changed = '{"vocab_size": 25, "vision_config": {"vocab_size": 23}}'
    assert there(text, "text_config.vocab_size") == changed
    assert back(changed, "text_config.vocab_size") == text
    both = there(text, "vocab_size", "text_config.vocab_size")
    assert json.loads(both) == json.loads(changed)
    assert back(both, "vocab_size", "text_config.vocab_size") == text


def test_a_config_of_another_model_is_refused():
    with pytest.raises(ValueError, match=r"has 30 for 'vocab_size', and the model .* has 23\. Use"):
        there('{"vocab_size": 30}', "vocab_size")
    with pytest.raises(ValueError, match=r"no place for 'text_config.vocab_size', .* Save that"):
        there('{"n": 30}', "text_config.vocab_size")


def test_the_kind_of_model():
    assert kind_of('{"model_type": "llama"}') == "llama"
    assert (kind_of("{}"), kind_of("[]"), kind_of("no")) == (None, None, None)


PATHS = ["vocab_size", "text_config.vocab_size", "text_config.src"]
NUMBERS = st.sampled_from([23, 25, 7])
CONFIGS = st.dictionaries(st.sampled_from(["vocab_size", "n_words", "src"]), NUMBERS)


@given(
    config=CONFIGS,
    inner=st.dictionaries(st.sampled_from(["text_config", "audio_config"]), CONFIGS),
    known=st.lists(st.sampled_from(PATHS), min_size=1, unique=True) | st.none(),
    indent=st.sampled_from([None, 0, 2]),
    colon=st.sampled_from([":", ": ", " : "]),
)
def test_every_byte_is_given_back(
    config: dict[str, int],
    inner: Mapping[str, dict[str, int]],
    known: list[str] | None,
    indent: int | None,
    colon: str,
):
    text = json.dumps({**config, **inner}, indent=indent, separators=(",", colon))
    entries = None if known is None else dict.fromkeys(known, ENTRY)
    returns = None if known is None else dict.fromkeys(known, ENTRY.back)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".* in several places")
        try:
            changed = with_sizes(text, entries, SIZES)
        except ValueError:
            return
        assert with_sizes(changed, returns, BACK) == text
    if known is not None:
        others = {(a, b) for a, part in inner.items() for b in part if f"{a}.{b}" not in known}
        found = json.loads(changed)
        assert all(found[a][b] == inner[a][b] for a, b in others)
