"""From trained rows to the weights that a functional call runs with."""

from __future__ import annotations

from torch import Tensor

from ttfunc.call.stale import matrix_of_rows
from ttfunc.engines.ownership import base_for_call, is_sharded
from ttfunc.rows.deltas import TokenDeltas, check_shapes, check_type
from ttfunc.rows.new_tokens import check_complete
from ttfunc.rows.several import combine
from ttfunc.weight.deferred import patched
from ttfunc.weight.rows import Rows


def patch(
    params: TokenDeltas, *more: TokenDeltas, dense: bool = False, deferred_logits: bool = False
) -> dict[str, Tensor]:
    """Return the model's weights with the rows in them, by parameter name, for `functional_call`.

    Each weight is the matrix W with `W[S] = R`: the rows R replace the rows of the tokens S.

    >>> model = torch.nn.Embedding(100, 8)
    >>> weights = patch(ttfunc.init_deltas(model, [3, 7]))
    >>> weights["weight"].shape
    torch.Size([100, 8])
    >>> ttfunc.functional_call(model, weights, torch.tensor([1, 3, 7])).shape
    torch.Size([3, 8])

    `torch.func.functional_call` takes the weights too. They are differentiable with respect to the
    deltas alone. `patch(a, b)` is `patch(combine(a, b))`. Neither the model nor `params` is
    changed.

    A weight of one TokenDeltas reads the rows as they are at the call. A weight that holds a copy
    (`patch(a, b)` of one matrix, or `dense`) goes stale once the rows, or a copied matrix, are
    written to; a call then refuses it. Writes that no version counts (to `row.data`, through numpy)
    are found by comparing values at each read, for up to 64 tensors of 1 MiB in all, and not
    beyond.

    Args:
        params: with `(k, D)` deltas. They are cast to the dtype, and moved to the device, that the
            model has now.
        more: further rows of the same model, of other tokens.
        dense: copy the matrices at once. This costs V×D memory for the weight and for each of its
            gradients. By default the weights are deferred: a call reads the frozen matrix in place
            and puts the k rows into the result. A matrix of an Embedding with `max_norm` is always
            copied.
        deferred_logits: let the logits wait until something reads them. A cross-entropy of them
            then needs no `(T, V)` logits: it works in chunks of a constant size, on the labelled
            positions alone, and so do its gradients. If something else reads the logits, they are
            made then, from the rows as they were at the product, even after the optimizer's step;
            but a gradient is refused once the rows have changed. Without effect under no_grad,
            torch.compile and forward mode.

    Returns:
        A dict with a `(V, D)` weight for each distinct matrix, `(V + n, D)` with n new tokens,
        under one name of each Parameter that holds it.

    Raises:
        ValueError: deltas of another shape; a matrix that was resized or untied since they were
            made; a token in more than one of the parameters; new tokens without the ones before.
        TypeError: deltas that are not float tensors.
        RuntimeError: `params` were unpickled, and belong to no model.
    """
    weights: dict[str, Tensor] = {}
    together = combine(params, *more)
    check_shapes(together)
    check_complete(together)
    for name, delta in together.deltas.items():
        spec = together.specs[name]
        matrix = matrix_of_rows(spec)
        base = base_for_call(matrix.current)
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


def _no_copy(name: str, dense: bool) -> RuntimeError:
    why = "dense=True copies it" if dense else "an Embedding with max_norm rescales it in place"
    return RuntimeError(
        f"each rank has a part of {name!r} alone, and {why}, which needs all of it. "
        + ("Leave dense out." if dense else "Leave the matrix out of the sharding.")
    )
