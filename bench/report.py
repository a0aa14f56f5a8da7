"""What the benches have in common: their options, and how they print."""

from __future__ import annotations

import argparse
import platform
from dataclasses import fields, replace
from importlib.metadata import version

import torch
from rich.console import Console
from rich.table import Table

from bench.contestants import CONTESTANTS, SMOLLM2, Work


def arguments(description: str) -> tuple[Work, argparse.Namespace]:
    """The work that the command line asks for, and its other options."""
    parser = argparse.ArgumentParser(description=description.partition("\n\n")[0])
    for field in fields(Work):
        kind = int if isinstance(field.default, int) else str
        parser.add_argument(f"--{field.name}", type=kind, default=field.default)
    parser.add_argument("--only", choices=CONTESTANTS, help="one contestant, in this process")
    parser.add_argument("--repeats", type=int, default=9, help="of a timed step")
    parser.add_argument("--compile", action="store_true", help="time torch.compile's graphs")
    options = parser.parse_args()
    work = Work(**{field.name: getattr(options, field.name) for field in fields(Work)})
    return (replace(work, **SMOLLM2) if work.weights == "SmolLM2" else work), options


def print_table(title: str, columns: list[str], rows: list[list[str]]) -> None:
    """A table of figures, and under it what they were measured on."""
    table = Table(title=title)
    for number, column in enumerate(columns):
        table.add_column(column, justify="right" if number else "left")
    for row in rows:
        table.add_row(*row)
    Console(width=110).print(table)
    print(machine())


def machine() -> str:
    """Versions and processor."""
    versions = ", ".join(f"{name} {version(name)}" for name in ("torch", "transformers", "peft"))
    where = (
        torch.cuda.get_device_name()
        if torch.cuda.is_available()
        else f"{torch.get_num_threads()} threads, {platform.machine()}"
    )
    return f"{versions}; {where}"
