"""What a model said of its token matrices, as JSON in the metadata of a file of rows."""

from __future__ import annotations

from reprlib import repr as shown
from typing import Any

import torch

from ttfunc.disk.header import FLOATS
from ttfunc.model.origin import Origin, Sample


def as_json(origin: Origin) -> dict[str, Any]:
    """What is known of one matrix; what is not is left out."""
    found: dict[str, Any] = {}
    if origin.model:
        found["model"] = origin.model
    if origin.kind:
        found["kind"] = origin.kind
    if origin.sizes is not None:
        found |= {"sizes": dict(origin.sizes), "shared": list(origin.shared)}
    if origin.biases is not None:
        found["biases"] = list(origin.biases)
    if origin.saved_as:
        found["saved_as"] = dict(origin.saved_as)
    if origin.apart:
        found["apart"] = list(origin.apart)
    if origin.beside:
        found["beside"] = list(origin.beside)
    sample = origin.sample
    if sample is not None and (numbers := sample.numbers.cpu().double()).isfinite().all():
        (dtype,) = (name for name, one in FLOATS.items() if one == sample.numbers.dtype)
        found["sample"] = {
            "rows": list(sample.rows),
            "numbers": numbers.tolist(),
            "dtype": dtype,
        }
    return found


def from_json(given: object, count: int) -> list[Origin]:
    """The same from a file, of each of its matrices. Raises ValueError for anything else."""
    if given is None:  # a file of an earlier version
        return [Origin()] * count
    if not isinstance(given, list) or len(given) != count or not all(map(_is_origin, given)):
        raise ValueError(f"its metadata say of the model what no version does: {shown(given)}")
    return [_origin(entry) for entry in given]


def _origin(entry: dict[str, Any]) -> Origin:
    biases = entry.get("biases")
    return Origin(
        entry.get("model", ""),
        entry.get("kind", ""),
        entry.get("sizes"),
        tuple(entry.get("shared", ())),
        None if biases is None else tuple(biases),
        entry.get("saved_as", {}),
        _sample(entry["sample"]) if "sample" in entry else None,
        tuple(entry.get("apart", ())),
        tuple(entry.get("beside", ())),
    )


def _sample(entry: dict[str, Any]) -> Sample:
    numbers = torch.tensor(entry["numbers"], dtype=torch.float64)
    return Sample(tuple(entry["rows"]), numbers.to(FLOATS[entry["dtype"]]))


def _is_origin(entry: Any) -> bool:
    # Keys that are not known are of a later version, which says more.
    return isinstance(entry, dict) and all(
        fits(entry[key]) for key, fits in _FITS.items() if key in entry
    )


def _is_string(found: Any) -> bool:
    return isinstance(found, str)


def _are_strings(found: Any) -> bool:
    return isinstance(found, list) and all(isinstance(one, str) for one in found)


def _are_sizes(found: Any) -> bool:
    return isinstance(found, dict) and all(type(one) is int and one >= 0 for one in found.values())


def _are_renamed(found: Any) -> bool:
    return isinstance(found, dict) and _are_strings(list(found.values()))


def _is_sample(found: Any) -> bool:
    if not isinstance(found, dict) or found.get("dtype") not in FLOATS:
        return False
    rows, numbers = found.get("rows"), found.get("numbers")
    if not isinstance(rows, list) or not isinstance(numbers, list) or len(rows) != len(numbers):
        return False
    whole = all(type(row) is int and 0 <= row < 2**63 for row in rows)
    return whole and all(type(one) is float for one in numbers)


_FITS = {
    "model": _is_string,
    "kind": _is_string,
    "sizes": _are_sizes,
    "shared": _are_strings,
    "biases": _are_strings,
    "saved_as": _are_renamed,
    "sample": _is_sample,
    "apart": _are_strings,
    "beside": _are_strings,
}
