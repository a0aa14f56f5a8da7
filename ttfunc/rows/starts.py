"""The values that rows start with: `init=` of `init_deltas`."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TypeAlias

import torch
from torch import Tensor, nn

from ttfunc.engines.ownership import shape_of
from ttfunc.engines.shards import mean_of, of_first_rank, spread_of, whole_of
from ttfunc.model.matrix import Matrix
from ttfunc.model.targets import find_targets
from ttfunc.rows.token_ids import TokenIndices
from ttfunc.torch_private import version_of

Start: TypeAlias = "str | Tensor | Callable[[Tensor, Tensor], Tensor]"
Init: TypeAlias = "Start | Mapping[str, Start]"


def start_of_each(model: nn.Module, init: Init, matrices: Sequence[Matrix]) -> dict[str, Start]:
    """What `init` says for each matrix, by its first name.

    Raises ValueError for one tensor as the rows of several matrices, and for a mapping that does
    not have each of them once.
    """
    names = [matrix.names[0] for matrix in matrices]
    modules = [name.rpartition(".")[0] for name in names]
    if isinstance(init, Tensor) and len(names) > 1:
        way = ", ".join(f"{module!r}: ..." for module in modules)
        raise ValueError(
            f"init is one tensor, and rows of {len(names)} matrices are asked for, {names}, which "
            f"have nothing in common. Give each its own: init={{{way}}}."
        )
    if not isinstance(init, Mapping):
        return dict.fromkeys(names, init)
    each = f"Give one for each of {modules}."
    starts: dict[str, Start] = {}
    for target, start in init.items():
        weights = {f"{name}.weight".removeprefix(".") for name in find_targets(model, [target])}
        found = {matrix.names[0] for matrix in matrices if weights & set(matrix.names)}
        if not found or found & starts.keys():
            what = "it has an entry already" if found else "no rows are asked for"
            raise ValueError(f"init has an entry for {target!r}, of which {what}. {each}")
        starts.update(dict.fromkeys(found, start))
    if absent := [name for name in names if name not in starts]:
        raise ValueError(f"init has entries for {list(init)}, and none for {absent}. {each}")
    return starts


def start_rows(
    init: Start,
    matrix: Matrix,
    indices: TokenIndices,
    originals: Tensor,
    generator: torch.Generator | None,
) -> Tensor:
    """The `(k, D)` rows that the indices of a matrix start with."""
    weight, name = matrix.tensor, matrix.names[0]
    if isinstance(init, str):
        if init not in _STARTS:
            raise ValueError(f"init={init!r} is unknown. {_INITS}")
        return _STARTS[init](weight, indices, originals, generator)
    if not (isinstance(init, Tensor) or callable(init)):
        raise TypeError(f"init is a {type(init).__name__}. {_INITS}")
    start = init if isinstance(init, Tensor) else _called(init, weight, indices, name)
    if not isinstance(start, Tensor) or start.shape != originals.shape:
        got = tuple(start.shape) if isinstance(start, Tensor) else type(start).__name__
        raise ValueError(
            f"init gives {got} for {name!r}, and {tuple(originals.shape)} is needed: a row for "
            "each token index, in their order."
        )
    if start.is_complex():
        raise TypeError(f"init gives {start.dtype} for {name!r}: give real numbers.")
    return start.detach()


def _base(weight: Tensor, indices: TokenIndices, originals: Tensor, _: object) -> Tensor:
    height = shape_of(weight)[0]
    if indices.end <= height:  # the mean reads the whole matrix
        return originals
    new = (indices.ids_on(weight.device) >= height).unsqueeze(-1)
    mean = _mean(weight, indices)
    return torch.where(new, mean, originals.to(mean.dtype))


def _mean(weight: Tensor, indices: TokenIndices, *_: object) -> Tensor:
    return mean_of(weight, delta_dtype(weight.dtype)).expand(len(indices), -1)


def _normal(
    weight: Tensor, indices: TokenIndices, _: object, generator: torch.Generator | None
) -> Tensor:
    mean = _mean(weight, indices)
    noise = torch.randn(mean.shape, generator=generator, device=mean.device, dtype=mean.dtype)
    return mean + of_first_rank(noise, weight) * spread_of(weight, mean.dtype)


_STARTS: dict[str, Callable[..., Tensor]] = {"base": _base, "mean": _mean, "normal": _normal}


def _called(
    init: Callable[[Tensor, Tensor], Tensor], weight: Tensor, indices: TokenIndices, name: str
) -> Tensor:
    base = whole_of(weight)
    version = version_of(base)
    start = init(base, indices.ids_on(base.device).clone())
    if version_of(base) != version:
        raise RuntimeError(
            f"the function init wrote to the matrix {name!r}, which is the model's own. Load the "
            "model again, and let init return new rows, for example base[idx].clone()."
        )
    return start


_INITS = (
    'Give "base", "mean", "normal", a (k, D) tensor, a function of (base, idx), or a mapping from '
    "target to one of these."
)


def delta_dtype(dtype: torch.dtype) -> torch.dtype:
    """As PEFT's autocast_adapter_dtype: small updates vanish in half precision."""
    return torch.float32 if dtype.itemsize < 4 else dtype
