"""Files of rows that are damaged or lie: refused, or read as they are."""

from __future__ import annotations

import json
import re
from pathlib import Path

import hypothesis
import pytest
import torch
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from tests.helpers.models import D, make
from tests.helpers.oracle import bits
from tests.helpers.rows import random_rows
from tests.helpers.rows_files import IDX, same
from ttfunc import TokenDeltas
from ttfunc.disk.load import load
from ttfunc.disk.rows_file import read, save

NAME, HEAD = "embed_tokens.weight", "lm_head.weight"


def refused(path: Path, match: str = "", error=ValueError) -> None:
    with pytest.raises(error, match=match) as caught:
        read(path)
    assert repr(str(path)) in str(caught.value)


def test_truncated_at_every_byte(saved: Path):
    whole = saved.read_bytes()
    for length in range(len(whole)):
        saved.write_bytes(whole[:length])
        refused(saved, "no safetensors file, or damaged")
    saved.write_bytes(whole + b"\0")
    refused(saved, "no safetensors file, or damaged")


def is_readable(path: Path, params: TokenDeltas) -> bool:
    """Whether the file can be read; if so, it has the same rows, whatever they are called."""
    found, refusal = None, ""
    try:
        found = read(path)
    except ValueError as error:
        refusal = str(error)
    if found is None:
        assert repr(str(path)) in refusal
        return False
    for kind in ("deltas", "token_indices", "originals"):
        a, b = ([bits(t) for t in getattr(each, kind).values()] for each in (found, params))
        assert a == b
    assert all(row.matrix is None and name == row.names[0] for name, row in found.specs.items())
    return True


def test_every_bit_of_the_header_flipped(saved: Path):
    params, whole = random_rows(make("tied"), IDX), saved.read_bytes()
    header = 8 + int.from_bytes(whole[:8], "little")
    # What the model said of its matrix is in words that any other words are as good as.
    told = whole.index(b"origins"), whole.index(b"}", whole.index(b"origins"))
    readable, other_words = [], 0
    for position in range(header):
        for bit in range(8):
            spoilt = bytearray(whole)
            spoilt[position] ^= 1 << bit
            saved.write_bytes(spoilt)
            if is_readable(saved, params):
                readable.append(saved.read_bytes()[8:header])
                other_words += told[0] <= position < told[1]
    assert len(readable) - other_words < header - (told[1] - told[0])  # of eight times as many
    model = make("tied")
    for text in readable:
        saved.write_bytes(whole[:8] + text + whole[header:])
        meant = json.loads(json.loads(text)["__metadata__"]["ttfunc"])
        (matrix,) = meant["matrices"]
        # The rows fit a matrix of more rows, and one of fewer that has their tokens.
        if matrix["names"] == [NAME, HEAD] and matrix["shape"][1] == D:
            assert same(load(saved, model), params)
        else:  # another name
            with pytest.raises((KeyError, ValueError), match="has no parameter|its shape is"):
                load(saved, model)


@hypothesis.given(st.data())
@hypothesis.settings(max_examples=300)
def test_headers_with_other_bytes_in_them(tmp_path_factory, data):
    path = tmp_path_factory.mktemp("headers") / "rows"
    params = random_rows(make("untied"), IDX, targets=["embed_tokens", "lm_head"])
    save(params, path)
    spoilt = bytearray(path.read_bytes())
    header = 8 + int.from_bytes(spoilt[:8], "little")
    start = data.draw(st.integers(0, header - 1))
    end = data.draw(st.integers(start, min(start + 20, header)))
    patch = data.draw(
        st.binary(max_size=20) | st.sampled_from([b'"', b"0", b"9" * 30, b"[", b"{}"])
    )
    spoilt[start:end] = patch
    if data.draw(st.booleans()):  # so that the length is right again
        spoilt[:8] = (header - 8 + len(patch) - (end - start)).to_bytes(8, "little")
    path.write_bytes(spoilt)
    is_readable(path, params)


def test_headers_longer_than_the_file_or_the_memory(saved: Path):
    whole = saved.read_bytes()
    for length in (len(whole), 10**8, 2**40, 2**63, 2**64 - 1):
        saved.write_bytes(length.to_bytes(8, "little") + whole[8:])
        refused(saved, "no safetensors file, or damaged")


def test_what_is_no_file_of_ttfunc(tmp_path):
    refused(tmp_path / "missing", "there is no file", FileNotFoundError)
    refused(tmp_path, "is no file. For a folder of a PEFT adapter use load_peft")
    for content in (b"", b"version https://git-lfs.github.com/spec/v1\n", b"\x80\x02}q\x00."):
        (tmp_path / "other").write_bytes(content)
        refused(tmp_path / "other", "no safetensors file, or damaged")
    save_file({"a": torch.zeros(2)}, tmp_path / "foreign", {"format": "pt"})
    refused(tmp_path / "foreign", "no metadata of ttfunc")


def matrix(names=(NAME, HEAD), shape=(23, D)) -> dict:
    return {"names": names, "shape": shape}


@pytest.mark.parametrize(
    ("own", "match"),
    [
        ("", "not JSON"),
        ("[]", "no format version"),
        ('{"format": true}', "no format version"),
        ('{"format": 0}', "no format version"),
        ('{"format": 3}', "format 3, and this ttfunc knows 2. Upgrade"),
        ('{"format": 1, "format": 1}', "more than once"),
        ("[" * 100_000, "nested too deeply"),
        ('{"format": ' + "9" * 5000 + "}", "cannot be loaded"),
        ({}, "names and a shape for each"),
        ({"matrices": []}, "names and a shape for each"),
        ({"matrices": {}}, "names and a shape for each"),
        ({"matrices": [3]}, "names and a shape for each"),
        ({"matrices": [matrix(names=[])]}, "names and a shape for each"),
        ({"matrices": [matrix(names=["", HEAD])]}, "names and a shape for each"),
        ({"matrices": [matrix(names=NAME)]}, "names and a shape for each"),
        ({"matrices": [matrix(names=[NAME, 3])]}, "names and a shape for each"),
        ({"matrices": [matrix(names=[NAME, NAME])]}, "are given twice"),
        ({"matrices": [matrix(), matrix()]}, "are given twice"),
        ({"matrices": [matrix(names=[HEAD, NAME])]}, r"missing, or unknown: .*'deltas/embed_tok"),
        ({"matrices": [matrix(), matrix(names=["a"])]}, r"missing, or unknown: \['deltas/a'"),
        ({"matrices": [matrix(names=["../x"])]}, r"missing, or unknown: \['deltas/../x'"),
        ({"matrices": [matrix(names=["\ud800"])]}, r"missing, or unknown"),
        ({"matrices": [matrix(shape=[23, 7])]}, r"shape \(3, 8\), and \(3, 7\) is needed"),
        ({"matrices": [matrix(shape=[23, D, 1])]}, "names and a shape for each"),
        ({"matrices": [matrix(shape=[23, -8])]}, "names and a shape for each"),
        ({"matrices": [matrix(shape=[23.0, 8])]}, "names and a shape for each"),
        ({"matrices": [matrix(shape=[True, 8])]}, "names and a shape for each"),
        ({"matrices": [matrix(shape=[11, D])]}, r"\[11\] are past the end of .*which has 11 rows"),
        ({"matrices": [{**matrix(), "more": 1}]}, "names and a shape for each"),
    ],
)
def test_metadata_that_lie(own, match: str, saved: Path):
    text = own if isinstance(own, str) else json.dumps({"format": 1, **own})
    save_file(load_file(saved), saved, {"ttfunc": text})
    refused(saved, match)


@pytest.mark.parametrize(
    ("part", "tensor", "match"),
    [
        ("deltas", None, r"missing, or unknown: \['deltas/embed_tokens.weight'\]"),
        ("more", torch.zeros(1), r"missing, or unknown: \['more/embed_tokens.weight'\]"),
        ("deltas", torch.zeros(3, D, dtype=torch.int64), "torch.int64, and a float dtype"),
        ("deltas", torch.zeros(3, D, dtype=torch.int32), "has dtype I32"),
        ("deltas", torch.zeros(3, D, dtype=torch.bool), "has dtype BOOL"),
        ("deltas", torch.zeros(3, D, dtype=torch.complex64), "has dtype C64"),
        ("deltas", torch.zeros(2, D), r"have shape \(2, 8\), and \(3, 8\) is needed"),
        ("deltas", torch.zeros(1, 3, D), r"have shape \(1, 3, 8\), and \(3, 8\) is needed"),
        ("deltas", torch.tensor(1.0), r"have shape \(\), and \(3, 8\) is needed"),
        ("originals", torch.zeros(3, 9), r"originals .* shape \(3, 9\), and \(3, 8\) is needed"),
        ("originals", torch.zeros(3, D, dtype=torch.int64), "torch.int64, and a float dtype"),
        ("token_indices", torch.tensor([7, 3, 7]), r"\[7\] .* more than once"),
        ("token_indices", torch.tensor([7, 3, -1]), r"negative token indices \[-1\]"),
        ("token_indices", torch.tensor([7, 5, 23]), r"\[23\] are past the end"),
        ("token_indices", torch.tensor([7, 3, 2**62]), "are past the end"),
        ("token_indices", torch.tensor([7, 3]), r"have shape \(3, 8\), and \(2, 8\) is needed"),
        ("token_indices", torch.tensor([[7, 3, 1]]), "must have one dimension"),
        ("token_indices", torch.tensor([], dtype=torch.int64), "no token indices"),
        ("token_indices", torch.tensor([7.0, 3.0, 1.0]), "are torch.float32, not int64"),
        ("token_indices", torch.tensor([7, 3, 1], dtype=torch.int32), "has dtype I32"),
    ],
)
def test_tensors_that_lie(part: str, tensor, match: str, saved: Path):
    with safe_open(saved, "pt") as file:
        metadata = file.metadata()
    tensors = load_file(saved)
    tensors.pop(f"{part}/{NAME}", None)
    save_file(tensors | ({} if tensor is None else {f"{part}/{NAME}": tensor}), saved, metadata)
    refused(saved, match)


def test_what_is_read_does_not_depend_on_the_file(saved: Path):
    params = random_rows(make("tied"), IDX)
    loaded = load(saved, make("tied"))
    saved.write_bytes(b"\0" * saved.stat().st_size)
    assert same(loaded, params)
    assert loaded.deltas[NAME].untyped_storage().nbytes() == loaded.deltas[NAME].nbytes
    assert re.match("TokenDeltas", repr(loaded))
