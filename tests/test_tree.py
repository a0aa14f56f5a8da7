"""The tree explains the design: imports point downwards, without circles."""

from __future__ import annotations

import ast
from graphlib import TopologicalSorter
from pathlib import Path

import ttfunc

PACKAGE = Path(ttfunc.__file__).parent
# What each folder may import of the package besides itself. The rows (`indices`, `deltas`) and the
# pure functions are at the top; nothing there knows of files.
ALLOWED = {
    "model": {"torch_private"},
    "weight": {"torch_private", "indices", "model"},
    "disk": {
        *("torch_private", "indices", "deltas", "growth", "names", "merging", "model"),
        *("module_keys", "ends", "shapes", "inspecting"),
    },
    "peft": {"torch_private", "indices", "deltas", "names", "model", "disk"},
}


def imports() -> dict[str, set[str]]:
    """For each module of the package, the modules of it that it imports."""
    names = {
        ".".join(path.relative_to(PACKAGE).with_suffix("").parts): path
        for path in PACKAGE.rglob("*.py")
        if path.name not in {"__init__.py", "__main__.py", "info.py"}  # the face, and the commands
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
    assert order.index("torch_private") < order.index("weight.reads") < order.index("call")


def test_imports_of_the_folders_point_downwards():
    for name, others in imports().items():
        folder = name.partition(".")[0] if "." in name else None
        for other in others:
            top = other.partition(".")[0]
            if folder is None:
                assert top not in {"disk", "peft"}, (name, other)
            else:
                assert top == folder or top in ALLOWED[folder], (name, other)


def test_no_module_is_a_grab_bag_or_too_long():
    for path in PACKAGE.rglob("*.py"):
        assert path.stem not in {"utils", "util", "helpers", "misc", "common"}
        assert len(path.read_text().splitlines()) <= 300, path
