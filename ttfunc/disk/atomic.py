"""Files that appear whole or not at all: written under a temporary name, synced, renamed once.

Python runs signal handlers, and so raises KeyboardInterrupt, between any two bytecodes of the main
thread. This includes those in `finally` and `except`, so no order of statements is safe. Work that
must not be left half done runs in a thread of its own (`to_the_end`), where no handler runs.
"""

from __future__ import annotations

import _thread  # threading's own start may be interrupted while it holds locks of Python
import contextlib
import ctypes
import errno
import os
import secrets
import shutil
import stat
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from pathlib import Path
from typing import BinaryIO, TypeAlias, TypeVar

Edits: TypeAlias = Iterable[tuple[int, memoryview]]
Piece: TypeAlias = "bytes | range"
T = TypeVar("T")

_BLOCK = 1 << 20  # bytes that are in memory at a time
_SPAN = 1 << 24  # bytes that the kernel copies between two reports of progress
# Values of errno that mean: copy_file_range does not support these files (no copying has failed).
_UNSUPPORTED = {errno.EXDEV, errno.ENOSYS, errno.EINVAL, errno.EOPNOTSUPP, errno.EPERM}
_AT_FDCWD, _RENAME_NOREPLACE = -100, 1
# Windows opens no folder, and syncs a file only through a descriptor that can write.
_IS_POSIX = os.name == "posix"


def stage(destination: Path, make: Callable[[Path], None]) -> None:
    """Call `make` with a temporary path, and rename what it made there to `destination`.

    The path is `.<name>.ttfunc-<random>.partial`, beside the destination. A killed run may leave it
    there; it can be deleted. If `make` raises or is interrupted, what it made is removed.
    """
    name = destination.name
    # A name has at most 255 bytes, and macOS does not take half a character.
    while len(os.fsencode(name)) > 200:
        name = name[:-1]
    partial = destination.parent / f".{name}.ttfunc-{secrets.token_hex(4)}.partial"
    try:
        make(partial)
        rename_new(partial, destination)
    except BaseException:
        to_the_end(lambda: _remove(partial))
        raise
    sync_directory(destination.parent)


def to_the_end(act: Callable[[], T]) -> T:
    """Run `act()` once and completely; raise an interrupt that comes meanwhile at its end.

    So `act` should be short, and should wait for nothing. Returns and raises what `act` does.
    """
    claim, ended = _thread.allocate_lock(), _thread.allocate_lock()
    outcome: list[tuple[Callable[[], T], BaseException | None]] = []

    def work() -> None:
        if not claim.acquire(blocking=False):  # an interrupt made the loop start it twice
            return
        try:
            result = act()
            outcome.append((lambda: result, None))
        except BaseException as error:
            outcome.append((act, error))
        ended.release()

    ended.acquire()
    interrupt: BaseException | None = None
    while not outcome:
        try:
            _thread.start_new_thread(work, ())
            while not outcome:
                # An interrupt may come just as the lock is taken, so look at the outcome again.
                ended.acquire(timeout=0.1)
        except BaseException as error:
            if isinstance(error, RuntimeError) and claim.acquire(blocking=False):
                return act()  # no thread can be started here
            interrupt = error
    result, failure = outcome.pop()
    if interrupt is not None:
        raise interrupt from failure
    if failure is not None:
        raise failure
    return result()


def writable(path: Path) -> Path:
    """`path`, if a file can be created or replaced there. Raises OSError if not."""
    real = Path(os.path.realpath(path))
    if path.is_dir() or not real.parent.is_dir():
        raise FileNotFoundError(
            f"{str(path)!r} is no place for a file: it is a folder, or there is no "
            f"{str(real.parent)!r}. Give the name of a file in a folder that exists."
        )
    if real.is_symlink() or (path.exists() and not path.is_file()):
        raise FileExistsError(
            f"{str(path)!r} is no place for a file: it is a "
            f"{'loop of symlinks' if real.is_symlink() else 'device, a pipe or a socket'}. "
            "Give the name of a regular file."
        )
    return path


def write_file(path: Path, data: bytes) -> None:
    """Write a file with this content over any file at `path`, whole or not at all."""

    def write() -> None:
        with replacement(path, data) as temporary:
            temporary.replace(path)
            sync_directory(path.parent)

    to_the_end(write)


@contextlib.contextmanager
def replacement(path: Path, data: bytes) -> Iterator[Path]:
    """A synced file beside `path` with this content; removed at the end if nobody renamed it.

    It has the permissions of the file at `path`. Use it only within `to_the_end`, where nothing
    interrupts.
    """
    temporary = path.with_name(f".ttfunc-{secrets.token_hex(8)}.partial")
    try:
        with temporary.open("xb") as file:
            file.write(data)
            file.flush()
            if path.exists():
                temporary.chmod(stat.S_IMODE(path.stat().st_mode))
            os.fsync(file.fileno())
        yield temporary
    finally:
        temporary.unlink(missing_ok=True)


def open_file(path: Path) -> BinaryIO:
    """A regular file, open to read. Raises ValueError for a pipe, of which a read may never end."""
    at_once = getattr(os, "O_NONBLOCK", 0)
    file = open(  # noqa: SIM115 (it is returned)
        path, "rb", opener=lambda name, flags: os.open(name, flags | at_once)
    )
    if stat.S_ISREG(os.fstat(file.fileno()).st_mode):
        return file
    file.close()
    raise ValueError(f"{str(path)!r} is no regular file. Put the file itself there.")


def rename_new(source: Path, destination: Path) -> None:
    """Rename in one step, only if nothing has the new name (os.rename replaces an empty folder)."""
    library = ctypes.CDLL(None, use_errno=True) if _IS_POSIX else None
    renameat2 = getattr(library, "renameat2", None)
    if renameat2 is not None:
        old, new = os.fsencode(source), os.fsencode(destination)
        if renameat2(_AT_FDCWD, old, _AT_FDCWD, new, _RENAME_NOREPLACE) == 0:
            return
        code = ctypes.get_errno()
        if code not in (errno.ENOSYS, errno.EINVAL):  # the kernel or file system has no such call
            raise OSError(code, os.strerror(code), str(destination))
    if os.path.lexists(destination):
        raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(destination))
    source.rename(destination)


def copy_file(
    source: Path, destination: Path, edits: Edits, pieces: Sequence[Piece] | None = None
) -> Generator[int]:
    """Write a copy of a file, with its permissions, then `edits` at their offsets; sync it.

    pieces: what the copy consists of: bytes as they are, and ranges of the source. By default it is
    the whole source.

    The kernel copies, and shares the blocks where the file system can. Yields the number of bytes
    that were copied since the last yield; the file is whole at the end. Raises an OSError that
    names the source.
    """
    with open_file(source) as reader:
        status = os.fstat(reader.fileno())
        try:
            with destination.open("xb") as writer:
                at = 0
                for piece in [range(status.st_size)] if pieces is None else pieces:
                    if isinstance(piece, range):
                        yield from _copy_bytes(reader, writer, piece, at)
                    else:
                        writer.seek(at)
                        writer.write(piece)
                        writer.flush()  # the kernel copies past the buffer
                    at += len(piece)
                for offset, block in edits:
                    writer.seek(offset)
                    writer.write(block)
                writer.flush()
                destination.chmod(status.st_mode & 0o777)
                os.fsync(writer.fileno())
        except OSError as error:
            reason = f"{error.strerror}, while copying (nothing of the destination was kept)"
            raise OSError(error.errno, reason, str(source)) from error


def _copy_bytes(reader: BinaryIO, writer: BinaryIO, span: range, at: int) -> Iterator[int]:
    """Copy the bytes of this span to the offset `at`. Yields how many after each step."""
    done, in_kernel = span.start, hasattr(os, "copy_file_range")
    while done < span.stop:
        copied, left, target = 0, span.stop - done, at + done - span.start
        if in_kernel:
            copied = _kernel_copy(reader.fileno(), writer.fileno(), done, target, min(left, _SPAN))
            in_kernel = copied > 0  # some file systems copy nothing and say so
        if not in_kernel:
            reader.seek(done)
            writer.seek(target)
            copied = writer.write(reader.read(min(left, _BLOCK)))
            writer.flush()
            if not copied:
                raise OSError(errno.EIO, f"the file ends at {done} of {span.stop} bytes")
        _begin_writing(writer.fileno(), target, copied)
        done += copied
        yield copied


def _begin_writing(descriptor: int, offset: int, count: int) -> None:
    # This advice makes the kernel write dirty pages; else the disk would be idle until the sync.
    if hasattr(os, "posix_fadvise"):
        with contextlib.suppress(OSError):  # only advice
            os.posix_fadvise(descriptor, offset, count, os.POSIX_FADV_DONTNEED)


def _kernel_copy(source: int, destination: int, offset: int, at: int, count: int) -> int:
    try:
        return os.copy_file_range(source, destination, count, offset, at)
    except OSError as error:
        if error.errno not in _UNSUPPORTED:
            raise
        return 0


def make_directory(source: Path, destination: Path) -> None:
    """Make a folder with the permissions of `source`, in which its owner can also write."""
    destination.mkdir()
    destination.chmod(stat.S_IMODE(source.stat().st_mode) | stat.S_IRWXU)


def sync_file(path: Path) -> None:
    """Make the contents of a file survive a loss of power."""
    with path.open("rb" if _IS_POSIX else "r+b") as file:
        os.fsync(file.fileno())


def sync_directory(path: Path) -> None:
    """Make the names in a folder survive a loss of power; Windows has no call for it."""
    if not _IS_POSIX:
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # some file systems cannot sync these
            raise
    finally:
        os.close(descriptor)


def _remove(path: Path) -> None:
    # An error here must not hide the error that led here.
    with contextlib.suppress(OSError):
        shutil.rmtree(path) if path.is_dir() else path.unlink()
