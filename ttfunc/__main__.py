"""Merging checkpoints from the command line."""

from __future__ import annotations

import argparse
import importlib
import io
import signal
import sys
import threading
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from ttfunc import __version__
from ttfunc.disk import rows_file
from ttfunc.disk.checkpoint import merge_checkpoint, unmerge_checkpoint
from ttfunc.info import info, of_params
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
    parser.add_argument("--version", action="version", version=f"ttfunc {__version__}")
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")
    for name, what in (
        ("merge", "copy a checkpoint, with the trained rows in it"),
        ("unmerge", "copy a merged checkpoint, with the original rows back in place"),
    ):
        command = commands.add_parser(name, help=what, description=f"{what[0].upper()}{what[1:]}.")
        _take_copy(command, name)
    what = "what a file of trained rows, an adapter of PEFT's, or a checkpoint holds"
    _take_info(commands.add_parser("info", help=what, description=f"{what[0].upper()}{what[1:]}."))
    return parser


def _take_copy(command: argparse.ArgumentParser, name: str) -> None:
    command.add_argument(
        "source", metavar="MODEL", help="a folder with .safetensors files, or one such file"
    )
    command.add_argument("params", metavar="ROWS", help="the file that ttfunc.save wrote")
    command.add_argument(
        "destination", metavar="MERGED", help="the copy; nothing may have this name yet"
    )
    command.add_argument(
        "--name",
        action=_Names,
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


def _take_info(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "path", type=Path, metavar="ROWS", help="the file that ttfunc.save wrote, or a folder"
    )
    command.add_argument(
        "--tokenizer", type=Path, metavar="FOLDER", help="tell of each trained token, with its text"
    )
    command.add_argument(
        "--model",
        type=Path,
        metavar="FOLDER",
        help="compare each trained row to those of this model, of which no more is read",
    )
    command.set_defaults(run=_info)


class _Names(argparse.Action):
    """Collects pairs; none is dropped because another has the same name."""

    def __call__(self, parser: Any, namespace: Any, values: Any, option: str | None = None) -> None:
        name, equals, other = values.partition("=")
        if not (name and equals and other):
            raise argparse.ArgumentError(
                self, f"{values!r} is not MODEL=CHECKPOINT, a name on each side"
            )
        names = getattr(namespace, self.dest)
        if name in names:
            raise argparse.ArgumentError(
                self, f"{name!r} is given twice, as {names[name]!r} and {other!r}: give it once"
            )
        setattr(namespace, self.dest, {**names, name: other})


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
        for lines, _ in of_params(rows_file.read(options.params)):
            print("\n".join(lines))


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
    print("\n".join(info(options.path, options.tokenizer, options.model)))  # all of it, or none


def _message(error: BaseException) -> str:
    # str() of a KeyError gives the repr of its text.
    text = str(error.args[0]) if error.args else type(error).__name__
    if isinstance(error, OSError) and error.strerror:
        text = error.strerror + (f": {error.filename!r}" if error.filename is not None else "")
    return " ".join(text.split())


def _show_warning(message: Any, *_: Any, **__: Any) -> None:
    print(f"ttfunc: warning: {message}", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
