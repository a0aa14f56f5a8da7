"""Putting rows on a model: what `load` and `load_peft` do once they have read a file."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from reprlib import repr as shown

import torch
from torch import Tensor, nn

from ttfunc.disk.tensors import check_rows, differing, prefix_errors
from ttfunc.engines.shards import rows_at, rows_or_zeros
from ttfunc.model.matrix import Matrix
from ttfunc.model.names import matrix_named
from ttfunc.model.origin import Origin, is_other, origin_of
from ttfunc.rows.deltas import RowSpec, TokenDeltas
from ttfunc.rows.given import token_indices
from ttfunc.rows.new_tokens import check_ends, next_token, numbered_on
from ttfunc.torch_private import outside_of_modes


def put_on(
    model: nn.Module,
    params: TokenDeltas,
    path: Path,
    *,
    after: TokenDeltas | None = None,
    requires_grad: bool = False,
) -> TokenDeltas:
    """The parameters from the file at `path`, on the matrices of `model` that have their names.

    Where a matrix has another height now, the ids decide. Raises and warns as `load` does.
    """
    deltas, specs = {}, {}
    messages, grown = [], []
    for name, spec in params.specs.items():
        matrix = _same_matrix(model, spec, path)
        if after is not None:
            spec = numbered_on(spec, after, matrix)
        spec = _at_height_of(matrix, spec, path, after)
        first, weight = matrix.names[0], matrix.tensor
        # The rows of a model on meta go to the CPU, so that they can be merged into real weights.
        device = torch.device("cpu") if weight.is_meta else weight.device
        with outside_of_modes():
            # The originals are on meta where they were taken from a model that is.
            originals = spec.originals if spec.originals.is_meta else spec.originals.to(device)
            deltas[first] = params.deltas[name].to(device).requires_grad_(requires_grad)
        origin = origin_of(model, matrix, spec.indices.ids).joined(spec.origin)
        specs[first] = loaded = replace(
            spec, names=matrix.names, originals=originals, matrix=matrix, origin=origin
        )
        messages.append(_other_base(matrix, loaded, spec.origin, path))
        if loaded.grown:
            grown.append((matrix, loaded.indices))
    if grown:
        with prefix_errors(f"{str(path)!r} has rows that are new tokens on this model"):
            check_ends(model, grown)
    for message in filter(None, messages):
        warnings.warn(message, stacklevel=3)
    return TokenDeltas(deltas, specs)


def on_matrix(matrix: Matrix, ids: Sequence[int], rows: Tensor, what: str) -> RowSpec:
    """The RowSpec of rows from a file that has no originals.

    The originals are the rows that the model has now, and zeros for tokens that it lacks.
    """
    weight, height = matrix.tensor, matrix.shape[0]
    first_new = min((token for token in ids if token >= height), default=None)
    indices = token_indices(ids, height, matrix.names[0], first_new)
    check_rows(rows, len(indices), matrix.shape[1], what)
    with outside_of_modes():
        originals = rows_or_zeros(weight, indices.ids_on(weight.device))
    return RowSpec(matrix.names, matrix.shape, indices, originals, matrix)


def _same_matrix(model: nn.Module, spec: RowSpec, path: Path) -> Matrix:
    """The matrix of `model` with these names. Raises ValueError for another width or other ties."""
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
    """The spec for a matrix that has more rows now, or fewer: a new token may be an old one now."""
    weight, height = matrix.tensor, matrix.shape[0]
    if height == spec.shape[0]:
        return spec
    with prefix_errors(f"{str(path)!r} was trained on a matrix of {spec.shape[0]} rows"):
        first_new = height if after is None else next_token(after, matrix)
        token_indices(spec.indices.ids, height, matrix.names[0], first_new)
    shape = (height, spec.shape[1])
    # For tokens that were new and that the matrix has now, its rows are the originals.
    old_now = [i for i, token in enumerate(spec.indices.ids) if spec.shape[0] <= token < height]
    if not old_now:
        return replace(spec, shape=shape)
    if weight.is_meta:
        raise ValueError(
            f"{str(path)!r} has new rows for {matrix.names[0]!r} at tokens that this model has "
            "now, and on meta these have no values to keep. Load onto the real model."
        )
    ids = [spec.indices.ids[i] for i in old_now]
    with outside_of_modes():
        originals = spec.originals.clone()
        found = rows_at(weight, torch.tensor(ids, device=weight.device))
        originals[old_now] = found.to(originals.device, originals.dtype)
    return replace(spec, shape=shape, originals=originals)


def _other_base(matrix: Matrix, spec: RowSpec, saved: Origin, path: Path) -> str:
    """The warning where a matrix is not the one that the rows were trained on; "" elsewhere."""
    weight, first = matrix.tensor, spec.names[0]
    if weight.is_meta:
        return ""
    ids, known = spec.known(spec.originals)
    found = rows_at(weight, ids.to(weight.device))
    if other := [ids.tolist()[i] for i in differing(found, known)]:
        return (
            f"the rows of tokens {shown(other)} in {first!r} are not those that {str(path)!r} was "
            "trained from: this is another model, or one resized and initialised anew. The trained "
            "rows replace them anyway; unmerge writes the file's originals."
        )
    if saved.sample is not None and is_other(weight, saved.sample, spec.indices.ids):
        return (
            f"{first!r} has other rows than in the model that {str(path)!r} was trained on "
            f"({saved.model}), also where nothing was trained: is this {spec.origin.model} another "
            "model of the same shape? Use the one that was trained."
        )
    return ""
