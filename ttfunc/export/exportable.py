"""A model with its rows and their token ids as inputs: one exported program for any adapters."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ttfunc.call.functional_call import functional_call
from ttfunc.call.patch_mixed import adapter_numbers
from ttfunc.export.checks import check_assignment, check_rows
from ttfunc.model.given import refuse_token_module
from ttfunc.model.matrix import Matrix, count_places, matrices_of
from ttfunc.model.targets import Targets, find_targets
from ttfunc.own_names import OwnNames
from ttfunc.rows.deltas import TokenDeltas, check_shapes, check_type
from ttfunc.weight.deferred import patched
from ttfunc.weight.rows import rows_at

# One tensor where the model has one matrix of rows, and one for each name where it has several.
Each: TypeAlias = "Tensor | Mapping[str, Tensor]"


class Exportable(nn.Module, metaclass=OwnNames):
    """A model that takes the rows and their token ids as its first inputs; for `torch.export`.

    >>> model = torch.nn.Embedding(100, 8)
    >>> program = ttfunc.Exportable(model)
    >>> params = ttfunc.init_deltas(model, [3], init=torch.ones(1, 8))
    >>> rows, ids = program.inputs(params, rows=2)
    >>> ids
    tensor([ 3, -1])
    >>> exported = torch.export.export(program, (rows, ids, torch.tensor([1, 2, 3])))
    >>> exported.module()(rows, ids, torch.tensor([3, 4, 5]))[0, 0]
    tensor(1.)

    `forward(rows, ids, *args, **kwargs)` calls the model with `(k, D)` rows in place of the rows of
    `(k,)` int64 ids, and returns what the model returns. k is the same in each call of an exported
    program. A row whose id is -1 is not used, whatever it holds. Where the model has several
    matrices of rows (an untied head has its own), rows and ids are dicts, by the first name of each
    matrix. The output is differentiable with respect to the rows; the model is not changed.

    With `assignment=True` each example of a batch has an adapter of its own: `forward(rows, ids,
    assignment, *args, **kwargs)` takes `(n, k, D)` rows, `(n, k)` ids and a `(B,)` int64
    assignment, the adapter of each example; -1 is the plain model. As in `patch_mixed`, the
    examples are the first dimension of the batch.

    >>> program = ttfunc.Exportable(model, assignment=True)
    >>> inputs = program.inputs([params], assignment=[0, -1], rows=2, adapters=4)
    >>> program(*inputs, torch.tensor([[3], [4]])).shape
    torch.Size([2, 1, 8])

    An exported or compiled program checks nothing: it does not use an id past the end; of two rows
    with one id it takes the first; an adapter that is not there is the plain model; ids of another
    dtype are read as raw bytes, and anything may happen. Call `check` first. A call that is not
    traced does so itself.

    Args:
        model: any module. It becomes the submodule `model`.
        targets: as for `init_deltas`. By default the input embedding, and what is tied to it.
        kwargs: keyword arguments that the model gets in each call, such as `{"use_cache": False}`.
        assignment: whether a call takes an adapter for each example.

    Raises:
        TypeError: a model that is no module, or a TokenModule.
        ValueError: a target that matches no module, or none for a model that has no one input
            embedding; a matrix of an Embedding with `max_norm`, which rescales itself.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        targets: Targets | None = None,
        kwargs: Mapping[str, Any] | None = None,
        assignment: bool = False,
    ) -> None:
        super().__init__()
        refuse_token_module(model, "Exportable(module.base)")
        if not isinstance(model, nn.Module):
            raise TypeError(
                f"model must be a torch.nn.Module, got {type(model).__name__}. The order is "
                "Exportable(model), and its inputs(params)."
            )
        if not isinstance(assignment, bool):
            raise TypeError(
                f"assignment={assignment!r}: give True for a program that takes an adapter for "
                "each example. Which ones is for each batch to say, in inputs(..., assignment=)."
            )
        self.model, self.kwargs, self.assignment = model, dict(kwargs or {}), assignment
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
        """Call the model with these rows, `args` and `kwargs`; wrong inputs raise as in `check`."""
        assignment, args = args[: self.assignment], args[self.assignment :]
        self.check(rows, ids, *assignment)
        weights: dict[str, Tensor] = {}
        for matrix, values, tokens in self._each(rows, ids):
            if self.assignment:
                values, tokens = _of_each_example(values, tokens, *assignment)
            base = matrix.current.detach()
            patch = rows_at(values.to(base.device), tokens.to(base.device), len(base))
            weight = patched(base, patch, matrix, dense=False)
            weights.update(dict.fromkeys(matrix.distinct, weight))
        return functional_call(self.model, weights, args, {**self.kwargs, **kwargs})

    def inputs(
        self,
        params: TokenDeltas | Sequence[TokenDeltas],
        *,
        rows: int,
        assignment: Iterable[int] | Tensor | None = None,
        adapters: int | None = None,
    ) -> Any:
        """Return the first inputs of the program: rows and ids of `params`, padded to a size.

        Args:
            params: TokenDeltas; with `assignment` a list of n of them. They are not changed.
            rows: how many rows each adapter is padded to.
            assignment: B integers, the adapter of each example; -1 is the plain model. Only for a
                program with `assignment=True`, which needs it.
            adapters: how many adapters there are after padding. By default as many as are given.

        Returns:
            `(rows, D)` deltas, detached, and `(rows,)` int64 ids, or a dict of each; with
            `assignment`, `(adapters, rows, D)`, `(adapters, rows)` and the `(B,)` int64 assignment.

        Raises:
            ValueError: more rows or adapters than that; rows of new tokens, or of a matrix that the
                program does not have; an assignment as in `patch_mixed`.
            IndexError: an assignment to an adapter that is not there.
            TypeError: anything but TokenDeltas; an `assignment` that the program does not take, or
                none where it needs one.
        """
        mixed = assignment is not None
        if mixed is not self.assignment or (adapters is not None and not mixed):
            raise TypeError(_OF_MIXED if self.assignment else _OF_ONE)
        given: list[Any] = [params]
        if mixed and not isinstance(params, TokenDeltas):
            given = list(params)
        count = len(given) if adapters is None else adapters
        if not 0 < len(given) <= count:
            raise ValueError(f"give 1 to {count} adapters (adapters={count}), got {len(given)}.")
        for one in given:
            self._check_params(one, rows)
        values, ids = {}, {}
        for name, matrix in self.matrices.items():
            each = zip(*(_padded(one, matrix, rows) for one in given), strict=True)
            some, tokens = map(torch.stack, each)
            values[name] = F.pad(some, (0, 0, 0, 0, 0, count - len(given)))
            ids[name] = F.pad(tokens, (0, 0, 0, count - len(given)), value=-1)
        if assignment is None:
            return tuple(_alone({n: one[0] for n, one in x.items()}) for x in (values, ids))
        numbers = adapter_numbers(assignment, len(given))
        plain = [-1 if number == len(given) else number for number in numbers]
        return _alone(values), _alone(ids), tokens.new_tensor(plain)

    def check(self, rows: Each, ids: Each, assignment: object = None) -> None:
        """Raise unless a program takes these inputs. An exported program itself checks nothing.

        Args:
            rows: `(k, D)` floats, or a dict of them by name; with `assignment=True`, `(n, k, D)`.
            ids: `(k,)` int64 token ids, or a dict; with `assignment=True`, `(n, k)`. -1 is no
                token.
            assignment: with `assignment=True`, the `(B,)` int64 adapters of the examples.

        Raises:
            TypeError: rows that are not floats; ids or an assignment that are not int64.
            ValueError: another shape; a repeated id.
            IndexError: an id that is no token; an adapter that is not there.
        """
        each = list(self._each(rows, ids))
        for matrix, values, tokens in each:
            check_rows(matrix, values, tokens, self.assignment)
        if self.assignment:
            check_assignment(assignment, {m.names[0]: one.shape[0] for m, _, one in each})
        elif assignment is not None:
            raise TypeError(_OF_ONE)

    def _each(self, rows: Each, ids: Each) -> Iterable[tuple[Matrix, Tensor, Tensor]]:
        """Each matrix with its rows and its ids."""
        return zip(self.matrices.values(), self._in_order(rows), self._in_order(ids), strict=True)

    def _in_order(self, given: Each) -> list[Tensor]:
        if len(self.matrices) == 1 and isinstance(given, Tensor):
            return [given]
        if not isinstance(given, Mapping) or given.keys() != self.matrices.keys():
            what = list(given) if isinstance(given, Mapping) else type(given).__name__
            raise TypeError(
                f"the program has rows of {list(self.matrices)}, got {what}: give a dict with a "
                "tensor for each of these names, or one tensor where there is one name."
            )
        return [given[name] for name in self.matrices]

    def __dir__(self) -> list[str]:
        names = {*super().__dir__(), *object.__dir__(self)}  # type: ignore[no-untyped-call]
        return sorted(names)

    def __reduce__(self) -> tuple[Any, ...]:
        # A copy of the model has matrices of its own, which only `__init__` finds.
        targets = [name.rpartition(".")[0] for name in self.matrices]
        make = functools.partial(
            type(self), targets=targets, kwargs=self.kwargs, assignment=self.assignment
        )
        return make, (self.model,), {"training": self.training}

    def _check_params(self, params: TokenDeltas, count: int) -> None:
        check_type(params)
        check_shapes(params)
        for name, matrix in self.matrices.items():
            tensors = [tensor for _, tensor in matrix.slots]
            if count_places(self.model, tensors) != len(tensors):
                raise ValueError(
                    f"{name!r} was tied or replaced since the program was made. Make "
                    f"{type(self).__name__}(model) anew."
                )
        shapes = {name: one.shape for one in self.matrices.values() for name in one.names}
        for key, spec in params.specs.items():
            if shapes.get(key) != spec.shape:
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


def _alone(each: dict[str, Tensor]) -> Any:
    """The tensor of a model with one matrix; a dict of several."""
    return each if len(each) > 1 else each.popitem()[1]


def _padded(params: TokenDeltas, matrix: Matrix, count: int) -> tuple[Tensor, Tensor]:
    """`(count, D)` rows of a matrix and their `(count,)` ids; -1 for the rows that are missing."""
    rows, ids = (
        matrix.tensor.new_zeros(0, matrix.shape[1]),
        matrix.tensor.new_zeros(0, dtype=torch.int64),
    )
    for key in params.deltas.keys() & set(matrix.names):
        rows, ids = params.deltas[key].detach(), params.token_indices[key]
    more = count - len(ids)
    return F.pad(rows, (0, 0, 0, more)), F.pad(ids.to(rows.device), (0, more), value=-1)


def _of_each_example(rows: Tensor, ids: Tensor, assignment: Tensor) -> tuple[Tensor, Tensor]:
    """The `(B, k, D)` rows and `(B, k)` ids of a batch; the plain model's are not used."""
    plain = (assignment < 0) | (assignment >= ids.shape[0])
    number = torch.where(plain, 0, assignment)
    tokens = torch.where(plain.unsqueeze(-1), -1, ids.index_select(0, number))
    return rows.index_select(0, number), tokens


_OF_ONE = (
    "the program has one adapter in each call. For one for each example make Exportable(model, "
    "assignment=True)."
)
_OF_MIXED = (
    "the program has an adapter for each example: inputs([a, b], assignment=[0, 1, -1], rows=...)."
)
