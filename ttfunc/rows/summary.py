"""How much is trained, and how much it weighs."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from ttfunc.engines.ownership import is_zero3, shape_of
from ttfunc.engines.shards import whole_of
from ttfunc.model.given import is_token_module
from ttfunc.model.memory import memory_of
from ttfunc.rows.deltas import TokenDeltas, check_shapes, check_type
from ttfunc.rows.inspecting import Base, Inspected, table, text_with
from ttfunc.torch_private import is_traceable_wrapper_subclass


@dataclass(frozen=True)
class Summary:
    """What `summary` counted. Tied and shared tensors count once; bytes are those stored.

    Attributes:
        trainable_parameters: the rows, and what else is trained.
        trainable_bytes: of these.
        total_parameters: those of the model, and the rows.
        total_bytes: of these.
        matrices: what each matrix trains, by its first name.
        beside: the names of the parameters that are trained beside the rows.
        rows: a table of the rows of each matrix, where a tokenizer was given.
    """

    trainable_parameters: int
    trainable_bytes: int
    total_parameters: int
    total_bytes: int
    matrices: dict[str, str]
    beside: tuple[str, ...] = ()
    rows: Mapping[str, str] = field(default_factory=dict)

    @property
    def fraction(self) -> float:
        """The trainable part of all parameters, the model's and the rows."""
        return self.trainable_parameters / max(self.total_parameters, 1)

    def __str__(self) -> str:
        lines = []
        for name, what in self.matrices.items():
            lines += [f"{name}: {what}", *filter(None, [self.rows.get(name)])]
        if self.beside:
            more = ", …" if len(self.beside) > 1 else ""
            lines.append(
                f"beside the rows: {len(self.beside):,} parameters ({self.beside[0]}{more})"
            )
        lines.append(
            f"trainable: {self.trainable_parameters:,} parameters ({size(self.trainable_bytes)}) "
            f"of {self.total_parameters:,} ({size(self.total_bytes)}), {self.fraction:.4%}"
        )
        return "\n".join(lines)


def summary(
    model: nn.Module, params: TokenDeltas | None = None, *, tokenizer: Any = None
) -> Summary:
    """Count what is trained of a model, and all that there is; nothing is changed.

    What is trained are the rows, and what requires grad in the model (a LoRA, a head) except a
    matrix that has rows.

    Args:
        model: the model; or a TokenModule, which counts as what it trains.
        params: the rows. By default those of the TokenModule, and none for another model.
        tokenizer: of transformers. With it, there is also a table of the rows: the text of each
            token, how far its row moved from its original (a new token's: from where it started),
            its norm, this divided by the median of the matrix's rows, and the tokens of the nearest
            rows before and after. It reads the matrix; a sharded one on all ranks.

    Returns:
        Summary, whose totals include the rows. For a sharded model, parameters are counted whole,
        and bytes are those on this rank.

    Raises:
        TypeError: `model` is not a module, or `params` are not TokenDeltas; a `tokenizer` that is
            none.
        ValueError: the model has no matrix of that name and shape; with a tokenizer, stacked rows.
    """
    if is_token_module(model):
        module: Any = model
        params, model = module.params() if params is None else params, module.base
    params = TokenDeltas({}, {}) if params is None else params
    check_type(params)
    if not isinstance(model, nn.Module):
        raise TypeError(f"a model is needed, got {type(model).__name__}. The order is {_ORDER}.")
    deltas = params.deltas.values()
    # Parameters over the same memory (a tie that torch does not know of) are one.
    distinct = {memory_of(one): one for one in model.parameters()}
    beside = _beside(model, params)
    return Summary(
        trainable_parameters=sum(map(_numel, [*deltas, *beside.values()])),
        trainable_bytes=sum(map(_nbytes, [*deltas, *beside.values()])),
        total_parameters=sum(map(_numel, [*deltas, *distinct.values()])),
        total_bytes=sum(map(_nbytes, [*deltas, *distinct.values()])),
        matrices=_matrices(model, params),
        beside=tuple(beside),
        rows={} if tokenizer is None else _tables(model, params, tokenizer),
    )


_ORDER = "summary(model, params), or summary(module) of a TokenModule"


def _beside(model: nn.Module, params: TokenDeltas) -> dict[str, Tensor]:
    """What requires grad in the model, by its first name, and each memory once."""
    specs = params.specs.values()
    names = {name for spec in specs for name in spec.names}
    known = [spec.matrix.tensor for spec in specs if spec.matrix is not None]
    known += [one for name, one in model.named_parameters(remove_duplicate=False) if name in names]
    seen = set(map(memory_of, known))
    found: dict[str, Tensor] = {}
    for name, one in model.named_parameters():
        if one.requires_grad and (memory := memory_of(one)) not in seen:
            seen.add(memory)
            found[name] = one
    return found


def _matrices(model: nn.Module, params: TokenDeltas) -> dict[str, str]:
    """What each matrix trains, for a person."""
    held = dict(model.named_parameters(remove_duplicate=False))
    matrices = {}
    for name, spec in params.specs.items():
        wrapped = spec.matrix is not None and any(p is spec.matrix.tensor for p in held.values())
        if not wrapped and (name not in held or tuple(shape_of(held[name])) != spec.shape):
            raise ValueError(
                f"{type(model).__name__} has no matrix {name!r} of shape {spec.shape}, which the "
                "parameters were made for. Give the model that they were made from."
            )
        tied = f", tied with {', '.join(spec.names[1:])}" if len(spec.names) > 1 else ""
        told = params.half_in_words(spec)
        delta = params.deltas[name]
        matrices[name] = (
            f"{spec.counted} rows × {spec.shape[1]:,}, "
            f"{str(delta.dtype).removeprefix('torch.')}{tied}{told}"
        )
    return matrices


def _tables(model: nn.Module, params: TokenDeltas, tokenizer: Any) -> dict[str, str]:
    """The table of the rows of each matrix."""
    check_shapes(params)
    text, tables = text_with(tokenizer), {}
    for name, spec in params.specs.items():
        held = model.get_parameter(name) if spec.matrix is None else spec.matrix.tensor
        if params.deltas[name].is_meta:
            raise ValueError(f"the rows of {name!r} are on meta, without values to tell of.")
        base = None if held.is_meta else Base(whole_of(held), spec.shape[0])
        given = Inspected(spec.names, spec.indices.ids, params.deltas[name], spec.originals)
        tables[name] = "\n".join(f"  {line}" for line in table(given, text, base))
    return tables


def _numel(parameter: Tensor) -> int:
    if is_lazy(parameter):
        return 0
    # bitsandbytes packs two numbers into a byte, and keeps their shape separately.
    shape = getattr(getattr(parameter, "quant_state", None), "shape", None)
    return math.prod(shape_of(parameter) if shape is None else shape)


def _nbytes(tensor: Tensor) -> int:
    if is_lazy(tensor):
        return 0
    if is_zero3(tensor):  # the part of it that is here
        return _nbytes(tensor.ds_tensor)  # type: ignore[attr-defined]
    if is_traceable_wrapper_subclass(tensor):  # it reports one dtype, and stores others
        inner = (getattr(tensor, name) for name in tensor.__tensor_flatten__()[0])
        return sum(_nbytes(part) for part in inner if isinstance(part, Tensor))
    if tensor.layout in _PARTS:
        return sum(getattr(tensor, part)().nbytes for part in _PARTS[tensor.layout])
    return tensor.nbytes


_PARTS = {
    torch.sparse_coo: ("_indices", "_values"),
    torch.sparse_csr: ("crow_indices", "col_indices", "values"),
    torch.sparse_bsr: ("crow_indices", "col_indices", "values"),
    torch.sparse_csc: ("ccol_indices", "row_indices", "values"),
    torch.sparse_bsc: ("ccol_indices", "row_indices", "values"),
}


def size(count: float) -> str:
    """A number of bytes, as text for people."""
    for unit in ("B", "KiB", "MiB"):
        if count < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.2f} GiB"
