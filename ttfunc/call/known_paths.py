"""What the calls of a model remember for later calls: paths, and the matrices of plain weights.

Each call compares the model with what is remembered, and searches again if something has changed.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from ttfunc.call.path import Path, Step, find_path, steps_of
from ttfunc.model.held import tensor_under
from ttfunc.model.matrix import Matrix
from ttfunc.torch_private import is_traced

_MOST_PATHS = 64  # of a model


class Tree(NamedTuple):
    """What a model consists of, by identity: its submodules, parameters and buffers."""

    children: list[int]
    parameters: list[int]
    buffers: list[int]

    def count(self, tensors: Iterable[Tensor]) -> int:
        """How many places (a module and its attribute) hold one of these tensors."""
        wanted = {id(tensor) for tensor in tensors}
        return sum(map(wanted.__contains__, (*self.parameters, *self.buffers)))


class Known:
    """What is remembered of a model, as long as its tree stays the same.

    paths: by the identities of the tensors they lead to. matrices: of plain weights, which come
    without a matrix, by the name that the caller gives.
    """

    def __init__(self, tree: Tree) -> None:
        self.tree = tree
        self.paths: dict[tuple[int, ...], Path] = {}
        self.matrices: dict[str, Matrix] = {}

    def has(self, tree: Tree) -> bool:
        """Whether the tree is the same, apart from buffers, which some models make anew."""
        mine = self.tree
        return mine.children == tree.children and mine.parameters == tree.parameters

    def remember(self, tensors: Iterable[object], path: Path) -> None:
        """Keep the path for later calls with the same tensors."""
        if len(self.paths) >= _MOST_PATHS:
            self.paths.clear()
        self.paths[tuple(map(id, tensors))] = path


_KNOWN: WeakKeyDictionary[nn.Module, Known] = WeakKeyDictionary()


class Model(NamedTuple):
    """A model at a call: its tree, and what is remembered of it."""

    module: nn.Module
    tree: Tree
    known: Known


def model_at_call(module: nn.Module) -> Model | None:
    """The model as it is now; None while operations are traced: then nothing is remembered."""
    if torch.compiler.is_dynamo_compiling() or is_traced():
        return None
    tree, known = tree_of(module), _KNOWN.get(module)
    if known is None or not known.has(tree):
        known = Known(tree)
        _KNOWN[module] = known
    return Model(module, tree, known)


def tree_of(model: nn.Module) -> Tree:
    # Every call runs this, and model.modules() costs many times as much.
    pending, seen = [model], {id(model), id(None)}
    children: list[object] = []
    parameters: list[object] = []
    buffers: list[object] = []
    for module in pending:
        state = module.__dict__
        if own := state["_parameters"]:
            parameters += own.values()
        if own := state["_buffers"]:
            buffers += own.values()
        if own := state["_modules"]:
            children += (held := [*own.values()])
            for child in held:
                if (identity := id(child)) not in seen:
                    seen.add(identity)
                    pending.append(child)
    return Tree([*map(id, children)], [*map(id, parameters)], [*map(id, buffers)])


def path_to(
    model: nn.Module, tensors: Sequence[Tensor], through: Collection[nn.Module], at: Model | None
) -> tuple[Path, list[Step], bool]:
    """The path to these tensors, its modules as they are now, and whether the path is new.

    through: modules that are on the path too. at: the model at this call.
    """
    if torch.compiler.is_dynamo_compiling():
        return _path_when_compiled(model, tensors)
    if at is not None:
        path = at.known.paths.get((*map(id, tensors), *map(id, through)))
        if path is not None and path.is_as_noted(steps := path.steps(), at.tree.buffers):
            return path, steps, False
    path = find_path(model, tensors, through)
    steps = path.steps()
    if at is not None:
        path.note(steps, at.tree.buffers)
    return path, steps, True


def _path_when_compiled(
    model: nn.Module, tensors: Sequence[Tensor]
) -> tuple[Path, list[Step], bool]:
    held = {id(tensor) for tensor in tensors}
    names = [name for name, one in model.named_parameters() if id(one) in held]
    names += [name for name, one in model.named_buffers() if id(one) in held]
    modules, leading, uncopyable = _parts_by_names(model, tuple(names))
    return Path((), (), (), uncopyable), steps_of(modules, leading), False


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _parts_by_names(model: nn.Module, names: tuple[str, ...]) -> Any:
    """The parts of a path. Dynamo does not trace the search, and takes plain tuples from it."""
    held = (tensor_under(model, name) for name in names)
    path = find_path(model, [one for one in held if one is not None])
    return path.modules, path.leading, path.uncopyable
