"""Where the token matrices lie in a checkpoint on disk, and whether rows can be written there."""

from __future__ import annotations

import difflib
import functools
import warnings
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from reprlib import repr as shown

import torch
from torch import Tensor

from ttfunc.disk.atomic import open_file
from ttfunc.disk.folder import Checkpoint, says_tied
from ttfunc.disk.header import FLOATS, TensorEntry
from ttfunc.disk.tensors import check_rows, cpu_copy
from ttfunc.rows.deltas import RowSpec, TokenDeltas
from ttfunc.rows.given import token_indices
from ttfunc.rows.new_tokens import shape_in_weights
from ttfunc.rows.renaming import apart_among, renamed


@dataclass(frozen=True)
class StoredMatrix:
    """One token matrix in one file of a checkpoint, and the `(k, D)` rows to write there.

    key: the matrix's name in the parameters. name: its name in the file.
    """

    file: str
    key: str
    name: str
    entry: TensorEntry
    spec: RowSpec
    rows: Tensor

    @property
    def dtype(self) -> torch.dtype:
        """The dtype in the file."""
        return FLOATS[self.entry.dtype]

    def edits(self, rows: Tensor, height: int, moved: int = 0) -> Iterator[tuple[int, memoryview]]:
        """For each row of a token below `height`, the byte at which it begins, and its bytes.

        moved: how many bytes later the matrix begins in a new file.
        """
        stride = self.spec.shape[1] * self.dtype.itemsize
        for token, block in self._blocks(rows).items():
            if token < height:
                yield self.entry.start + moved + token * stride, block

    def tail(self, height: int) -> bytes:
        """The rows of tokens from `height` on, by their ids."""
        blocks = self._blocks(self.rows)
        return b"".join(blocks[token] for token in sorted(blocks) if token >= height)

    def _blocks(self, rows: Tensor) -> dict[int, memoryview]:
        """The bytes of each token's row."""
        # ttfunc.merge casts in the same way.
        blocks = rows.to(self.dtype).contiguous().view(torch.uint8).numpy()
        pairs = zip(self.spec.indices.ids, blocks, strict=True)
        return {token: memoryview(block) for token, block in pairs}


def under_names(
    checkpoint: Checkpoint, params: TokenDeltas, names: Mapping[str, str] | None
) -> TokenDeltas:
    """`params` with the names of the tensors in `checkpoint`: see `renamed`."""
    missing = functools.partial(_missing, checkpoint)
    return renamed(params, names, checkpoint.tensors, "the checkpoint", missing)


def find_matrices(
    checkpoint: Checkpoint,
    params: TokenDeltas,
    values: Mapping[str, Tensor],
    *,
    merged: bool = False,
) -> list[StoredMatrix]:
    """Every tensor of `checkpoint` that gets rows of `values`, which has them by `params`' keys.

    merged: whether the checkpoint has the new tokens of `params` already.

    Raises KeyError for a matrix that the checkpoint has under none of its names, and ValueError for
    one that has another shape or cannot take rows, and for ids that are not valid.
    """
    matrices: list[StoredMatrix] = []
    absent = []
    for key, spec in params.specs.items():
        token_indices(spec.indices.ids, spec.height, key)  # a spec may be made by hand
        rows = cpu_copy(values[key], f"the rows of {key!r}")
        check_rows(rows, len(spec.indices), spec.shape[1], f"the rows of {key!r}")
        found = [
            StoredMatrix(file, key, name, header[name], spec, rows)
            for file, header in checkpoint.headers.items()
            for name in spec.names
            if name in header
        ]
        if not found:
            if tied := _tied_instead(checkpoint, spec):
                raise KeyError(_missing(checkpoint, spec, *spec.names) + tied)
            absent.append(spec)
            continue
        _check_apart(checkpoint, found, merged)
        for stored in found:
            _check_matrix(checkpoint, stored, merged)
        matrices += found
    if absent:
        taken = {stored.name for stored in matrices}
        likely = _likely(checkpoint, absent, taken, merged)
        raise KeyError(
            f"{_missing(checkpoint, absent[0], *absent[0].names)} If a matrix has another name "
            f"there, give it in names (--name on the command line)"
            f"{f': names={likely!r}, by their likeness' if likely else ''}."
        )
    return matrices


def holds(root: Path, stored: StoredMatrix, rows: Tensor) -> bool:
    """Whether the file has these `rows`, cast to its dtype, up to the matrix's end."""
    with open_file(root / stored.file) as file:
        for offset, block in stored.edits(rows, stored.entry.shape[0]):
            file.seek(offset)
            if file.read(len(block)) != block:
                return False
    return True


def check_finite(stored: StoredMatrix) -> None:
    """Raise ValueError for rows that the file's dtype cannot hold: NaN, infinite or too large."""
    rows, limits = stored.rows.double(), torch.finfo(stored.dtype)
    # Some casts to float8 saturate. A value that only rounds to the largest number is fine.
    fits = rows.abs() <= limits.max * (1 + limits.eps / 2)
    fine = (fits & rows.to(stored.dtype).double().isfinite()).all(dim=1).tolist()
    if bad := [i for i, good in zip(stored.spec.indices.ids, fine, strict=True) if not good]:
        raise ValueError(
            f"the rows of tokens {shown(bad)} for {stored.name!r} are not finite in "
            f"{stored.dtype}, or beyond its {limits.max:g}. Train with a smaller step, or merge "
            "into a checkpoint of a wider dtype."
        )


# Names of tensors that a quantised matrix needs to be read have one of these in them.
_SCALES = ("scale", "zero", "absmax", "quant", "packed", "codebook", "scb", "g_idx")

_TIED = (
    "A checkpoint that stores the two as one tensor cannot have rows for one of them. Save the "
    "untied model, with tie_word_embeddings=False in its config, and merge that folder; or make "
    "the parameters with init_deltas on the tied model."
)


def _tied_instead(checkpoint: Checkpoint, spec: RowSpec) -> str:
    """The way out where a checkpoint stores another matrix of the model in place of this; or ""."""
    others = apart_among(spec, checkpoint.tensors)
    if others and not _of_shape(checkpoint, spec.shape, others):
        return f" It has {others}, another matrix when the rows were made. {_TIED}"
    return ""


def _check_apart(checkpoint: Checkpoint, found: Sequence[StoredMatrix], merged: bool) -> None:
    """Raise ValueError where the checkpoint stores another matrix of the model as the same tensor.

    A checkpoint stores tied matrices once, and its config says that they are tied.
    """
    key, spec, names = found[0].key, found[0].spec, [stored.name for stored in found]
    if others := apart_among(spec, names):
        raise ValueError(
            f"the rows of {key!r} cannot be written to {others} in {str(checkpoint.root)!r}, "
            f"another matrix when they were made. {_TIED}"
        )
    # The other matrix keeps the old shape where it has no new tokens.
    shapes = {found[0].entry.shape, spec.shape}
    if not spec.origin.apart or any(_of_shape(checkpoint, one, names) for one in shapes):
        return
    tied = says_tied(checkpoint)
    alone = (
        f"{str(checkpoint.root)!r} has {names} and not {list(spec.origin.apart)}, another matrix "
        "of this shape when the rows were made"
    )
    if tied:
        raise ValueError(f"{alone}: its config ties the two. {_TIED}")
    if tied is None and not merged:
        warnings.warn(
            f"{alone}, and its config does not say whether it ties the two (tie_word_embeddings). "
            "If it does, the rows of one are written for both.",
            stacklevel=4,
        )


def _of_shape(
    checkpoint: Checkpoint, shape: tuple[int, ...], without: Collection[str]
) -> list[str]:
    return [n for n, e in checkpoint.tensors.items() if e.shape == shape and n not in without]


def _check_matrix(checkpoint: Checkpoint, stored: StoredMatrix, merged: bool) -> None:
    entry, spec = stored.entry, stored.spec
    # Scales and the like, such as weight_scale_inv and weight.absmax, tell of a quantised matrix.
    # A tensor of the same shape is none. Beside a wide float, neither is one that the model itself
    # has, or one whose name does not say so.
    parts, narrow = (f"{stored.name}_", f"{stored.name}."), entry.dtype.startswith("F8")
    beside = [
        name
        for name, other in checkpoint.tensors.items()
        if name.startswith(parts)
        and other.shape != entry.shape
        and (narrow or name.removeprefix(stored.name) not in spec.origin.beside)
        and (narrow or any(part in name[len(stored.name) :].lower() for part in _SCALES))
    ]
    if narrow:
        module = stored.name.rpartition(".")[0]
        beside += [n for n in checkpoint.tensors if n.startswith(f"{module}.") and "scale" in n]
    if entry.dtype not in FLOATS or beside:
        scales = f", with {shown(beside)} beside it" if beside else ""
        raise ValueError(
            f"{stored.name!r} is {entry.dtype} in the checkpoint{scales}: float rows cannot be "
            "written to a quantised matrix. Merge the checkpoint that it was made from, and "
            "quantise the result."
        )
    shape = shape_in_weights(spec, merged)
    # A taller matrix, padded or resized, has a row for each token too.
    taller = len(entry.shape) == 2 and entry.shape[0] > max(spec.indices.ids)
    taller = taller and entry.shape[0] > shape[0] and entry.shape[1] == shape[1]
    if entry.shape != shape and not (taller and not (merged and spec.grown)):
        raise ValueError(
            f"{stored.name!r} has shape {entry.shape} in the checkpoint, and the parameters were "
            f"made for {shape}. Use the checkpoint of that model, with whole matrices (not "
            "split for tensor parallelism)."
        )


def _likely(
    checkpoint: Checkpoint, absent: Sequence[RowSpec], taken: Collection[str], merged: bool
) -> dict[str, str]:
    """The likely names of absent matrices in the checkpoint: those of their shapes that are alike.

    Empty where one of the matrices has no such name.
    """
    shapes = [shape_in_weights(spec, merged) for spec in absent]
    free = {n: e.shape for n, e in checkpoint.tensors.items() if n not in taken}
    pairs = [
        (difflib.SequenceMatcher(None, name, other).ratio(), name, other)
        for spec, shape in zip(absent, shapes, strict=True)
        for name in spec.names[:9]
        for other in _few(n for n, found in free.items() if found == shape)
    ]
    found: dict[str, str] = {}
    for _, name, other in sorted(pairs, reverse=True):
        if name not in found and other not in found.values():
            found[name] = other
    return found if all(found.keys() & set(spec.names) for spec in absent) else {}


def _few(names: Iterable[str]) -> list[str]:
    # A file may have any number of names, of any length, and comparing them takes time.
    return [name for name in names if len(name) <= 300][:1000]


def _missing(checkpoint: Checkpoint, spec: RowSpec, *names: str) -> str:
    shapes = {name: entry.shape for name, entry in checkpoint.tensors.items()}
    fitting = {spec.shape, (spec.height, spec.shape[1])}  # without the new tokens, and with them
    alike = [name for name, shape in shapes.items() if shape in fitting] or list(shapes)
    close = difflib.get_close_matches(names[0], _few(alike), n=5, cutoff=0.0)
    nearest = ", ".join(f"{name!r} {shapes[name]}" for name in close) or "no tensor at all"
    return (
        f"the checkpoint {str(checkpoint.root)!r} has none of the names {names} for the token "
        f"matrix {spec.shape}. Nearest: {nearest}. Is it of the same model?"
    )
