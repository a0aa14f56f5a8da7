"""What is interrupted and killed: writes to a folder, and what must hold of it afterwards."""

from __future__ import annotations

import shutil
from pathlib import Path

import torch
from torch import nn

from tests.helpers.checkpoints import contents, leftovers, written
from ttfunc import init_deltas, load_peft, merge_checkpoint, save, save_peft, unmerge_checkpoint

NAME = "model.embed_tokens.weight"
A, B = [1, 2], [5, 6]  # the ids of two adapters, whose rows are full of the first of them


class Work:
    """What is interrupted, in a folder of its own, and what must hold after."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.model = nn.ModuleDict(
            {"model": nn.ModuleDict({"embed_tokens": nn.Embedding(200, 4)})}
        ).requires_grad_(False)
        self.params = [
            init_deltas(self.model, ids, init=torch.full((2, 4), float(ids[0]))) for ids in (A, B)
        ]
        self.turn = 0

    def act(self) -> None:
        raise NotImplementedError

    def state(self) -> str:
        """What is there: one of the names that may be, or AssertionError."""
        raise NotImplementedError

    def next(self) -> None:
        self.turn += 1


class SavePeft(Work):
    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.act()

    def act(self) -> None:
        save_peft(self.params[self.turn % 2], self.folder / "adapter")

    def state(self) -> str:
        return self.owner(load_peft(self.folder / "adapter", self.model))

    def owner(self, params) -> str:
        ids, values = params.token_indices[NAME].tolist(), params.deltas[NAME]
        assert ids in (A, B)
        assert (values == ids[0]).all(), f"mixed: rows {values[0, 0]} for the tokens {ids}"
        return "new" if ids == (A, B)[self.turn % 2] else "old"

    def litter(self) -> list[str]:
        return leftovers(self.folder / "adapter")


class Save(Work):
    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.act()
        self.turn += 1
        self.files = [(folder / "rows").read_bytes()]
        self.act()
        self.files.append((folder / "rows").read_bytes())
        self.turn += 1

    def act(self) -> None:
        save(self.params[self.turn % 2], self.folder / "rows")

    def state(self) -> str:
        found = self.files.index((self.folder / "rows").read_bytes())
        return "new" if found == self.turn % 2 else "old"

    def litter(self) -> list[str]:
        return leftovers(self.folder)


class Merge(Work):
    write = staticmethod(merge_checkpoint)

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.source = written(folder / "source", self.model.state_dict())
        (self.source / "deep").mkdir()
        (self.source / "deep" / "large.bin").write_bytes(bytes(2**16))
        if self.write is unmerge_checkpoint:
            merge_checkpoint(self.source, self.params[0], folder / "merged")
            self.source = folder / "merged"
        self.before = contents(self.source)
        self.act()
        self.whole = contents(self.folder / "out")
        shutil.rmtree(self.folder / "out")

    def act(self) -> None:
        self.write(self.source, self.params[0], self.folder / "out")

    def state(self) -> str:
        assert contents(self.source) == self.before, "the source was changed"
        if not (self.folder / "out").exists():
            return "old"
        assert contents(self.folder / "out") == self.whole, "half a destination"
        return "new"

    def litter(self) -> list[str]:
        return leftovers(self.folder)

    def next(self) -> None:
        if (self.folder / "out").exists():
            shutil.rmtree(self.folder / "out")


class Unmerge(Merge):
    write = staticmethod(unmerge_checkpoint)


KINDS: dict[str, type[Work]] = {
    "save_peft": SavePeft,
    "save": Save,
    "merge_checkpoint": Merge,
    "unmerge_checkpoint": Unmerge,
}
