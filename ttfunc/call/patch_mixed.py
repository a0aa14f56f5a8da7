"""One batch in which each example has its own adapter."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from ttfunc.call.stale import matrix_of_rows
from ttfunc.engines.ownership import base_for_call
from ttfunc.rows.deltas import TokenDeltas
from ttfunc.rows.new_tokens import check_complete
from ttfunc.rows.several import aligned, no_adapters
from ttfunc.rows.token_ids import id_tensor, outside_of_autocast
from ttfunc.weight.deferred import patched
from ttfunc.weight.product import cast_like
from ttfunc.weight.rows import Rows

# Model types of transformers with the examples in the second dimension.
_BATCH_LAST = {"xlnet"}


def patch_mixed(
    adapters: Sequence[TokenDeltas], assignment: Iterable[int] | Tensor
) -> dict[str, Tensor]:
    """Return weights for one batch in which each example has an adapter of its own.

    For example b with adapter a: `E[b] = W_a[x[b]]` and `Y[b] = H[b] W_aᵀ`, where `W_a[S_a] = R_a`.

    >>> model = torch.nn.Embedding(100, 8)
    >>> adapters = [ttfunc.init_deltas(model, [3], init=torch.full((1, 8), i)) for i in (1.0, 2.0)]
    >>> x = torch.tensor([[3], [3], [4]])
    >>> weights = patch_mixed(adapters, [1, 0, -1])
    >>> ttfunc.functional_call(model, weights, x)[:2, 0, 0]
    tensor([2., 1.])

    The weights are differentiable with respect to the deltas of all adapters. They copy the rows,
    and a call refuses them as stale once the rows are written to. Neither the model nor an adapter
    is changed. The model must keep the examples in the first dimension of its tokens and hidden
    states, as the models of transformers do (except XLNet, which is refused).

    Args:
        adapters: n TokenDeltas of one model, each of any tokens; an empty list if all examples are
            the plain model's. New tokens must be the same in each.
        assignment: B integers, the adapter of each example; -1 is the plain model.

    Returns:
        A dict with a `(V, D)` deferred weight for each matrix of the adapters, as from `patch`. A
        read raises if its batch has other than B examples, or if it is no lookup and no product.

    Raises:
        ValueError: no adapters for an assignment to one; an empty assignment; adapters of different
            models or with different new tokens; an example of the plain model beside new tokens; or
            as `patch`.
        IndexError: an assignment to an adapter that is not there.
        TypeError: adapters or an assignment of another type.
    """
    adapters = aligned(adapters, 0, "patch_mixed(adapters, assignment)")
    for adapter in adapters:
        check_complete(adapter)
    numbers = adapter_numbers(assignment, len(adapters))
    weights: dict[str, Tensor] = {}
    for name in dict.fromkeys(name for adapter in adapters for name in adapter.specs):
        held = [adapter.specs.get(name) for adapter in adapters]
        spec = next((spec for spec in held if spec and spec.matrix), next(filter(None, held)))
        matrix = matrix_of_rows(spec)
        if matrix.has_max_norm:
            raise ValueError(
                f"{name!r} rescales itself as it is read (max_norm), and cannot be mixed. Call "
                "the model separately for each adapter's examples."
            )
        if spec.grown and len(adapters) in numbers:
            raise ValueError(
                f"the adapters have {spec.grown} new tokens for {name!r}, which the plain model "
                "(-1) does not have. Call its examples on their own."
            )
        base = base_for_call(matrix.current)
        with outside_of_autocast(base.device):
            rows = _rows_of_each(adapters, name, numbers, base, spec.height)
        deltas = [adapter.deltas[name] for adapter in adapters if name in adapter.deltas]
        weight = patched(base, rows, matrix, dense=False, copied_from=deltas)
        weights.update(dict.fromkeys(matrix.distinct, weight))
    return weights


def _rows_of_each(
    adapters: Sequence[TokenDeltas], name: str, numbers: Sequence[int], base: Tensor, height: int
) -> Rows:
    """The rows of each example, which are its adapter's; numbers: of adapters, n the plain model's.

    Unused rows of zeros pad an adapter that has fewer rows than others.
    """
    deltas = {n: one.deltas[name] for n, one in enumerate(adapters) if name in one.deltas}
    chosen = {number: place for place, number in enumerate(dict.fromkeys(numbers))}
    # A trained adapter without examples takes part too, and so gets a gradient of 0.
    trained = [n for n, delta in deltas.items() if delta.requires_grad and n not in chosen]
    # The rows of all adapters, one after the other; the first row is zeros.
    values, ids, at, count = [base.new_zeros(1, base.shape[1])], [], [], 1
    for number in (*chosen, *trained):
        if number not in deltas:
            ids.append(torch.tensor([-1], device=base.device))
            at.append(torch.tensor([0], device=base.device))
            continue
        values.append(cast_like(deltas[number], base))
        ids.append(adapters[number].specs[name].indices.ids_on(base.device))
        at.append(torch.arange(count, count + len(ids[-1]), device=base.device))
        count += len(ids[-1])
    each = torch.tensor([chosen[number] for number in numbers], device=base.device)
    known = id_tensor(pad_sequence(ids[: len(chosen)], True, -1), height).of(each)
    return Rows(F.embedding(pad_sequence(at[: len(chosen)], True)[each], torch.cat(values)), known)


def adapter_numbers(assignment: Iterable[int] | Tensor, count: int) -> list[int]:
    """The adapter of each example, `count` for the plain model."""
    if isinstance(assignment, (Tensor, np.ndarray)):
        unknown = isinstance(assignment, Tensor) and assignment.is_meta
        if unknown or torch.compiler.is_dynamo_compiling():  # Dynamo reads no values
            raise TypeError("assignment has no values to read here. Give a list of integers.")
        assignment = assignment.tolist()
    if isinstance(assignment, (str, bytes, Mapping)) or not isinstance(assignment, Iterable):
        raise TypeError(
            f"assignment must be a sequence of adapter numbers, one for each example, got "
            f"{type(assignment).__name__}: {assignment!r}."
        )
    numbers = list(assignment)
    for number in numbers:
        if isinstance(number, bool) or not isinstance(number, (int, np.integer)):
            raise TypeError(
                f"assignment must hold integers, the number of an adapter or -1 for the plain "
                f"model, got {type(number).__name__}: {number!r}."
            )
        if not count and number != -1:
            raise no_adapters()
        if not -1 <= number < count:
            raise IndexError(
                f"assignment names adapter {number}, but there are {count}. Give 0 to {count - 1}, "
                "or -1 for the plain model."
            )
    if not numbers:
        raise ValueError("assignment is empty: give the number of an adapter for each example.")
    return [int(number) % (count + 1) for number in numbers]


def check_batch_first(model: nn.Module) -> None:
    """Raise ValueError for a model that transposes its batch before it looks tokens up."""
    kind = getattr(getattr(model, "config", None), "model_type", None)
    if kind in _BATCH_LAST:
        raise ValueError(
            f"a mixed patch needs the examples in the first dimension, and a model of type "
            f"{kind!r} transposes its batch before it looks tokens up. Call the model separately "
            "for each adapter's examples."
        )
