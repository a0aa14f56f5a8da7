"""The header of a safetensors file: what is accepted, beside the library's own verdict."""

from __future__ import annotations

import collections
import io
import itertools
import json
import random

import pytest
import safetensors
import safetensors.torch
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.helpers.headers import as_bytes, blob, entry
from ttfunc.disk.header import BITS, FLOATS, LONGEST, parse_header, read_header

ENTRY = '{"dtype":"F32","shape":[1],"data_offsets":[0,4]}'


def ours(raw: bytes) -> dict:
    return parse_header(io.BytesIO(raw), len(raw), "x.safetensors")


def layout(raw: bytes) -> dict:
    """By the library: dtype, shape and bytes of each tensor."""
    return {
        name: (tensor["dtype"], tuple(tensor["shape"]), bytes(tensor["data"]))
        for name, tensor in safetensors.deserialize(raw)
    }


def agree(raw: bytes) -> str:
    """What became of the file; fails where we accept what the library does not."""
    try:
        found = ours(raw)
    except ValueError:
        try:
            layout(raw)
        except safetensors.SafetensorError:
            return "refused by both"
        return "refused by us"
    known = {e.dtype for e in found.values()} <= BITS.keys()
    if not known:
        raw = as_bytes(raw, found)
        found = ours(raw)
    assert {n: (e.dtype, e.shape, raw[e.start : e.end]) for n, e in found.items()} == layout(raw)
    return "accepted" if known else "accepted, with a dtype of the future"


@pytest.mark.parametrize("dtype", FLOATS)
def test_the_layout_is_that_of_the_library(dtype: str, tmp_path):
    tensors = {
        "a": torch.randn(5, 3).to(FLOATS[dtype]),
        "é": torch.arange(4),
        "empty": torch.zeros(0, 2),
        "scalar": torch.tensor(True),
    }
    path = tmp_path / "x.safetensors"
    safetensors.torch.save_file(tensors, path, {"format": "pt"})
    assert read_header(path)["a"].dtype == dtype
    assert agree(path.read_bytes()) == "accepted"


@pytest.mark.parametrize("dtype", BITS)
def test_the_sizes_of_all_dtypes_are_those_of_the_library(dtype: str):
    assert agree(blob({"a": entry(dtype, (8,), (0, BITS[dtype]))}, bytes(BITS[dtype]))) == (
        "accepted"
    )


def test_a_dtype_of_the_future_is_kept_as_bytes():
    raw = blob({"a": entry(offsets=(0, 4)), "b": entry("F2", (9,), (4, 8))}, b"abcdefgh")
    assert ours(raw)["b"].dtype == "F2"
    assert agree(raw) == "accepted, with a dtype of the future"


BROKEN = {
    "nothing": (b"", "cannot hold a header"),
    "three bytes": (b"abc", "cannot hold a header"),
    "longer than the file": (blob("{}", b"", 3), "its 10 bytes cannot hold a header of 3"),
    "longer than memory": (blob("{}", b"", 2**63), "header of 9223372036854775808"),
    "over the limit": (blob(" " * LONGEST + "{}", b""), "at most 100000000"),
    "a pointer of LFS": (b"version https://git-lfs.github.com/spec/v1\n", "git lfs pull"),
    "no UTF-8": (blob(b'{"\xff":' + ENTRY.encode() + b"}"), "not UTF-8"),
    "half a surrogate pair": (blob('{"\\ud800":' + ENTRY + "}"), "not UTF-8"),
    "UTF-16": (blob("{}".encode("utf-16"), b""), "not UTF-8"),
    "no JSON": (blob('{"a":}', b""), "not JSON"),
    "NaN": (blob('{"a":NaN}', b""), "NaN is not JSON"),
    "more after it": (blob("{}{}", b""), "not JSON"),
    "a list": (blob("[]", b""), "it is a list, not an object"),
    "nested": (blob("[" * 90_000, b""), "nested too deeply"),
    "a name twice": (blob(f'{{"a":{ENTRY},"a":{ENTRY}}}'), "more than once"),
    "a field twice": (blob('{"a":' + ENTRY[:-1] + ',"dtype":"I32"}}'), "more than once"),
    "metadata that is no object": (blob({"__metadata__": []}, b""), "__metadata__ is not"),
    "metadata of numbers": (blob({"__metadata__": {"a": 1}}, b""), "__metadata__ is not"),
    "a tensor that is no object": (blob({"a": 1}, b""), "'a' needs dtype, shape and data_offsets"),
    "a field too few": (blob({"a": {"dtype": "F32"}}), "'a' needs dtype, shape"),
    "a field too many": (blob({"a": {**entry(), "x": 1}}), "and nothing else"),
    "a dtype that is a number": (blob({"a": entry(4)}), "dtype of 'a' is 4"),
    "a shape of floats": (blob({"a": entry(shape=(1.0,))}), r"has shape \[1.0\]"),
    "a shape of booleans": (blob({"a": entry(shape=(True,))}), r"has shape \[True\]"),
    "a negative shape": (blob({"a": entry(shape=(-1, -1))}), r"shape \[-1"),
    "minus zero": (blob('{"a":' + ENTRY.replace("[0", "[-0") + "}"), r"offsets \[-0"),
    "a shape that is a number": (
        blob({"a": {**entry(), "shape": 1}}),
        "has shape 1 and",
    ),
    "a huge shape": (blob({"a": entry(shape=(2**62, 2**62))}), "impossible shape"),
    "a huge shape of nothing": (blob({"a": entry(shape=(2**62, 4, 0), offsets=(0, 0))}, b""),
                                "impossible shape"),
    "a shape past 64 bits": (blob({"a": entry(shape=(2**64,))}), "has shape"),
    "a shape of a thousand digits": (blob('{"a":' + ENTRY.replace("[1]", f"[{'9' * 9999}]") + "}"),
                                     "Exceeds the limit"),
    "a very long shape": (blob({"a": entry(shape=[2**50] * 100_000)}), "impossible shape"),
    "a shape that lies": (blob({"a": entry(shape=(2,))}), "4 bytes, which are not those of shape"),
    "half a byte": (blob({"a": entry("F4", (7,), (0, 4))}), "not those of shape"),
    "one offset": (blob({"a": entry(offsets=(0,))}), "pair of offsets"),
    "three offsets": (blob({"a": entry(offsets=(0, 4, 4))}), "pair of offsets"),
    "offsets the wrong way round": (blob({"a": entry(offsets=(4, 0))}), "-4 bytes"),
    "the wrong way round, unknown": (blob({"a": entry("F2", offsets=(4, 0))}), "does not begin"),
    "an overlap": (
        blob({"a": entry(), "b": entry(offsets=(2, 6))}, b"abcdef"),
        "'b' does not begin where the tensor before it ends",
    ),
    "the same bytes twice": (blob({"a": entry(), "b": entry()}), "'b' does not begin"),
    "a hole": (blob({"a": entry(offsets=(2, 6))}, b"abcdef"), "'a' does not begin"),
    "past the end": (blob({"a": entry()}, b"abc"), "tensors end at byte 73, and the file at 72"),
    "nobody's bytes": (blob({"a": entry()}, b"abcde"), "end at byte 73, and the file at 74"),
}  # fmt: skip


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_header_is_refused_by_name(case: str):
    raw, reason = BROKEN[case]
    with pytest.raises(ValueError, match=f"(?s)^'x.safetensors' .*{reason}"):
        ours(raw)


def test_the_file_is_named(tmp_path):
    path = tmp_path / "model-00001.safetensors"
    path.write_bytes(b"GGUF" + bytes(100))
    with pytest.raises(ValueError, match="model-00001.safetensors' is no safetensors file"):
        read_header(path)


# A small file of everything: its data tell every two bytes of it apart.
SMALL = blob(
    {
        "__metadata__": {"format": "pt"},
        "a.weight": entry("F32", (3, 2), (0, 24)),
        "b": entry("BF16", (2, 1, 2), (24, 32)),
        "c": entry("I64", (), (32, 40)),
        "d": entry("F4", (0, 5), (40, 40)),
        "e": entry("U8", (8,), (40, 48)),
    },
    bytes(itertools.chain.from_iterable((i, 255 - i) for i in range(24))),
)
START = len(SMALL) - 48


def test_the_small_file_is_accepted():
    assert agree(SMALL) == "accepted"


def test_truncated_at_every_byte():
    for end in range(len(SMALL)):
        assert agree(SMALL[:end]).startswith("refused")


def test_every_byte_of_the_header_flipped():
    for position in range(START):
        for bit in range(8):
            raw = bytearray(SMALL)
            raw[position] ^= 1 << bit
            agree(bytes(raw))


PUNCTUATION = [bytes([byte]) for byte in b'{}[]",:0123456789-.eE \\\x00\xff']


def shuffled_bytes(random: random.Random) -> bytes:
    """Some bytes of the header changed, dropped, doubled, or written by chance."""
    raw = bytearray(SMALL)
    for _ in range(random.choice([1, 1, 1, 2, 3])):
        position = random.randrange(min(START, len(raw) or 1))
        match random.randrange(5):
            case 0:
                raw[position : position + 1] = bytes([random.randrange(256)])
            case 1:
                raw[position : position + 1] = random.choice(PUNCTUATION)
            case 2:
                del raw[position : position + random.randint(1, 6)]
            case 3:
                raw[position:position] = raw[position : position + random.randint(1, 40)]
            case 4:
                raw = raw[: random.randint(1, len(raw))]
    if random.random() < 0.8:  # else the length no longer fits, and that is all to be seen
        raw[:8] = max(0, len(raw) - 8 - 48).to_bytes(8, "little")
    return bytes(raw)


LIES = [
    -1, 0, 1, 2, 3, 5, 24, 32, 40, 48, 2**31, 2**32, 2**57, 2**63, 2**64, 1.0, True, None, "",
    [], {}, "F32", "F64", "BF16", "F4", "F6_E2M3", "U8", "I64", "F3", "__metadata__",
]  # fmt: skip


def lying_json(random: random.Random) -> bytes:
    """Good JSON that says something else."""
    length = int.from_bytes(SMALL[:8], "little")
    header = json.loads(SMALL[8 : 8 + length])
    for _ in range(random.randint(1, 2)):
        target = random.choice([name for name in header if isinstance(header[name], dict)])
        fields = header[target]
        match random.randrange(6):
            case 0:
                fields[random.choice([*fields, "x"])] = random.choice(LIES)
            case 1 | 2:
                lists = [v for v in fields.values() if isinstance(v, list)] or [[]]
                values = random.choice(lists)
                position = random.randint(0, len(values))  # one past the end is one more
                values[position : position + 1] = [random.choice(LIES)]
            case 3:
                del header[target]
            case 4:
                header[random.choice([*"abcde", "__metadata__", "z"])] = header.pop(target)
            case 5:
                other = random.choice([name for name in header if isinstance(header[name], dict)])
                header[target], header[other] = header[other], header[target]
        if not any(isinstance(value, dict) for value in header.values()):
            break
    data = SMALL[START:]
    return blob(header, data[: random.choice([48, 48, 48, 40, 24])])


@pytest.mark.parametrize("mutate", [shuffled_bytes, lying_json])
def test_fifty_thousand_mutated_headers_each(mutate):
    rng = random.Random(0)  # noqa: S311
    verdicts = collections.Counter(agree(mutate(rng)) for _ in range(50_000))
    print(dict(verdicts))
    # Each verdict is there, so the mutations are neither all fatal nor all harmless.
    assert verdicts["accepted"] > 200
    assert verdicts["refused by both"] > 20_000
    assert verdicts["refused by us"] < 10_000


sizes = st.integers(0, 6)
tensors = st.lists(
    st.tuples(st.sampled_from(sorted(BITS)), st.lists(sizes, max_size=3)), min_size=1, max_size=5
)


@given(tensors, st.randoms(use_true_random=False))
def test_any_file_of_the_library_is_read_as_it_reads_it(described, rng):
    header, position = {}, 0
    for number, (dtype, shape) in enumerate(described):
        bits = BITS[dtype]
        for size in shape:
            bits *= size
        if bits % 8:
            shape, bits = [*shape, 8], bits * 8
        header[f"t{number}"] = entry(dtype, shape, (position, position + bits // 8))
        position += bits // 8
    names = list(header)
    rng.shuffle(names)
    assert agree(blob({n: header[n] for n in names}, rng.randbytes(position))) == "accepted"
