"""Putting the rows of a file on a model: under its names, and at the height that it has by now."""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import torch
from torch import nn

from ttfunc.disk.module_file import file_of, of_trainer
from ttfunc.disk.rows_file import read
from ttfunc.disk.tensors import other_base, path_of, prefix_errors, rows_device
from ttfunc.engines.shards import rows_at
from ttfunc.model.given import check_model
from ttfunc.model.matrix import Matrix
from ttfunc.model.names import advice, matrix_named, names_of
from ttfunc.model.origin import origin_of
from ttfunc.rows.deltas import RowSpec, TokenDeltas, warn_of_half
from ttfunc.rows.given import token_indices
from ttfunc.rows.new_tokens import check_after, check_ends, next_token, numbered_on
from ttfunc.rows.renaming import renamed
from ttfunc.torch_private import outside_of_modes


def load(
    path: str | os.PathLike[str],
    model: nn.Module,
    *,
    names: Mapping[str, str] | None = None,
    after: TokenDeltas | None = None,
    requires_grad: bool = False,
) -> TokenDeltas:
    """Read the rows that `save` wrote, and put them on `model`, which is not changed.

    It also reads what a trainer saved of a TokenModule: the folder of a checkpoint, or the
    `model.safetensors` in it. Such a file does not know the originals, for which `load` takes the
    rows that the model has now, nor what was tied: use the model that they were trained on. A
    warning names what was trained beside the rows, which is not loaded.

    Args:
        path: of the file, or of such a folder.
        model: with the matrices that the rows were trained on.
        names: a mapping from the name of a matrix in the file to its name in `model`, where the two
            differ (as with a wrapper around the model).
        after: TokenDeltas of the model with new tokens of someone else. The new tokens of the file
            get the ids that follow, in the same order, so that `patch(after, these)` gives the
            model both. `token_indices` has their ids.
        requires_grad: make the deltas leaves for `torch.optim`. `torch.func` does not need it.

    Returns:
        TokenDeltas with the deltas and originals of the file, bit for bit and in its dtypes, on the
        device of the matrix. (For a model on `meta` they are on the CPU, so that you can merge them
        into real weights.) If the matrix has another height than in training, the ids decide: an id
        past its end is a new token, and a new token that the matrix has by now replaces its row.

    Raises:
        KeyError: the model has no parameter with a name in the file, or in `names`.
        TypeError: `after` is not TokenDeltas; `model` is no module, or is a TokenModule.
        ValueError: the model has the matrix in another width, without room for the ids, or tied to
            other names than in the file; the rows are new tokens of one end of the model alone;
            `after` does not fit the model; or the file is damaged or of another format.
        FileNotFoundError: there is no file.

    Warns:
        UserWarning: the model's rows are not the originals of the file, which `unmerge` would
            write; or most of its other rows are not those of the model that was trained.
    """
    path = path_of(path, "load(path, model)")
    check_model(model, "load(path, model)", "load(path, module.base)")
    check_after(model, after)
    path = file_of(path)
    own = of_trainer(path, model, names)
    params = _called(read(path), model, names, path) if own is None else own
    if own is not None:
        warn_of_half(model, own)
    deltas, specs = {}, {}
    told, grown = [], []
    for name, spec in params.specs.items():
        matrix = _same_matrix(model, spec, path)
        if after is not None:
            spec = numbered_on(spec, after, matrix)
        spec = _at_height_of(matrix, spec, path, after)
        weight, first = matrix.tensor, matrix.names[0]
        with outside_of_modes():
            originals = spec.originals.to(rows_device(weight))
            delta = params.deltas[name].to(rows_device(weight))
            deltas[first] = delta.requires_grad_(requires_grad)
        origin = origin_of(model, matrix, spec.indices.ids).joined(spec.origin)
        specs[first] = loaded = replace(
            spec, names=matrix.names, originals=originals, matrix=matrix, origin=origin
        )
        told.append(other_base(matrix, loaded, spec.origin, path))
        grown += [(matrix, loaded.indices)] * bool(loaded.grown)
    if grown:
        with prefix_errors(f"{str(path)!r} has rows that are new tokens on this model"):
            check_ends(model, grown)
    for message in filter(None, told):
        warnings.warn(message, stacklevel=2)
    return TokenDeltas(deltas, specs)


def _called(
    params: TokenDeltas, model: nn.Module, names: Mapping[str, str] | None, path: Path
) -> TokenDeltas:
    """The parameters under the names of `model`."""
    held, known = names_of(model), [name for spec in params.specs.values() for name in spec.names]
    missing = f"this {type(model).__name__} has no such parameter."
    params = renamed(
        params, names, held, f"this {type(model).__name__}", lambda spec, other: missing
    )
    called = [name for spec in params.specs.values() for name in spec.names]
    absent = [name for name in called if name not in held]
    if absent and names is None and (told := advice(known, held)):
        raise KeyError(
            f"{type(model).__name__} has no parameter {absent[0]!r}, for which {str(path)!r} has "
            f"rows.{told} Or use the model that the rows were trained on, without a wrapper."
        )
    return params


def _same_matrix(model: nn.Module, spec: RowSpec, path: Path) -> Matrix:
    """The matrix of `model` that has the names, the shape and the ties of the file."""
    matrix = matrix_named(model, spec.names[0], path)
    shape = matrix.shape
    if shape[1:] != spec.shape[1:]:
        raise ValueError(
            f"{str(path)!r} has rows of a matrix {spec.names[0]!r} of shape {spec.shape}, but in "
            f"this {type(model).__name__} its shape is {shape}. Use the model that was trained."
        )
    if set(matrix.names) != set(spec.names):
        raise ValueError(
            f"{str(path)!r} was trained on a model where exactly {spec.names} were one matrix, but "
            f"in this {type(model).__name__} it is {matrix.names}. Tie the model as it was."
        )
    return matrix


def _at_height_of(matrix: Matrix, spec: RowSpec, path: Path, after: TokenDeltas | None) -> RowSpec:
    """The rows on a matrix that has more rows by now, or fewer: what was new may be there."""
    weight, height = matrix.tensor, matrix.shape[0]
    if height == spec.shape[0]:
        return spec
    with prefix_errors(f"{str(path)!r} was trained on a matrix of {spec.shape[0]} rows"):
        first_new = height if after is None else next_token(after, matrix)
        token_indices(spec.indices.ids, height, matrix.names[0], first_new)
    shape = (height, spec.shape[1])
    there = [i for i, token in enumerate(spec.indices.ids) if spec.shape[0] <= token < shape[0]]
    if not there:
        return replace(spec, shape=shape)
    if weight.is_meta:
        raise ValueError(
            f"{str(path)!r} has new rows for {matrix.names[0]!r} at tokens that this model has by "
            "now, and on meta there are no values to keep of them. Load onto the real model."
        )
    ids = [spec.indices.ids[i] for i in there]
    with outside_of_modes():
        originals = spec.originals.clone()
        found = rows_at(weight, torch.tensor(ids, device=weight.device))
        originals[there] = found.to(originals.device, originals.dtype)
    return replace(spec, shape=shape, originals=originals)
