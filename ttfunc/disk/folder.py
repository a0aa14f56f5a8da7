"""What is in a checkpoint: its files, which of them hold the model, and the tensors in these."""

from __future__ import annotations

import contextlib
import os
import time
import warnings
from dataclasses import dataclass
from fnmatch import fnmatch
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

from ttfunc.disk.header import TensorEntry, read_header, read_json

INDEX = "model.safetensors.index.json"
_TICK = 20_000_000  # nanoseconds; longer than a tick of the clock that kernels stamp files with

# Other files with the same weights. They are copied as they are: a loader that prefers them gets
# the rows from before.
_OTHER_COPIES = (
    "*.safetensors", "pytorch_model*.bin", "consolidated*.pth", "*.gguf", "*.onnx", "*.onnx_data",
    "tf_model*.h5", "flax_model*.msgpack", "rust_model.ot", "*.ckpt",
)  # fmt: skip


class Stamp(NamedTuple):
    """Properties of a file, of which a write to it changes at least one."""

    size: int
    written: int
    changed: int
    inode: tuple[int, int]


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint on disk, as it was found; none of its files is open.

    root: the folder, or the file where there is only one. folders, files: everything below the
    root, relative to it (a single file is `""`). headers: the tensors of each file of the model.

    A merge writes rows at their bytes in a copy of the file. This needs a format that stores a
    matrix row by row, without compression or a checksum.
    """

    root: Path
    folders: list[str]
    files: dict[str, Stamp]
    headers: dict[str, dict[str, TensorEntry]]

    @property
    def size(self) -> int:
        """The bytes of all files together."""
        return sum(stamp.size for stamp in self.files.values())

    @cached_property
    def tensors(self) -> dict[str, TensorEntry]:
        """The tensors of all files of the model, by name."""
        return {name: entry for header in self.headers.values() for name, entry in header.items()}

    def check_unchanged(self) -> None:
        """Raise ValueError where a file is not as it was found."""
        _, now = _walk(self.root)
        names = sorted(now.keys() | self.files.keys())
        if changed := [name for name in names if now.get(name) != self.files.get(name)]:
            raise ValueError(
                f"{str(self.root / changed[0])!r} was changed while it was copied. Merge again "
                "when nothing writes to it."
            )


def open_checkpoint(source: Path) -> Checkpoint:
    """The checkpoint in a Hugging Face folder, sharded or not, or in one .safetensors file.

    It consists of all `.safetensors` files directly in the folder, and those that its index names.
    A symlink to a file counts as that file, wherever it leads; links to folders are not followed.

    Raises:
        FileNotFoundError: nothing is there, the folder holds no .safetensors file, or its index
            names one that is missing.
        ValueError: a broken header or index, a shard outside of the folder, or another copy of the
            model that loaders prefer.
    """
    if not source.exists():
        raise FileNotFoundError(
            f"there is no checkpoint at {str(source)!r}. Give a folder on this machine; for a "
            "model of the hub, give what huggingface_hub.snapshot_download returns."
        )
    folders, files = _settled(source)
    if source.is_file():
        return Checkpoint(source, folders, files, {"": read_header(source)})
    _check_copies(source, list(files))
    shards = [name for name in files if "/" not in name and name.endswith(".safetensors")]
    shards += sorted(_indexed(source, list(files)) - set(shards))
    if not shards:
        raise FileNotFoundError(
            f"the folder {str(source)!r} holds no .safetensors file, only {[*files][:8]}. Load the "
            "model and save it with model.save_pretrained(folder), then merge that folder."
        )
    return Checkpoint(source, folders, files, {name: read_header(source / name) for name in shards})


def check_copyable(root: Path) -> None:
    """Raise ValueError for what a copy of a folder cannot or should not carry over."""
    for folder, folders, names in os.walk(root):
        for path in (Path(folder, name) for name in folders):
            if path.is_symlink():
                raise ValueError(
                    f"{str(path)!r} is a symlink to a folder, which may lead anywhere. Put the "
                    "folder itself there, or merge a copy without it."
                )
        for path in (Path(folder, name) for name in names):
            if not path.is_file():
                raise ValueError(
                    f"{str(path)!r} is neither a file nor a symlink to one, and cannot be carried "
                    "over. Remove it, or merge a copy without it."
                )
            target = Path(os.path.realpath(path))
            # The cache of huggingface_hub keeps files in blobs/, and links to them from elsewhere.
            inside = Path(os.path.realpath(root)) in target.parents
            if path.is_symlink() and not inside and target.parent.name != "blobs":
                raise ValueError(
                    f"{str(path)!r} is a symlink that leaves the folder, to {str(target)!r}. Put "
                    "the file itself there, or merge a copy of the folder (cp -rL)."
                )


def warn_of_copies(checkpoint: Checkpoint) -> None:
    """Warn of files that seem to hold the same weights, and are copied without the new rows."""
    copies = [
        name
        for name in checkpoint.files
        if name not in checkpoint.headers
        and any(fnmatch(name.rpartition("/")[2], pattern) for pattern in _OTHER_COPIES)
    ]
    if copies:
        warnings.warn(
            f"{copies} in {str(checkpoint.root)!r} may hold the same weights and are copied as "
            "they are: only the .safetensors files of the model are written to. Delete these "
            "copies from the new folder, unless you need the model as it was.",
            stacklevel=4,
        )


def says_tied(checkpoint: Checkpoint) -> bool | None:
    """Whether the config ties the head to the embedding; None if it does not say.

    The config of a part, such as a language model's in a larger model, counts where the whole
    config does not say. A checkpoint without a config counts as untied.
    """
    if "config.json" not in checkpoint.files:
        return False
    try:
        config: Any = read_json(checkpoint.root / "config.json")
    except ValueError:
        return None
    parts = [config, *config.values()] if isinstance(config, dict) else []
    values = [part.get("tie_word_embeddings") for part in parts if isinstance(part, dict)]
    return next((value for value in values if isinstance(value, bool)), None)


def _settled(root: Path) -> tuple[list[str], dict[str, Stamp]]:
    """The result of `_walk`, once it is so old that each later write changes a stamp."""
    found = _walk(root)
    # On Windows `changed` is the time at which the file was made, so both times count.
    newest = [max(stamp.written, stamp.changed) for stamp in found[1].values()]
    if any(time.time_ns() - stamp < _TICK for stamp in newest):
        time.sleep(_TICK / 1e9)  # a write in the same tick of the clock would not change the stamp
        found = _walk(root)
    return found


def _walk(root: Path) -> tuple[list[str], dict[str, Stamp]]:
    """Folders (each after the one that holds it) and files below `root`, relative to it."""
    if root.is_file():
        return [], _stamps(root, [""])
    if not root.is_dir():
        raise ValueError(f"{str(root)!r} is neither a folder nor a file. Give a checkpoint.")
    folders, files = [], []
    for folder, below, names in os.walk(root, onerror=_raise):
        here = Path(folder).relative_to(root)
        folders += [(here / name).as_posix() for name in below]
        files += [(here / name).as_posix() for name in names]
    return folders, _stamps(root, sorted(files))


def _stamps(root: Path, files: list[str]) -> dict[str, Stamp]:
    """The stamps of these files; a file that is missing has none."""
    stamps = {}
    for name in files:
        with contextlib.suppress(FileNotFoundError):
            found = (root / name).stat()
            inode = (found.st_dev, found.st_ino)
            stamps[name] = Stamp(found.st_size, found.st_mtime_ns, found.st_ctime_ns, inode)
    return stamps


def _raise(error: OSError) -> None:
    raise error


def _check_copies(source: Path, files: list[str]) -> None:
    # Some servers that find Mistral's own files read them and not the model's.
    top = [name for name in files if "/" not in name]
    if preferred := [name for name in top if fnmatch(name, "consolidated*.safetensors")]:
        raise ValueError(
            f"the folder {str(source)!r} holds the model twice: {preferred} name its tensors in "
            "another way, and some servers prefer them to the merged files. Merge a copy of the "
            "folder without them (snapshot_download takes ignore_patterns='consolidated*')."
        )


def _indexed(source: Path, files: list[str]) -> set[str]:
    """The files that the folder's index names; all of them are in `files`."""
    if INDEX not in files:
        return set()
    try:
        index: Any = read_json(source / INDEX)
        weight_map = index.get("weight_map") if isinstance(index, dict) else None
        if not isinstance(weight_map, dict) or not weight_map:
            raise ValueError("it has no weight_map")
        if not all(isinstance(shard, str) for shard in weight_map.values()):
            raise ValueError("its weight_map names a file that is no string")
    except ValueError as error:
        raise ValueError(
            f"{str(source / INDEX)!r} is no index of shards: {error}. Download or save it again."
        ) from None
    for shard in sorted({*weight_map.values()} - {*files}):
        if Path(shard).is_absolute() or ".." in Path(shard).parts:
            raise ValueError(
                f"{INDEX} in {str(source)!r} names {shard!r}, which is outside of the folder. An "
                "index names files of its own folder: do not trust this checkpoint."
            )
        raise FileNotFoundError(
            f"{INDEX} names {shard!r}, and {str(source)!r} has no such file. Complete the download."
        )
    return set(weight_map.values())
