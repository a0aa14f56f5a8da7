"""The tree explains the design: rooms on floors, imports point downwards, without circles."""

from __future__ import annotations

import ast
import tomllib
from graphlib import TopologicalSorter
from pathlib import Path

import ttfunc

PACKAGE = Path(ttfunc.__file__).parent
# From the ground up. A room imports of itself and of the floors below its own.
FLOORS = [
    {"torch_private", "torch_distributed_private", "own_names"},
    {"engines"},
    {"model"},
    {"rows"},
    {"weight"},
    {"call", "merging"},
    {"disk", "export", "module"},
    {"peft"},
    {"info"},
    {"__main__"},
]


def room(module: str) -> str:
    return module.partition(".")[0]


def imports() -> dict[str, set[str]]:
    """For each module of the package, the modules of it that it imports."""
    names = {
        ".".join(path.relative_to(PACKAGE).with_suffix("").parts): path
        for path in PACKAGE.rglob("*.py")
        if path.name != "__init__.py"
    }
    found: dict[str, set[str]] = {}
    for name, path in names.items():
        found[name] = set()
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("ttfunc"):
                module = node.module.removeprefix("ttfunc").removeprefix(".")
                for alias in node.names:
                    deeper = f"{module}.{alias.name}".removeprefix(".")
                    found[name].add(deeper if deeper in names else module)
    return found


def test_there_are_no_circles():
    order = list(TopologicalSorter(imports()).static_order())
    assert order.index("torch_private") < order.index("weight.rows")
    assert order.index("weight.rows") < order.index("call.functional_call")


def test_each_room_stands_on_the_floors_below_it():
    floor = {name: height for height, names in enumerate(FLOORS) for name in names}
    assert floor.keys() == {room(module) for module in imports()}
    for module, others in imports().items():
        for other in others - {""}:  # the package itself, for its version
            same = room(module) == room(other)
            assert same or floor[room(other)] < floor[room(module)], (module, other)


def test_a_wheel_has_each_folder_of_the_package():
    setup = tomllib.loads((PACKAGE.parent / "pyproject.toml").read_text())["tool"]["setuptools"]
    folders = {path.parent for path in PACKAGE.rglob("*.py")}
    names = {".".join(path.relative_to(PACKAGE.parent).parts) for path in folders}
    assert set(setup["packages"]) == names
    assert all((PACKAGE / name).is_file() for name in setup["package-data"]["ttfunc"])


def test_no_module_is_a_grab_bag_or_too_long():
    for path in PACKAGE.rglob("*.py"):
        assert path.stem not in {"utils", "util", "helpers", "misc", "common"}
        assert len(path.read_text().splitlines()) <= 300, path
