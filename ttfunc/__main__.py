"""Merging checkpoints from the command line."""

from __future__ import annotations

import argparse
import importlib
import io
import signal
import sys
import threading
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from ttfunc.disk import rows_file
from ttfunc.disk.checkpoint import merge_checkpoint, unmerge_checkpoint
from ttfunc.disk.folder import open_checkpoint
from ttfunc.disk.module_file import KEY
from ttfunc.disk.tensors import opened
from ttfunc.peft.adapter import CONFIG, read_adapter
from ttfunc.rows.deltas import TokenDeltas
from ttfunc.rows.summary import size

COMMANDS = {"merge": merge_checkpoint, "unmerge": unmerge_checkpoint}


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line; the exit code is 0, 1 for an error, 2 for wrong usage, 130 for Ctrl-C.

    An error is one line on stderr.
    """
    options = _parser().parse_args(arguments)
    for stream in (sys.stdout, sys.stderr):  # their encoding may lack × or …
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")
    with warnings.catch_warnings(), _terminated():
        warnings.simplefilter("always", UserWarning)
        warnings.showwarning = _show_warning
        try:
            options.run(options)
        except KeyboardInterrupt:
            print("ttfunc: interrupted", file=sys.stderr)
            return 130
        except (OSError, ValueError, LookupError, TypeError) as error:
            print(f"ttfunc: error: {_message(error)}", file=sys.stderr)
            return 1
    return 0


@contextmanager
def _terminated() -> Iterator[None]:
    """Clean up after SIGTERM as after Ctrl-C: by default SIGTERM ends the process at once."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="ttfunc", description="Write trained token rows into a checkpoint, and out of it."
    )
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")
    for name, what in (
        ("merge", "copy a checkpoint, with the trained rows in it"),
        ("unmerge", "copy a merged checkpoint, with the original rows back in place"),
    ):
        command = commands.add_parser(name, help=what, description=what.capitalize() + ".")
        command.add_argument("source", help="a folder with .safetensors files, or one such file")
        command.add_argument("params", help="the file that ttfunc.save wrote")
        command.add_argument("destination", help="the copy; nothing may have this name yet")
        command.add_argument(
            "--name",
            action=_Names,
            type=_pair,
            default={},
            metavar="MODEL=CHECKPOINT",
            help="the name of a matrix in the model, and its other name in the checkpoint",
        )
        command.add_argument(
            "--tokenizer",
            metavar="FOLDER",
            help="a tokenizer of this folder in place of the source's, as one with the new tokens",
        )
        command.add_argument("-q", "--quiet", action="store_true", help="show no progress")
        command.set_defaults(run=_copy, command=name)
    what = "what a file of trained rows, an adapter of PEFT's, or a checkpoint holds"
    command = commands.add_parser("info", help=what, description=what.capitalize() + ".")
    command.add_argument("path", help="the file that ttfunc.save wrote, or a folder")
    command.set_defaults(run=_info)
    return parser


class _Names(argparse.Action):
    """Collects pairs; none is dropped because another has the same name."""

    def __call__(self, parser: Any, namespace: Any, values: Any, option: str | None = None) -> None:
        name, other = values
        names = getattr(namespace, self.dest)
        if name in names:
            raise argparse.ArgumentError(
                self, f"{name!r} is given twice, as {names[name]!r} and {other!r}: give it once"
            )
        setattr(namespace, self.dest, {**names, name: other})


def _pair(text: str) -> tuple[str, str]:
    name, equals, other = text.partition("=")
    if not (name and equals and other):
        raise argparse.ArgumentTypeError(f"{text!r} is not MODEL=CHECKPOINT, a name on each side")
    return name, other


def _copy(options: argparse.Namespace) -> None:
    copied = 0
    with _bar(options.quiet) as bar:

        def progress(done: int, total: int) -> None:
            nonlocal copied
            copied, bar.total = done, total
            bar.update(done - bar.n)

        COMMANDS[options.command](
            options.source,
            options.params,
            options.destination,
            names=options.name or None,
            tokenizer=options.tokenizer,
            progress=progress,
        )
    if not options.quiet:
        print(f"{options.command}d into {options.destination}, {size(copied)}:")
        print("\n".join(_matrices(rows_file.read(options.params))))


def _bar(quiet: bool) -> Any:
    """A progress bar, where tqdm is installed and a terminal is there to see it."""
    try:
        tqdm = importlib.import_module("tqdm").tqdm
    except ImportError:
        return nullcontext(SimpleNamespace(n=0, update=lambda _: None))
    # None hides the bar if stderr is no terminal.
    hidden = True if quiet or sys.stderr is None else None
    return tqdm(unit="B", unit_scale=True, unit_divisor=1024, disable=hidden)


def _info(options: argparse.Namespace) -> None:
    path = Path(options.path)
    lines: Callable[[Path], list[str]] = _checkpoint_info
    if _is_params(path):
        lines = _params_info
    elif (path / CONFIG).exists():
        lines = _adapter_info
    print("\n".join(lines(path)))


def _is_params(path: Path) -> bool:
    """Whether `save` wrote the file; reading a damaged one raises."""
    if not path.is_file():
        return False
    with opened(path) as file:
        return KEY in (file.metadata() or {})


def _params_info(path: Path) -> list[str]:
    params = rows_file.read(path)
    rows = sum(len(spec.indices) for spec in params.specs.values())
    head = f"{path}: {rows} trained rows ({size(path.stat().st_size)})"
    return [head, *_matrices(params)]


def _adapter_info(path: Path) -> list[str]:
    adapter = read_adapter(path)
    lines = [f"{path}: an adapter of PEFT's, {adapter.config['peft_type']}"]
    for module, ids, rows in adapter.rows:
        lines += [
            f"  {module}",
            f"    rows      {len(ids):,} × {rows.shape[1]:,}: {_listed(ids)}",
            f"    deltas    {_dtype(rows.dtype)}, {size(rows.nbytes)}",
        ]
    if others := [*adapter.weights.values(), *adapter.other_keys]:
        lines.append(f"  and {len(others)} other tensors, such as {others[0]}")
    return lines


def _matrices(params: TokenDeltas) -> list[str]:
    lines = []
    for key, spec in params.specs.items():
        delta, originals = params.deltas[key], params.originals[key]
        lines += [
            f"  {' = '.join(spec.names)}",
            f"    rows      {spec.counted} × {spec.shape[1]:,}: {_listed(spec.indices.ids)}",
            f"    deltas    {_dtype(delta.dtype)}, {size(delta.nbytes)}",
            f"    originals {_dtype(originals.dtype)}, {size(originals.nbytes)}",
        ]
    return lines


def _checkpoint_info(path: Path) -> list[str]:
    checkpoint = open_checkpoint(path)
    headers = checkpoint.headers
    count = sum(map(len, headers.values()))
    lines = [
        f"{path}: {count} tensors in {len(headers)} .safetensors files; {size(checkpoint.size)} in "
        f"{len(checkpoint.files)} files"
    ]
    entries = {name: entry for header in headers.values() for name, entry in header.items()}
    weight: Counter[str] = Counter()
    for entry in entries.values():
        weight[entry.dtype] += entry.end - entry.start
    lines += [f"  {dtype:10} {size(total)}" for dtype, total in weight.most_common()]
    matrices = {name: entry for name, entry in entries.items() if len(entry.shape) == 2}
    most = max((entry.shape[0] for entry in matrices.values()), default=0)
    lines += [
        f"  {name}  {entry.shape[0]:,} × {entry.shape[1]:,} {entry.dtype}, "
        f"{size(entry.end - entry.start)}"
        for name, entry in matrices.items()
        if entry.shape[0] == most
    ]
    return lines


def _listed(ids: Sequence[int]) -> str:
    return ", ".join(map(str, ids[:8])) + (", …" if len(ids) > 8 else "")


def _dtype(dtype: object) -> str:
    return str(dtype).removeprefix("torch.")


def _message(error: BaseException) -> str:
    if isinstance(error, OSError) and error.strerror:
        where = f": {error.filename!r}" if error.filename is not None else ""
        text = f"{error.strerror}{where}"
    else:
        # str() of a KeyError gives the repr of its text.
        text = str(error.args[0]) if error.args else type(error).__name__
    return " ".join(text.split())


def _show_warning(message: Any, *_: Any, **__: Any) -> None:
    print(f"ttfunc: warning: {message}", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
