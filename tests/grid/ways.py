"""The ways to call, and what is looked at in each of them."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

from tests.grid.subjects import built, results_of
from tests.grid.trials import Gradient, Trial, said
from tests.helpers.checkpoints import contents
from tests.helpers.oracle import same_bits
from ttfunc import (
    Exportable,
    TokenDeltas,
    TokenModule,
    combine,
    functional_call,
    merge,
    merge_checkpoint,
    patch,
    patch_mixed,
    save,
    stack,
    unmerge,
    unmerge_checkpoint,
)

Inputs = Mapping[str, Any]
ROWS = 12  # of an exported program


class Way:
    """Calls a model with the rows of a trial. The leaves are what is trained."""

    def __init__(self, trial: Trial) -> None:
        self.trial = trial
        self.leaves = list(trial.adapters)

    def weights(self) -> dict[str, Tensor]:
        return patch(*self.trial.adapters)

    def call(self, inputs: Inputs, method: str = "forward") -> Any:
        return functional_call(self.trial.model, self.weights(), (), inputs, method=method)

    def results(self) -> tuple[Tensor, Tensor]:
        """The logits and the loss."""
        return results_of(self.call(self.trial.labelled()), self.trial.labels)

    def gradient(self, loss: Tensor) -> Gradient:
        """The gradient of each row that is trained."""
        found = Gradient()
        for number, params in enumerate(self.leaves):
            deltas = list(params.deltas.values())
            rows = torch.autograd.grad(
                loss, deltas, retain_graph=True, allow_unused=True, materialize_grads=True
            )
            for name, row in zip(params.deltas, rows, strict=True):
                ids = params.token_indices[name].tolist()
                adapter = number if self.trial.several else 0
                found |= {(adapter, name, token): row[i] for i, token in enumerate(ids)}
        return found


class Dense(Way):
    def weights(self) -> dict[str, Tensor]:
        return patch(*self.trial.adapters, dense=True)


class Deferred(Way):
    def weights(self) -> dict[str, Tensor]:
        return patch(*self.trial.adapters, deferred_logits=True)


class Mixed(Way):
    def weights(self) -> dict[str, Tensor]:
        return patch_mixed(self.trial.adapters, self.trial.assignment)


class Vmap(Way):
    def results(self) -> tuple[Tensor, Tensor]:
        trial = self.trial

        def one(params: TokenDeltas) -> tuple[Tensor, Tensor]:
            out = functional_call(trial.model, patch(params), (), trial.labelled())
            return results_of(out, trial.labels)

        logits, losses = torch.vmap(one)(stack(trial.adapters))
        return logits.flatten(0, 1), losses.mean()


class Module(Way):
    def __init__(self, trial: Trial) -> None:
        super().__init__(trial)
        rows = combine(*trial.adapters)
        deltas = {name: delta.detach().requires_grad_() for name, delta in rows.deltas.items()}
        self.module = TokenModule(trial.model, TokenDeltas(deltas, rows.specs))
        self.leaves = [self.module.params()]

    def call(self, inputs: Inputs, method: str = "forward") -> Any:
        return getattr(self.module, method)(**inputs)


class Program(Way):
    """An Exportable as it is, whose rows and ids are inputs."""

    def __init__(self, trial: Trial) -> None:
        super().__init__(trial)
        # A cache is no output of a program.
        options = {"use_cache": False} if trial.family.generates else {}
        targets, self.mixed = trial.targets(), trial.mixed
        self.program = Exportable(
            trial.model, targets=targets, kwargs=options, assignment=self.mixed
        )
        if self.mixed:
            self.rows = trial.adapters
            more: dict[str, Any] = {"assignment": trial.assignment, "adapters": 4}
            self.inputs = self.program.inputs(self.rows, rows=ROWS, **more)
        else:
            self.rows = [combine(*trial.adapters)]
            self.inputs = self.program.inputs(self.rows[0], rows=ROWS)
        values, names = self.inputs[0], list(self.program.matrices)
        each = values if isinstance(values, Mapping) else {names[0]: values}
        self.padded = {name: one.requires_grad_() for name, one in each.items()}

    def call(self, inputs: Inputs, method: str = "forward") -> Any:
        return self.program(*self.inputs, **inputs)

    def gradient(self, loss: Tensor) -> Gradient:
        padded = torch.autograd.grad(
            loss, list(self.padded.values()), allow_unused=True, materialize_grads=True
        )
        return {
            (number, name, token): (rows[number] if self.mixed else rows)[i]
            for name, rows in zip(self.padded, padded, strict=True)
            for number, params in enumerate(self.rows)
            if name in params.specs
            for i, token in enumerate(params.token_indices[name].tolist())
        }


class Exported(Program):
    def call(self, inputs: Inputs, method: str = "forward") -> Any:
        exported = torch.export.export(self.program, self.inputs, dict(inputs), strict=False)
        return exported.module()(*self.inputs, **inputs)


class Compiled(Way):
    def call(self, inputs: Inputs, method: str = "forward") -> Any:
        torch.compiler.reset()
        model = self.trial.model

        @torch.compile(backend="aot_eager")
        def run(adapters: list[TokenDeltas], inputs: Inputs) -> Any:
            return functional_call(model, patch(*adapters), (), inputs)

        return run(self.trial.adapters, inputs)


WAYS: dict[str, Callable[[Trial], Way]] = {
    "patch": Way,
    "dense": Dense,
    "deferred": Deferred,
    "mixed": Mixed,
    "vmap": Vmap,
    "module": Module,
    "program": Program,
    "program_mixed": Program,
    "exported": Exported,
    "exported_mixed": Exported,
    "compiled": Compiled,
    "fsdp2": lambda trial: trial.rng.choice([Way, Deferred, Module])(trial),
}


def called(trial: Trial) -> Way:
    """The way of the cell."""
    return WAYS[trial.cell.way](trial)


def compare(trial: Trial) -> None:
    """Raise AssertionError where the way differs from the oracle in what the cell looks at."""
    LOOKS[trial.cell.look](trial)


def _logits(trial: Trial) -> None:
    expected, _, _ = trial.expected()
    found, _ = called(trial).results()
    _close(found * 1, expected)  # which are made here where they wait


def _loss(trial: Trial) -> None:
    _, expected, _ = trial.expected()
    _, found = called(trial).results()
    _close(found, expected)


def _gradient(trial: Trial) -> None:
    _, _, expected = trial.expected()
    way = called(trial)
    _, loss = way.results()
    found = way.gradient(loss)
    assert found.keys() >= expected.keys()
    scale = max([1.0, *(float(row.abs().max()) for row in expected.values())])
    for key, row in found.items():  # 0 where no example has the adapter
        _close(row, expected.get(key, torch.zeros_like(row)), atol=1e-4 * scale)


def _generate(trial: Trial) -> None:
    """The logits too: a token that cannot be said may be one that is not."""
    tokens, logits = trial.generated()
    found, its_logits = said(called(trial).call(trial.generation(), "generate"))
    _close(its_logits, logits)
    assert torch.equal(found, tokens), f"{found.tolist()} for {tokens.tolist()}"


def _state_dict(trial: Trial) -> None:
    """Entries that a larger model has of an adapter, or does not read, may stay as they were."""
    expected = trial.oracle(tuple(range(len(trial.adapters)))).state_dict()
    state = trial.model.state_dict()
    if trial.cell.way == "fsdp2":
        options = StateDictOptions(full_state_dict=True)
        state = get_model_state_dict(trial.model, options=options)
    merged = merge(state, *trial.adapters)
    assert merged.keys() == expected.keys()
    for name, tensor in expected.items():
        kept = "lora_" in name or "original_module" in name
        if not (kept and merged[name] is state[name]):
            _close(merged[name], tensor, atol=0)
    assert same_bits(unmerge(merged, *trial.adapters), state)


def _folder(trial: Trial) -> None:
    """The folder of the model without an adapter, with the rows in it."""
    source = _base(trial, trial.model.state_dict(), trial.family.size)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        source.save_pretrained(folder / "source")
        rows: Any = combine(*trial.adapters)
        if trial.rng.random() < 0.5:
            save(rows, folder / "rows.safetensors")
            rows = folder / "rows.safetensors"
        if trial.cell.way == "module":
            Module(trial).module.save_pretrained(folder / "merged")
        else:
            merge_checkpoint(folder / "source", rows, folder / "merged")
            unmerge_checkpoint(folder / "merged", rows, folder / "back")
            assert contents(folder / "back") == contents(folder / "source")
        loaded = type(source).from_pretrained(folder / "merged", attn_implementation="eager")
    assert loaded.config.get_text_config().vocab_size == trial.size
    expected = _base(
        trial, trial.oracle(tuple(range(len(trial.adapters)))).state_dict(), trial.size
    )
    with torch.no_grad():
        _close(loaded.eval()(**trial.inputs()).logits, expected(**trial.inputs()).logits)


def _base(trial: Trial, wrapped: Mapping[str, Tensor], size: int) -> Any:
    """The model outside of its adapter."""
    plain = built(trial.family, "plain", size)
    state = {
        name.removeprefix("base_model.model.").replace(".base_layer", ""): tensor
        for name, tensor in wrapped.items()
        if "lora_" not in name
    }
    plain.load_state_dict(state)
    return plain


def _close(found: Tensor, expected: Tensor, atol: float = 2e-4) -> None:
    torch.testing.assert_close(found.detach(), expected.detach(), rtol=1e-3, atol=atol)


LOOKS: dict[str, Callable[[Trial], None]] = {
    "logits": _logits,
    "loss": _loss,
    "gradient": _gradient,
    "generate": _generate,
    "state_dict": _state_dict,
    "folder": _folder,
}
