"""Choosing the rows of a model, and the values that they start with."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import TypeAlias

import torch
from torch import Tensor, nn

from ttfunc.deltas import RowSpec, TokenDeltas
from ttfunc.indices import TokenIndices, token_indices
from ttfunc.model.beside import check_beside
from ttfunc.model.matrix import Matrix, matrix_of
from ttfunc.model.origin import origin_of
from ttfunc.model.owners import check_engine, shape_of
from ttfunc.model.shards import mean_of, of_first_rank, rows_at, spread_of, whole_of
from ttfunc.model.targets import Targets, both_ends, check_ties_kept, find_targets
from ttfunc.torch_private import version_of, warn_of_untested

Init: TypeAlias = "str | Tensor | Callable[[Tensor, Tensor], Tensor]"


def init_deltas(
    model: nn.Module,
    idx: Iterable[int] | Mapping[str, Iterable[int]],
    *,
    targets: Targets | None = None,
    init: Init = "base",
    dtype: torch.dtype | None = None,
    generator: torch.Generator | None = None,
    requires_grad: bool = False,
    grow: bool | TokenDeltas = False,
) -> TokenDeltas:
    """The rows `idx` of the model's token matrices, as a pytree of their own.

    R = W[S] for the token ids S, or as `init` says.

    >>> model = torch.nn.Sequential(torch.nn.Embedding(100, 8), torch.nn.Linear(8, 100))
    >>> params = ttfunc.init_deltas(model, [3, 7])
    >>> params
    TokenDeltas(0.weight: 2 of 100 rows)
    >>> params.deltas["0.weight"].shape, params.token_indices["0.weight"]
    (torch.Size([2, 8]), tensor([3, 7]))

    Args:
        model: any module. It is not changed.
        idx: k token ids, or a mapping from target to its own ids (then without `targets`).
        targets: Embedding and Linear modules: a module name or the end of one, a compiled pattern,
            or a list of them. By default the input embedding. A matrix that is tied to a target, by
            identity or memory, is trained with it. A layer that PEFT has put around another means
            the one within.
        init: where the rows start. `"base"`: as they are, and new ones at the mean. `"mean"`: the
            mean of the matrix. `"normal"`: drawn with the mean and the standard deviation of each
            of its columns. A
            `(k, D)` tensor. Or a function of the `(V, D)` matrix and the `(k,)` ids that returns
            `(k, D)` rows.
        dtype: of the deltas; by default the matrix's own, but float32 for a half-precision one.
        generator: for `"normal"`.
        requires_grad: makes the deltas leaves for `torch.optim`; `torch.func` does not need it.
        grow: allows new tokens. Their ids follow on the last one of the matrix: V, V+1, … without a
            gap. The patched matrix has one row more for each, and the model stays as it is. An
            untied head grows with the input embedding, also within a LoRA. Or TokenDeltas that have
            new tokens already: these ids follow on theirs, and `patch(first, these)` is the model
            with both.

    Returns:
        TokenDeltas with a `(k, D)` delta on the device of each distinct matrix.

    Raises:
        TypeError, ValueError, IndexError: for ids that are not token ids, targets that are unknown
        or ambiguous, tied targets with different ids, an `init` of another shape, a `dtype` that
        is not a float, new tokens where the head or an adapter has no place for them.
    """
    warn_of_untested()
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}: {model!r}.")
    check_engine(model)
    if not isinstance(grow, (bool, TokenDeltas)):
        raise TypeError(
            f"grow is a {type(grow).__name__}: give True for new tokens, or the TokenDeltas that "
            "they follow on."
        )
    if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        raise TypeError(
            f"dtype={dtype!r} cannot be trained: give a floating-point dtype such as torch.float32."
        )
    deltas, specs = {}, {}
    for matrix, indices in _requests(model, idx, targets, grow):
        weight, name = matrix.tensor, matrix.names[0]
        originals = _originals(weight, indices)
        start = _start(init, weight, indices, originals, name, generator)
        delta = start.to(weight.device, dtype or _delta_dtype(weight.dtype), copy=True)
        deltas[name] = delta.requires_grad_(requires_grad)
        origin = origin_of(model, matrix, indices.ids)
        specs[name] = RowSpec(matrix.names, matrix.shape, indices, originals, matrix, origin)
    return TokenDeltas(deltas, specs)


def _originals(weight: Tensor, indices: TokenIndices) -> Tensor:
    """The rows as they are; zeros for new tokens."""
    ids, height = indices.on(weight.device).ids, shape_of(weight)[0]
    if max(indices.ids) < height:
        return rows_at(weight, ids)
    new = (ids >= height).unsqueeze(-1)
    return rows_at(weight, ids.clamp(max=height - 1)).masked_fill(new, 0)


def _requests(
    model: nn.Module,
    idx: Iterable[int] | Mapping[str, Iterable[int]],
    targets: Targets | None,
    grow: bool | TokenDeltas,
) -> list[tuple[Matrix, TokenIndices]]:
    """Each distinct matrix that is asked for, with its indices."""
    wanted = _wanted(model, idx, targets, grow)
    requests: dict[str, tuple[str, Matrix, TokenIndices]] = {}
    for target, module, ids in _each_module(wanted):
        weight = module.get_parameter("weight")
        check_ties_kept(model, target, module)
        matrix = matrix_of(model, weight)
        indices = token_indices(ids, matrix.shape[0], target, _first_new(grow, matrix))
        first, _, other = requests.setdefault(matrix.names[0], (target, matrix, indices))
        if other != indices:
            raise ValueError(
                f"targets {first!r} and {target!r} are tied (one matrix, {matrix.names}) and were "
                f"given different token indices, {other.ids} and {indices.ids}. Give them the same "
                "ones in the same order, or name only one of the two."
            )
        _warn_of_padding(target, module, indices)
    found = [(matrix, indices) for _, matrix, indices in requests.values()]
    if longer := [matrix for matrix, indices in found if max(indices.ids) >= matrix.shape[0]]:
        check_ends(model, found)
        for matrix in longer:
            check_beside(model, matrix)
    return found


def _wanted(
    model: nn.Module,
    idx: Iterable[int] | Mapping[str, Iterable[int]],
    targets: Targets | None,
    grow: bool | TokenDeltas,
) -> list[tuple[dict[str, nn.Module], Iterable[int]]]:
    """Groups of modules, each with its ids."""
    if not isinstance(idx, Mapping):
        idx = list(idx) if isinstance(idx, Iterator) else idx  # it may be read twice
        named = find_targets(model, targets)
        if grow is not False and targets is None and _has_new(model, named, idx, grow):
            named = both_ends(model, likely=True)
        return [(named, idx)]
    if targets is not None:
        raise ValueError(
            f"idx is a mapping with targets of its own, {list(idx)}, and targets={targets!r} "
            "is given too. Give one of the two."
        )
    if not idx:
        raise ValueError("no token indices: idx is an empty mapping. Name a target in it.")
    return [(find_targets(model, [key]), ids) for key, ids in idx.items()]


def _has_new(
    model: nn.Module,
    named: Mapping[str, nn.Module],
    idx: Iterable[int],
    grow: bool | TokenDeltas,
) -> bool:
    """Whether one of the ids is past the end of the one matrix."""
    ((name, module),) = named.items()
    matrix = matrix_of(model, module.get_parameter("weight"))
    indices = token_indices(idx, matrix.shape[0], name, _first_new(grow, matrix))
    return max(indices.ids) >= matrix.shape[0]


def _first_new(grow: bool | TokenDeltas, matrix: Matrix) -> int | None:
    """The first id that a new token of the matrix may have, if it may have one."""
    if isinstance(grow, TokenDeltas):
        spec = grow.specs.get(matrix.names[0])
        return matrix.shape[0] if spec is None else spec.height
    return matrix.shape[0] if grow else None


def check_ends(model: nn.Module, requests: list[tuple[Matrix, TokenIndices]]) -> None:
    """Raise ValueError where one end of the model grows otherwise than the other."""
    sizes: dict[str, int] = {}
    for name, module in both_ends(model).items():
        weight = module.get_parameter("weight")
        sizes[name] = shape_of(weight)[0]
        for matrix, indices in requests:
            if any(weight is one for _, one in matrix.slots):
                sizes[name] = max(sizes[name], *(token + 1 for token in indices.ids))
    if len(set(sizes.values())) > 1:
        raise ValueError(
            f"with these rows the matrices of {type(model).__name__} would have {sizes} rows: a "
            f"new token needs one at both ends. Give the same new ids to both: "
            f"targets={list(sizes)}, or leave targets out."
        )


def _each_module(
    wanted: list[tuple[dict[str, nn.Module], Iterable[int]]],
) -> Iterator[tuple[str, nn.Module, Iterable[int]]]:
    for modules, ids in wanted:
        # The ids may come from an iterator, and each module reads them.
        ids = list(ids) if isinstance(ids, Iterator) else ids
        for name, module in modules.items():
            yield name, module, ids


def _warn_of_padding(target: str, module: nn.Module, indices: TokenIndices) -> None:
    padding = getattr(module, "padding_idx", None)
    if padding is not None and indices.row_of(padding) is not None:
        warnings.warn(
            f"token {padding} is the padding_idx of {target!r}: its row gets no gradient from the "
            "input side, so it trains only through a tied head, if there is one.",
            stacklevel=4,
        )


def _start(
    init: Init,
    weight: Tensor,
    indices: TokenIndices,
    originals: Tensor,
    name: str,
    generator: torch.Generator | None,
) -> Tensor:
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
    if max(indices.ids) < height:  # the mean reads the whole matrix
        return originals
    new = (indices.on(weight.device).ids >= height).unsqueeze(-1)
    mean = _mean(weight, indices)
    return torch.where(new, mean, originals.to(mean.dtype))


def _mean(weight: Tensor, indices: TokenIndices, *_: object) -> Tensor:
    return mean_of(weight, _delta_dtype(weight.dtype)).expand(len(indices), -1)


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
    start = init(base, indices.on(base.device).ids.clone())
    if version_of(base) != version:
        raise RuntimeError(
            f"the function init wrote to the matrix {name!r}, which is the model's own. Load the "
            "model again, and let init return new rows, for example base[idx].clone()."
        )
    return start


_INITS = 'Give "base", "mean", "normal", a (k, D) tensor or a function of (base, idx).'


def _delta_dtype(dtype: torch.dtype) -> torch.dtype:
    """As PEFT's autocast_adapter_dtype: small updates vanish in half precision."""
    return torch.float32 if dtype.itemsize < 4 else dtype
