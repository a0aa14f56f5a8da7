"""A model with its rows and their token ids as inputs: one exported program for any adapter."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from ttfunc.call import functional_call
from ttfunc.deltas import TokenDeltas, check_shapes, check_type
from ttfunc.indices import shortened
from ttfunc.model.given import refuse_token_module
from ttfunc.model.matrix import Matrix, count_slots, matrices_of
from ttfunc.model.targets import Targets, find_targets
from ttfunc.torch_private import is_exported, transforms_active
from ttfunc.weight.any_rows import AnyRows
from ttfunc.weight.deferred import patched

# One tensor where the model has one matrix of rows, and one for each name where it has several.
Each: TypeAlias = "Tensor | Mapping[str, Tensor]"


class Exportable(nn.Module):
    """A model whose inputs begin with the rows and their token ids; for `torch.export`.

    >>> model = torch.nn.Embedding(100, 8)
    >>> program = ttfunc.Exportable(model)
    >>> params = ttfunc.init_deltas(model, [3], init=torch.ones(1, 8))
    >>> rows, ids = program.inputs(params, rows=2)
    >>> ids
    tensor([ 3, -1])
    >>> exported = torch.export.export(program, (rows, ids, torch.tensor([1, 2, 3])))
    >>> exported.module()(rows, ids, torch.tensor([3, 4, 5]))[0, 0]
    tensor(1.)

    `forward(rows, ids, *args, **kwargs)` calls the model with `(k, D)` rows in place of those of
    `(k,)` int64 ids, and gives what it gives. k is the same in each call of an exported program. A
    row whose id is -1 is not used, whatever it holds. Where the model has several matrices of rows
    (an untied head of its own), rows and ids are dicts, by the first name of each matrix. The
    gradients of the rows are right; the model is not changed.

    A compiled program checks nothing. There an id past the end is not used either; of two rows with
    one id the first counts; ids of another dtype are read as bytes, and anything may happen. Call
    `check` before, which is also done by a call that is not traced.

    Args:
        model: any module. It is a submodule, under the name `model`.
        targets: as for `init_deltas`; by default the input embedding, and what is tied to it.
        kwargs: keyword arguments that the model gets in each call, such as `{"use_cache": False}`.

    Raises:
        TypeError, ValueError: a model that is no module, targets that are unknown or ambiguous, or
        a matrix of an Embedding with `max_norm`, which rescales itself.
    """

    _each_has_own = False

    def __init__(
        self,
        model: nn.Module,
        *,
        targets: Targets | None = None,
        kwargs: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__()
        refuse_token_module(model, "Exportable(module.base)")
        if not isinstance(model, nn.Module):
            raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}.")
        self.model, self.kwargs = model, dict(kwargs or {})
        modules = find_targets(model, targets).values()
        found = matrices_of(model, [module.get_parameter("weight") for module in modules])
        self.matrices = {matrix.names[0]: matrix for matrix in found}
        for name, matrix in self.matrices.items():
            if matrix.has_max_norm:
                raise ValueError(
                    f"{name!r} rescales itself as it is read (max_norm), and cannot be in a "
                    "program for any rows. Export the merged model."
                )

    def forward(self, rows: Each, ids: Each, *args: Any, **kwargs: Any) -> Any:
        """What the model gives for `args` and `kwargs` with these rows. Raises as `check`."""
        self.check(rows, ids)
        return self._call(self._by_name(rows), self._by_name(ids), args, kwargs)

    def inputs(self, params: TokenDeltas, *, rows: int) -> tuple[Any, Any]:
        """The rows and the ids of `params`, made up to so many: the first inputs of the program.

        Returns `(rows, D)` deltas, detached, and `(rows,)` int64 ids, or a dict of each. Raises
        ValueError where there are more rows than that, or the rows are new tokens or of a matrix
        that is not in the program; TypeError for anything but TokenDeltas.
        """
        self._check_params(params, rows)
        both = [self._padded(params, name, rows) for name in self.matrices]
        return self._in_one([row for row, _ in both]), self._in_one([one for _, one in both])

    def check(self, rows: Each, ids: Each) -> None:
        """Whether a program takes these: what a caller asks before, as the program does not.

        Raises TypeError for rows that are no floats and ids that are not int64, ValueError for
        other shapes and a repeated id, IndexError for an id that is no token.
        """
        named_rows, named_ids = self._by_name(rows), self._by_name(ids)
        for name, matrix in self.matrices.items():
            self._check_matrix(name, matrix, named_rows[name], named_ids[name])

    def _call(
        self,
        rows: Mapping[str, Tensor],
        ids: Mapping[str, Tensor],
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
    ) -> Any:
        weights: dict[str, Tensor] = {}
        for name, matrix in self.matrices.items():
            base = matrix.current.detach()
            patch = AnyRows(rows[name], ids[name])
            weight = patched(base, patch, matrix, dense=False)
            weights.update(dict.fromkeys(matrix.distinct, weight))
        return functional_call(self.model, weights, args, {**self.kwargs, **kwargs})

    def _by_name(self, given: Each) -> Mapping[str, Tensor]:
        if len(self.matrices) == 1 and isinstance(given, Tensor):
            return dict.fromkeys(self.matrices, given)
        if not isinstance(given, Mapping) or given.keys() != self.matrices.keys():
            what = list(given) if isinstance(given, Mapping) else type(given).__name__
            raise TypeError(
                f"the program has rows of {list(self.matrices)}, got {what}: give a dict with a "
                "tensor for each of these names, or one tensor where there is one name."
            )
        return given

    def _in_one(self, each: Sequence[Tensor]) -> Any:
        return each[0] if len(each) == 1 else dict(zip(self.matrices, each, strict=True))

    def _padded(self, params: TokenDeltas, name: str, count: int) -> tuple[Tensor, Tensor]:
        base = self.matrices[name].tensor
        key = next((key for key in params.specs if key in self.matrices[name].names), None)
        if key is None:
            rows, ids = base.new_zeros(0, base.shape[1]), torch.empty(0, dtype=torch.int64)
        else:
            rows, ids = params.deltas[key].detach(), params.token_indices[key]
        more = count - len(ids)
        ids = nn.functional.pad(ids.to(rows.device), (0, more), value=-1)
        return nn.functional.pad(rows, (0, 0, 0, more)), ids

    def __reduce__(self) -> tuple[Any, ...]:
        # A copy of the model has matrices of its own.
        targets = [name.rpartition(".")[0] for name in self.matrices]
        make = functools.partial(type(self), targets=targets, kwargs=self.kwargs)
        return make, (self.model,), {"training": self.training}

    def _check_params(self, params: TokenDeltas, count: int) -> None:
        check_type(params)
        check_shapes(params)
        for name, matrix in self.matrices.items():
            held = [tensor for _, tensor in matrix.slots]
            if count_slots(self.model, held) != len(held):
                raise ValueError(
                    f"{name!r} was tied or replaced since the program was made. Make "
                    f"{type(self).__name__}(model) anew."
                )
        known = {name: matrix for matrix in self.matrices.values() for name in matrix.names}
        for key, spec in params.specs.items():
            if key not in known or tuple(known[key].tensor.shape) != spec.shape:
                shapes = {name: tuple(m.tensor.shape) for name, m in self.matrices.items()}
                raise ValueError(
                    f"params have rows of {key!r} {spec.shape}, and the program has {shapes}. Make "
                    "the program with these targets, of the model that the rows belong to."
                )
            if spec.grown:
                raise ValueError(
                    f"params have {spec.grown} new tokens for {key!r}, and a program has as many "
                    "logits in each call. Give the model rows for them first: "
                    "model.resize_token_embeddings(...), and load the rows on it."
                )
            if not len(spec.indices) <= count <= spec.shape[0]:
                raise ValueError(
                    f"params have {len(spec.indices)} of the {spec.shape[0]} rows of {key!r}, and "
                    f"rows={count}. Make the program for as many as any adapter has."
                )

    def _check_matrix(self, name: str, matrix: Matrix, rows: object, ids: object) -> None:
        if not isinstance(rows, Tensor) or not rows.is_floating_point():
            raise TypeError(f"the rows of {name!r} must be a float tensor, got {kind_of(rows)}.")
        if not isinstance(ids, Tensor) or ids.dtype != torch.int64:
            raise TypeError(
                f"the ids of {name!r} must be an int64 tensor, got {kind_of(ids)}. Convert them: "
                "ids.to(torch.int64)."
            )
        height, width = matrix.tensor.shape
        ndim = 2 if self._each_has_own else 1
        empty = ids.ndim == ndim and any(size == 0 for size in ids.shape)
        fits = ids.ndim == ndim and rows.shape == (*ids.shape, width) and ids.shape[-1] <= height
        if empty or not fits:
            shapes = "(n, k) and (n, k, D)" if self._each_has_own else "(k,) and (k, D)"
            raise ValueError(
                f"the ids and rows of {name!r} must be {shapes}, with k from 1 to {height} and D "
                f"{width}; got {tuple(ids.shape)} and {tuple(rows.shape)}."
            )
        if has_values(ids):
            for one in ids.view(-1, ids.shape[-1]).tolist():
                _check_ids(name, one, height)


def kind_of(value: object) -> str:
    """What was given in place of a tensor, for a message."""
    return str(value.dtype) if isinstance(value, Tensor) else type(value).__name__


def has_values(tensor: Tensor) -> bool:
    """Whether its values can be read here: it is not traced, nor on meta."""
    unknown = is_exported() or transforms_active() or torch.compiler.is_dynamo_compiling()
    return not (unknown or tensor.is_meta)


def _check_ids(name: str, ids: list[int], height: int) -> None:
    used = [token for token in ids if token != -1]
    if beyond := [token for token in used if not 0 <= token < height]:
        raise IndexError(
            f"the ids {shortened(beyond)} are no tokens of {name!r}, which has {height} rows. Give "
            f"0 to {height - 1}, or -1 for a row that is not used."
        )
    if len(set(used)) != len(used):
        repeated = sorted({token for token in used if used.count(token) > 1})
        raise ValueError(
            f"the ids {shortened(repeated)} of {name!r} are given more than once: each token has "
            "one row. Give -1 for the others."
        )
