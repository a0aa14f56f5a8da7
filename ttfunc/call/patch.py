"""From trained rows to the weights that a functional call runs with."""

from __future__ import annotations

import torch
from torch import Tensor

from ttfunc.engines.ownership import is_sharded, unreadable
from ttfunc.model.matrix import Matrix
from ttfunc.model.memory import same_memory
from ttfunc.rows.deltas import RowSpec, TokenDeltas, check_shapes, check_type, combine
from ttfunc.rows.new_tokens import check_complete
from ttfunc.weight.deferred import patched
from ttfunc.weight.rows import Rows


def patch(
    params: TokenDeltas, *more: TokenDeltas, dense: bool = False, deferred_logits: bool = False
) -> dict[str, Tensor]:
    """The patched weights of the model that `params` were made from, by parameter name.

    Each weight is the matrix W with `W[S] = R`: the rows R replace the rows of the tokens S.

    >>> model = torch.nn.Embedding(100, 8)
    >>> weights = patch(ttfunc.init_deltas(model, [3, 7]))
    >>> weights["weight"].shape
    torch.Size([100, 8])
    >>> ttfunc.functional_call(model, weights, torch.tensor([1, 3, 7])).shape
    torch.Size([3, 8])

    Give the result to `torch.func.functional_call` or to `ttfunc.functional_call`; it is
    differentiable with respect to the deltas alone. `patch(a, b)` is `patch(combine(a, b))`.
    Neither the model nor `params` is changed.

    The weights of one TokenDeltas read its current rows. Those that copy (`patch(a, b)` of one
    matrix, `dense`) are refused as stale once the rows, or a matrix that was copied, were written
    to. Writes that no version counts (to `row.data`, through numpy) are noticed for up to 64
    tensors of 1 MiB in all, whose values are compared at each read; beyond that, they are not.

    Args:
        params: with `(k, D)` deltas; they are cast to the dtype and moved to the device that the
            model has now.
        more: further rows of the same model, of other tokens.
        dense: copy the matrices at once, which costs V×D memory for the weight and for each of its
            gradients. By default they are deferred: the frozen matrix is read in place and the k
            rows are put into the result (see `PatchedWeight`). A matrix of an Embedding with
            `max_norm` is always copied.
        deferred_logits: let the logits wait until something reads them. A cross-entropy of theirs
            then needs none: it is made by chunks of a constant size, from the labelled positions
            alone, and so are its gradients. Where something reads the logits as well, they are made
            again, of the rows as they were at the product, also after the optimizer's step; a
            gradient is refused then. Under no_grad, torch.compile and forward mode, this changes
            nothing.

    Returns:
        A `(V, D)` weight for each distinct matrix, under one name of each Parameter that holds it;
        with n new tokens `(V + n, D)`.

    Raises:
        ValueError: deltas of another shape, a matrix that was resized or untied since they were
            made, a token in more than one of the parameters, or new tokens without the ones before.
        TypeError: deltas that are not float tensors.
        RuntimeError: `params` were unpickled and belong to no model.
    """
    weights: dict[str, Tensor] = {}
    together = combine(params, *more)
    check_shapes(together)
    check_complete(together)
    for name, delta in together.deltas.items():
        spec = together.specs[name]
        matrix = matrix_of_rows(spec)
        base = unreadable(matrix.current)
        # A matrix that rescales itself when it is read must be one tensor for the whole call.
        copied = dense or matrix.has_max_norm
        if copied and is_sharded(matrix.tensor):
            raise _no_copy(name, dense)
        rows = Rows(delta, spec.indices)
        each = [one.deltas[name] for one in (params, *more) if name in one.deltas]
        weight = patched(
            base, rows, matrix, dense=copied, defers=deferred_logits,
            copied_from=each if len(each) > 1 else (),
        )  # fmt: skip
        weights.update(dict.fromkeys(matrix.distinct, weight))
    return weights


def check_current(params: TokenDeltas) -> None:
    """Raise what `patch` would raise for wrong types and shapes, and for stale parameters."""
    check_type(params)
    check_shapes(params)
    check_complete(params)
    for spec in params.specs.values():
        matrix_of_rows(spec)


def matrix_of_rows(spec: RowSpec) -> Matrix:
    """The matrix of the rows. Raises RuntimeError if there is none, ValueError if it changed."""
    name, matrix = spec.names[0], spec.matrix
    if matrix is None:
        raise RuntimeError(
            f"the parameters for {name!r} belong to no model: pickling leaves the base behind. "
            "Put them on one: optree.tree_map(lambda new, old: old, "
            "init_deltas(model, idx), params)."
        )
    held = matrix.tensor
    if matrix.shape != spec.shape:
        raise ValueError(
            f"stale parameters: {name!r} had shape {spec.shape} when they were made, and has "
            f"{matrix.shape} now. Make them anew with init_deltas on the model as it is."
        )
    if apart := [n for n, other in matrix.slots if not _is_tied(other, held)]:
        raise ValueError(
            f"stale parameters: {apart} shared the memory of {name!r} when the parameters were "
            "made, and no longer do (moving or casting a model separates weights that are not one "
            "Parameter). Tie them again, or make the parameters anew with init_deltas."
        )
    return matrix


def _is_tied(a: Tensor, b: Tensor) -> bool:
    # Engines give each place of a tied matrix a parameter of its own. Dynamo, which cannot read
    # where tensors lie, guards that the two are those it has traced.
    unknown = torch.compiler.is_dynamo_compiling() or is_sharded(a) or is_sharded(b)
    return a is b or unknown or same_memory(a, b)


def _no_copy(name: str, dense: bool) -> RuntimeError:
    why = "dense=True copies it" if dense else "an Embedding with max_norm rescales it in place"
    return RuntimeError(
        f"each rank has a part of {name!r} alone, and {why}, which needs all of it. "
        + ("Leave dense out." if dense else "Leave the matrix out of the sharding.")
    )
