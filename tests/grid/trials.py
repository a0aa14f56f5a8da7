"""What a cell is tried with: the model, the rows, a text; and what the oracle gives for them."""

from __future__ import annotations

import random
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from tests.grid.cells import Cell
from tests.grid.subjects import FAMILIES, built, filled, inputs_of, longer, results_of
from ttfunc import TokenDeltas, init_deltas

BATCH, LENGTH, GENERATED = 3, 5, 3
Gradient = dict[tuple[int, str, int], Tensor]  # of a row, by adapter, matrix and token


class Part(NamedTuple):
    """Some examples of the batch, and the adapters that they are for."""

    adapters: tuple[int, ...]
    ids: Tensor
    labels: Tensor


class Trial:
    """A cell with all that its seed draws. Making the rows may be refused."""

    def __init__(self, cell: Cell) -> None:
        self.cell, self.family = cell, FAMILIES[cell.family]
        self.rng = random.Random(str(cell))  # noqa: S311
        self.model = filled(built(self.family, cell.wrap, self.family.size), cell.seed)
        # Kept from before the model is called, or sharded.
        self.state = {name: one.clone() for name, one in self.model.state_dict().items()}
        self.grown = 0 if cell.rows == "old" else self.rng.randint(1, 2)
        self.mixed = cell.way.endswith("mixed")  # an adapter for each example
        self.several = self.mixed or cell.way == "vmap"
        self.assignment: list[int] = []
        self._draw_ids()
        self._draw_text()

    def _draw_ids(self) -> None:
        """The tokens of each adapter: those side by side may share some, those together do not."""
        size, rng = self.family.size, self.rng
        count = rng.randint(1, 3) if self.several else rng.choice([1, 1, 2])
        new = range(size, size + self.grown)
        left = rng.sample(range(1, size), 12)  # 0 is the padding
        self.ids = []
        for number in range(count):
            old = rng.sample(left, rng.randint(1, 4)) if self.cell.rows != "new" else []
            if self.several:
                own = [*old, *new]
            else:
                left = [token for token in left if token not in old]
                own = [*old, *(token + number * self.grown for token in new)]
            self.ids.append(rng.sample(own, len(own)))

    def _draw_text(self) -> None:
        rng, used = self.rng, sorted({token for ids in self.ids for token in ids})
        self.size = max(self.family.size, used[-1] + 1)  # of the vocabulary with the new tokens
        tokens = [rng.randrange(1, self.size) for _ in range(2 * BATCH * LENGTH)]
        for place in rng.sample(range(len(tokens)), len(tokens) // 2):
            tokens[place] = rng.choice(used)
        self.text, self.labels = torch.tensor(tokens).view(2, BATCH, LENGTH)
        self.labels[:, 1:3] = -100
        if self.mixed:
            plain = [] if self.grown else [-1]
            choices = [*range(len(self.ids)), *plain]
            self.assignment = [rng.choice(choices) for _ in range(BATCH)]

    def make_rows(self) -> None:
        """The rows of each adapter, as a user makes them: before the model is sharded, or after."""
        late = self.rng.random() < 0.5
        if self.cell.way == "fsdp2" and late:
            shard(self.model)
        generator = torch.Generator().manual_seed(self.cell.seed)

        def values(base: Tensor, ids: Tensor) -> Tensor:
            return torch.randn(len(ids), base.shape[1], generator=generator)

        self.adapters: list[TokenDeltas] = []
        for ids in self.ids:
            after = self.adapters[0] if self.adapters and not self.several and self.grown else None
            options: dict[str, Any] = {"grow": True} if self.grown else {}
            options = {"after": after} if after is not None else options
            idx, targets = self.asked(ids)
            rows = init_deltas(
                self.model, idx, targets=targets, init=values, requires_grad=True, **options
            )
            self.adapters.append(rows)
        if self.cell.way == "fsdp2" and not late:
            shard(self.model)

    def asked(self, ids: list[int]) -> tuple[list[int] | dict[str, list[int]], list[str] | None]:
        """The ids and the targets, as `init_deltas` takes them."""
        targets = self.targets()
        if self.cell.ends != "apart":
            return ids, targets
        others = [1 + token % (self.family.size - 1) for token in ids]
        return dict(zip(targets, (ids, others), strict=True)), None

    def targets(self) -> list[str] | None:
        """The modules whose rows are trained, by the names that they have within the adapter."""
        ends = {"default": [], "input": ["embedding"], "head": ["head"]}
        inner = {
            "lora": ".base_layer",
            "saved": ".modules_to_save.default",
        }
        kind, _, part = self.cell.wrap.partition("_")
        return [
            getattr(self.family, end) + (inner[kind] if end == part else "")
            for end in ends.get(self.cell.ends, ["embedding", "head"])
        ] or None

    def inputs(self) -> dict[str, Tensor]:
        return inputs_of(self.model, self.text)

    def labelled(self) -> dict[str, Tensor]:
        """The inputs with the labels, where the model makes its own loss."""
        return inputs_of(self.model, self.text, self.labels)

    # --- the oracle

    def parts(self) -> list[Part]:
        """The batch, apart for each set of adapters that a part of it is called with."""
        if self.mixed:
            return [
                Part((number,), self.text[b : b + 1], self.labels[b : b + 1])
                for b, number in enumerate(self.assignment)
            ]
        sets = (
            [(n,) for n in range(len(self.ids))] if self.several else [tuple(range(len(self.ids)))]
        )
        return [Part(adapters, self.text, self.labels) for adapters in sets]

    @torch.no_grad()
    def oracle(self, adapters: tuple[int, ...]) -> nn.Module:
        """A model that was built with the new size, with the rows written into it."""
        model = longer(self.state, self.family, self.cell.wrap, self.size)
        for number in adapters:
            if number >= 0:
                write(model, self.adapters[number])
        return model

    def expected(self) -> tuple[Tensor, Tensor, Gradient]:
        """The logits, the loss and the gradient of the rows."""
        parts, logits, losses, gradient = self.parts(), [], [], Gradient()
        for part in parts:
            model = self.oracle(part.adapters).requires_grad_()
            out = model(**inputs_of(model, part.ids, part.labels))
            some, loss = results_of(out, part.labels)
            (loss / len(parts)).backward()
            logits.append(some.detach())
            losses.append(loss.detach())
            for number in part.adapters:
                if number >= 0:
                    own = rows_of_gradient(
                        model, self.adapters[number], number if self.several else 0
                    )
                    for key, row in own.items():
                        gradient[key] = gradient.get(key, 0) + row
        return torch.cat(logits), torch.stack(losses).mean(), gradient

    def generated(self) -> tuple[Tensor, Tensor]:
        """The tokens that the oracle says, and the logits that it chose them by."""
        each = [
            said(self.oracle(part.adapters).generate(**self.generation(part.ids)))
            for part in self.parts()
        ]
        tokens, logits = zip(*each, strict=True)
        return torch.cat(tokens), torch.cat(logits)

    def generation(self, ids: Tensor | None = None) -> dict[str, Any]:
        options = {"max_new_tokens": GENERATED, "do_sample": False, "pad_token_id": 0}
        options |= {"return_dict_in_generate": True, "output_logits": True}
        return {"input_ids": self.text if ids is None else ids, **options}


def shard(model: nn.Module) -> None:
    """By FSDP2, as one group, over ranks that read the same text."""
    fully_shard(model, mesh=init_device_mesh("cpu", (torch.distributed.get_world_size(),)))


def said(out: Any) -> tuple[Tensor, Tensor]:
    """The tokens that were generated, `(B, L)`, and the logits of each, `(B, steps, V)`."""
    return out.sequences, torch.stack(out.logits, 1)


@torch.no_grad()
def write(model: nn.Module, params: TokenDeltas) -> None:
    """Write the rows into the matrices of a model that have these names."""
    for name, delta in params.deltas.items():
        model.get_parameter(name)[params.token_indices[name]] = delta.detach()


def rows_of_gradient(model: nn.Module, params: TokenDeltas, number: int) -> Gradient:
    """The gradient of these rows: from each parameter over the matrix's memory."""
    found: Gradient = {}
    for name, ids in params.token_indices.items():
        place = model.get_parameter(name).data_ptr()
        full = sum(
            torch.zeros_like(one) if one.grad is None else one.grad
            for one in model.parameters()
            if one.data_ptr() == place
        )
        found |= {(number, name, token): full[token] for token in ids.tolist()}
    return found
