"""Reading rows from a file onto a model: under its names, and at the height that it has now."""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from ttfunc.disk.put_on import on_matrix, put_on
from ttfunc.disk.rows_file import file_of, is_of_module, read
from ttfunc.disk.tensors import opened, path_of, prefix_errors, tensor_of
from ttfunc.model.given import check_model
from ttfunc.model.held import names_of
from ttfunc.model.names import advice, check_names, matrix_named
from ttfunc.rows.deltas import TokenDeltas, warn_of_half
from ttfunc.rows.new_tokens import check_after
from ttfunc.rows.renaming import key, name_in, renamed


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
    params = _of_trainer(path, model, names)
    if params is None:
        params = _under_names(read(path), model, names, path)
    else:
        warn_of_half(model, params)
    return put_on(model, params, path, after=after, requires_grad=requires_grad)


def _under_names(
    params: TokenDeltas, model: nn.Module, names: Mapping[str, str] | None, path: Path
) -> TokenDeltas:
    """`params` with the names of the matrices in `model`."""
    held, owner = names_of(model), f"this {type(model).__name__}"
    found = renamed(params, names, held, owner, lambda *_: f"{owner} has no such parameter.")
    absent = [name for spec in found.specs.values() for name in spec.names if name not in held]
    in_file = [name for spec in params.specs.values() for name in spec.names]
    if absent and names is None and (hint := advice(in_file, held)):
        raise KeyError(
            f"{type(model).__name__} has no parameter {absent[0]!r}, for which {str(path)!r} has "
            f"rows.{hint} Or use the model that the rows were trained on, without a wrapper."
        )
    return found


def _of_trainer(
    path: Path, model: nn.Module, names: Mapping[str, str] | None
) -> TokenDeltas | None:
    """The rows of a TokenModule that a trainer saved; None where the file is another one.

    Such a file is a state dict, and lacks the names and the shape of a matrix and the originals:
    these come from the model. Raises as `load` does; warns of tensors that are not rows.
    """
    deltas, specs = {}, {}
    renamings = names or {}
    with opened(path) as file, prefix_errors(f"{str(path)!r} does not fit {type(model).__name__}"):
        if not is_of_module(file):
            return None
        if names is not None:
            check_names(names)
        keys = set(file.keys())
        in_file = [name for entry in sorted(keys) if (name := name_in(entry, "deltas")) is not None]
        if wrong := renamings.keys() - set(in_file):
            raise ValueError(f"names has {sorted(wrong)}, and the rows are for {in_file}")
        for name in in_file:
            delta, ids = _rows(file, keys, name)
            matrix = matrix_named(model, renamings.get(name, name), path)
            if matrix.tensor.is_meta:
                raise ValueError("on meta there are no rows as they were. Load onto the real model")
            spec = on_matrix(matrix, ids, delta, f"the rows {key('deltas', name)!r}")
            deltas[spec.names[0]], specs[spec.names[0]] = delta, spec
    if len(specs) < len(in_file):
        raise ValueError(
            f"{str(path)!r} has rows of {in_file}, which are one matrix in this "
            f"{type(model).__name__}. Use the model that was trained, which does not tie them."
        )
    if keys:
        warnings.warn(
            f"only the token rows of {str(path)!r} are loaded, and {len(keys)} other tensors are "
            f"not, such as {min(keys)!r}, which were trained beside them (a LoRA?). To load all: "
            "TokenModule(model, params, train_base=True).load_state_dict("
            "safetensors.torch.load_file(path)).",
            stacklevel=3,
        )
    return TokenDeltas(deltas, specs)


def _rows(file: Any, keys: set[str], name: str) -> tuple[Tensor, list[int]]:
    """The rows of a matrix and their ids, whose entries are removed from `keys`."""
    pair = [key(part, name) for part in ("deltas", "token_indices")]
    if missing := [one for one in pair if one not in keys]:
        raise ValueError(f"it has {pair[0]!r} and lacks {missing}")
    keys.difference_update(pair)
    delta, ids = (tensor_of(file, one) for one in pair)
    if ids.is_floating_point() or ids.ndim != 1:
        raise ValueError(f"{pair[1]!r} are {ids.dtype} of shape {tuple(ids.shape)}")
    return delta, ids.tolist()
