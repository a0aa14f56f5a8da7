"""What a model says of a token matrix when rows of it are made; it is kept with the rows."""

from __future__ import annotations

import itertools
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ttfunc.engines.ownership import is_sharded
from ttfunc.model.beside import biases
from ttfunc.model.held import tensors_of, way_to
from ttfunc.model.matrix import Matrix, names_apart
from ttfunc.model.names import saved_names
from ttfunc.model.sizes import sizes_of
from ttfunc.torch_private import is_fake, is_wrapped, outside_of_modes

# How many numbers of a matrix are kept, to know it again by.
_SAMPLED = 16


class Sample(NamedTuple):
    """Some numbers of a matrix as it was: of each of these rows the one in column `row % D`."""

    rows: tuple[int, ...]
    numbers: Tensor


@dataclass(frozen=True, eq=False)
class Origin:
    """What belongs to a token matrix in the model that its rows were made from.

    model: its class and name, for a person. kind: the `model_type` of its config. sizes: for new
    tokens the entries of the config that say how high the matrix is, as `text_config.vocab_size`,
    and their values; None where that is not known. shared: other tensors that have their size from
    these entries. biases: those of the logits, a number for each token; None where that is not
    known. saved_as: the names of checkpoints for those of the model, where transformers writes
    other ones. sample: of rows that are not trained. apart: the names of other matrices of this
    shape, which other weights may tie to it. beside: how the names of other tensors go on after
    that of the matrix, as I-BERT's `_scaling_factor`: the matrix has floats all the same.
    """

    model: str = ""
    kind: str = ""
    sizes: Mapping[str, int] | None = None
    shared: tuple[str, ...] = ()
    biases: tuple[str, ...] | None = None
    saved_as: Mapping[str, str] = field(default_factory=dict)
    sample: Sample | None = None
    apart: tuple[str, ...] = ()
    beside: tuple[str, ...] = ()

    def biases_among(self, held: Collection[str]) -> list[str] | None:
        """The biases of the logits by their `held` names; None where they are not known."""
        if self.biases is None:
            return None
        return [name if name in held else self.saved_as.get(name, name) for name in self.biases]

    def joined(self, other: Origin) -> Origin:
        """What is known from either, for further rows of the same matrix."""
        known = other if self.sizes is None else self
        return replace(
            known,  # its sizes, and what else has them
            model=self.model or other.model,
            kind=known.kind or other.kind,
            biases=other.biases if self.biases is None else self.biases,
            saved_as={**other.saved_as, **self.saved_as},
            sample=self.sample or other.sample,
            apart=self.apart or other.apart,
            beside=self.beside or other.beside,
        )


def origin_of(model: nn.Module, matrix: Matrix, trained: Sequence[int]) -> Origin:
    """What `model` says of one of its matrices, of which these rows are trained."""
    height, name = matrix.shape[0], matrix.names[0]
    root, prefix = _saved_whole(model, name)
    grown = sum(token >= height for token in trained)
    named = [
        bias.name for name in matrix.names for bias in biases(way_to(model, name), name, height)
    ]
    found = None
    if grown and root is not None:
        held = itertools.chain(model.named_parameters(), model.named_buffers())
        names = [one for one, _ in held if one.startswith(prefix)]
        found = sizes_of(root, names, matrix.names, height, grown)
    beside = []
    for name in matrix.names:
        attribute = name.rpartition(".")[2]
        others = (one for one, _ in tensors_of(way_to(model, name)[-1]))
        beside += [one[len(attribute) :] for one in others if one.startswith(f"{attribute}_")]
    return Origin(
        model=_name(model if root is None else root),
        kind=str(getattr(getattr(root, "config", None), "model_type", "")),
        sizes=None if found is None else found[0],
        shared=() if found is None else tuple(n for n in found[1] if n not in named),
        biases=tuple(dict.fromkeys(named)),
        saved_as=saved_names(model, (*matrix.names, *named)),
        sample=_sample(matrix, trained),
        apart=tuple(one for one in names_apart(model, matrix) if one.startswith(prefix)),
        beside=tuple(dict.fromkeys(beside)),
    )


def _saved_whole(model: nn.Module, name: str) -> tuple[nn.Module | None, str]:
    """The outermost model of transformers around the matrix, and what its names begin with."""
    for depth, module in enumerate(way_to(model, name)):
        if hasattr(type(module), "config_class") and hasattr(module.config, "to_json_string"):
            return module, "".join(f"{part}." for part in name.split(".")[:depth])
    return None, ""


def _name(model: nn.Module) -> str:
    """Its class, and the name that it was loaded by, without the folders of this machine."""
    known = getattr(getattr(model, "config", None), "_name_or_path", None)
    path = known.replace("\\", "/") if isinstance(known, str) else ""
    last = path.rstrip("/").rpartition("/")[2]
    return f"{type(model).__name__} {last}".strip()


def _sample(matrix: Matrix, trained: Sequence[int]) -> Sample | None:
    tensor, height = matrix.tensor, matrix.shape[0]
    unknown = tensor.is_meta or is_fake(tensor) or is_wrapped(tensor)
    if unknown or is_sharded(tensor) or not tensor.numel():  # (other ranks' cost a message)
        return None
    even = dict.fromkeys(height * place // _SAMPLED for place in range(_SAMPLED))
    rows = tuple(sorted(even.keys() - set(trained)))
    with outside_of_modes():
        return Sample(rows, numbers_at(tensor, rows))


def is_other(matrix: Tensor, sample: Sample, trained: Sequence[int]) -> bool:
    """Whether most numbers of the sample are others in the matrix, in the coarser dtype.

    A model that differs in a few rows, as one that other rows were merged into, is the same one.
    """
    height = matrix.shape[0]
    kept = [row < height and row not in trained for row in sample.rows]
    if not any(kept) or is_sharded(matrix):
        return False
    with outside_of_modes():
        found = numbers_at(matrix, tuple(itertools.compress(sample.rows, kept))).cpu()
        known = sample.numbers.cpu()[kept]
        coarse = max(found.dtype, known.dtype, key=lambda dtype: torch.finfo(dtype).eps)
        differing = found.to(coarse).double() != known.to(coarse).double()
    return int(differing.sum()) * 2 > sum(kept)


def numbers_at(matrix: Tensor, rows: tuple[int, ...]) -> Tensor:
    """The number of each of these rows that a sample has."""
    places = torch.tensor(rows, dtype=torch.int64, device=matrix.device)
    width = matrix.shape[1]
    # Floats of eight bits know no other kind of indexing.
    found = matrix.detach().index_select(0, places).flatten()
    order = torch.arange(len(rows), device=matrix.device)
    return found.index_select(0, order * width + places % width)
