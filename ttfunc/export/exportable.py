"""A model with its rows and their token ids as inputs: one exported program for any adapters."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from ttfunc.call.functional_call import functional_call
from ttfunc.call.patch_mixed import adapter_numbers
from ttfunc.export.checks import check_assignment, check_rows_and_ids
from ttfunc.model.given import refuse_token_module
from ttfunc.model.matrix import count_places, matrices_of
from ttfunc.model.targets import Targets, find_targets
from ttfunc.own_names import OwnNames
from ttfunc.rows.deltas import TokenDeltas, check_type
from ttfunc.rows.shapes import check_shapes
from ttfunc.weight.any_rows import AnyRows
from ttfunc.weight.deferred import patched

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
        own = args[: self.assignment]
        self.check(rows, ids, *own)
        named_rows, named_ids = self._by_name(rows), self._by_name(ids)
        if self.assignment:
            named_rows, named_ids = _of_each_example(named_rows, named_ids, *own)
        return self._call(named_rows, named_ids, args[len(own) :], kwargs)

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
        several = mixed and not isinstance(params, TokenDeltas)
        given: list[Any] = list(params) if several else [params]
        count = len(given) if adapters is None else adapters
        if not 0 < len(given) <= count:
            raise ValueError(f"give 1 to {count} adapters (adapters={count}), got {len(given)}.")
        for one in given:
            self._check_params(one, rows)
        values, ids = [], []
        for name in self.matrices:
            both = [self._padded(one, name, rows) for one in given]
            more = count - len(given)
            together, each = (torch.stack(parts) for parts in zip(*both, strict=True))
            values.append(nn.functional.pad(together, (0, 0, 0, 0, 0, more)))
            ids.append(nn.functional.pad(each, (0, 0, 0, more), value=-1))
        if assignment is None:
            values, ids = [one[0] for one in values], [one[0] for one in ids]
            return self._in_one(values), self._in_one(ids)
        numbers = adapter_numbers(assignment, len(given))
        plain = [-1 if number == len(given) else number for number in numbers]
        return self._in_one(values), self._in_one(ids), ids[0].new_tensor(plain)

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
        named_rows, named_ids = self._by_name(rows), self._by_name(ids)
        for name, matrix in self.matrices.items():
            check_rows_and_ids(
                name, matrix.tensor.shape, named_rows[name], named_ids[name], self.assignment
            )
        if self.assignment:
            check_assignment(assignment, {name: one.shape[0] for name, one in named_ids.items()})
        elif assignment is not None:
            raise TypeError(_OF_ONE)

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

    def __dir__(self) -> list[str]:
        names = {*super().__dir__(), *object.__dir__(self)}  # type: ignore[no-untyped-call]
        return sorted(names)

    def __reduce__(self) -> tuple[Any, ...]:
        # A copy of the model has matrices of its own.
        targets = [name.rpartition(".")[0] for name in self.matrices]
        make = functools.partial(
            type(self), targets=targets, kwargs=self.kwargs, assignment=self.assignment
        )
        return make, (self.model,), {"training": self.training}

    def _check_params(self, params: TokenDeltas, count: int) -> None:
        check_type(params)
        check_shapes(params)
        for name, matrix in self.matrices.items():
            held = [tensor for _, tensor in matrix.slots]
            if count_places(self.model, held) != len(held):
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


_OF_ONE = (
    "the program has one adapter in each call. For one for each example make Exportable(model, "
    "assignment=True)."
)
_OF_MIXED = (
    "the program has an adapter for each example: inputs([a, b], assignment=[0, 1, -1], rows=...)."
)


def _of_each_example(
    rows: Mapping[str, Tensor], ids: Mapping[str, Tensor], assignment: Tensor
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The `(B, k, D)` rows and `(B, k)` ids of a batch; those of the plain model are not used."""
    count = next(iter(ids.values())).shape[0]
    plain = (assignment < 0) | (assignment >= count)
    number = torch.where(plain, 0, assignment)
    chosen = {name: one.index_select(0, number) for name, one in rows.items()}
    tokens = {
        name: torch.where(plain.unsqueeze(-1), -1, one.index_select(0, number))
        for name, one in ids.items()
    }
    return chosen, tokens
