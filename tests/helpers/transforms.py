"""Every transform of torch.func, applied to a loss of the rows."""

from __future__ import annotations

import optree
import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.func import functionalize, grad, hessian, jacfwd, jacrev, jvp, linearize, vjp, vmap

from ttfunc import TokenDeltas


def direction(params: TokenDeltas) -> TokenDeltas:
    return optree.tree_map(torch.cos, params)


def stacked(params: TokenDeltas) -> TokenDeltas:
    return optree.tree_map(lambda rows: torch.stack([rows, -rows, rows * 0.5]), params)


TRANSFORMS = {
    "value": lambda f, p: f(p),
    "grad": lambda f, p: grad(f)(p),
    "vjp": lambda f, p: vjp(f, p)[1](torch.tensor(2.0).double()),
    "jvp": lambda f, p: jvp(f, (p,), (direction(p),)),
    "linearize": lambda f, p: linearize(f, p)[1](direction(p)),
    "jacrev": lambda f, p: jacrev(f)(p),
    "jacfwd": lambda f, p: jacfwd(lambda rows: f(filled(p, rows)))(rows_of(p)),
    "hessian": lambda f, p: hessian(lambda rows: f(filled(p, rows)))(rows_of(p)),
    "vmap": lambda f, p: vmap(f)(stacked(p)),
    "vmap(grad)": lambda f, p: vmap(grad(f))(stacked(p)),
    "grad(vmap)": lambda f, p: grad(lambda q: vmap(f)(q).sum())(stacked(p)),
    "forward over forward": lambda f, p: jvp(
        lambda q: jvp(f, (q,), (direction(p),))[1], (p,), (direction(p),)
    ),
    "forward over forward over reverse": lambda f, p: jvp(
        lambda q: jvp(grad(f), (q,), (direction(p),))[1], (p,), (direction(p),)
    ),
    "jvp(vmap)": lambda f, p: jvp(vmap(f), (stacked(p),), (stacked(direction(p)),)),
    "vmap(jvp)": lambda f, p: vmap(lambda q: jvp(f, (q,), (direction(p),)))(stacked(p)),
    "jvp(vmap(grad))": lambda f, p: jvp(vmap(grad(f)), (stacked(p),), (stacked(direction(p)),)),
    "dual numbers": lambda f, p: dual(f, p),
    "forward over reverse": lambda f, p: jvp(grad(f), (p,), (direction(p),)),
    "reverse over reverse": lambda f, p: grad(lambda q: dot(grad(f)(q), direction(p)))(p),
    "functionalize": lambda f, p: functionalize(f)(p),
    "functionalize(grad)": lambda f, p: functionalize(grad(f))(p),
    "vmap(vmap(grad))": lambda f, p: vmap(vmap(grad(f)))(stacked(stacked(p))),
}


def dual(f, params: TokenDeltas) -> Tensor:
    with forward_ad.dual_level():
        duals = optree.tree_map(forward_ad.make_dual, params, direction(params))
        return forward_ad.unpack_dual(f(duals)).tangent


def rows_of(params: TokenDeltas) -> dict[str, Tensor]:
    return params.deltas


def filled(params: TokenDeltas, rows: dict[str, Tensor]) -> TokenDeltas:
    return TokenDeltas(rows, params.specs)


def dot(a: TokenDeltas, b: TokenDeltas) -> Tensor:
    return sum(
        (x * y).sum() for x, y in zip(optree.tree_leaves(a), optree.tree_leaves(b), strict=True)
    )
