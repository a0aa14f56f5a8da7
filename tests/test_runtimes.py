"""One program for any rows in the runtimes that it is for: AOTInductor and ONNX Runtime."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import onnxruntime
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.export import Dim

from tests.helpers.llama import llama
from tests.helpers.models import D, V, make
from tests.helpers.rows import adapters, random_rows
from ttfunc import Exportable, functional_call, patch, patch_mixed

K = 4
BATCH = {0: Dim("batch", max=64), 1: Dim("length", max=64)}
# Rows of any tokens, as many as fit, in batches and lengths that the example did not have.
DRAWS = [([7, 3], 1, 5), ([0, V - 1, 11, 5], 3, 9), ([20], 4, 2)]
SERVER = """
import sys
import torch
from safetensors.torch import load_file, save_file

program = torch._inductor.aoti_load_package(sys.argv[1])
inputs, outputs = load_file(sys.argv[2]), {}
for draw in sorted({name.partition(".")[0] for name in inputs}):
    out = program(*(inputs[f"{draw}.{name}"] for name in ("rows", "ids", "x")))
    outputs[draw] = out[0] if isinstance(out, tuple) else out
assert "ttfunc" not in sys.modules
save_file(outputs, sys.argv[3])
"""

pytestmark = pytest.mark.filterwarnings("ignore")  # of the exporters


def text(ids: list[int], batch: int, length: int) -> Tensor:
    x = torch.arange(batch * length).view(batch, length) % V
    x[:, 0] = ids[0]
    return x


def test_a_process_without_the_library_serves_any_rows(tmp_path: Path):
    model = make("tied").requires_grad_(False)
    program = Exportable(model)
    inputs, expected = {}, {}
    for number, (ids, batch, length) in enumerate(DRAWS):
        params, x = random_rows(model, ids, number), text(ids, batch, length)
        rows, padded = program.inputs(params, rows=K)
        inputs |= {f"{number}.rows": rows, f"{number}.ids": padded, f"{number}.x": x}
        expected[str(number)] = functional_call(model, patch(params), (x,))
    example = (torch.zeros(K, D), torch.full((K,), -1), text([7], 2, 5))
    exported = torch.export.export(program, example, dynamic_shapes=(None, None, (BATCH,)))
    package = str(tmp_path / "any_rows.pt2")
    torch._inductor.aoti_compile_and_package(exported, package_path=package)
    save_file(inputs, tmp_path / "inputs")
    names = [package, str(tmp_path / "inputs"), str(tmp_path / "outputs")]
    subprocess.run([sys.executable, "-c", SERVER, *names], check=True)  # noqa: S603
    torch.testing.assert_close(load_file(tmp_path / "outputs"), expected, rtol=1e-5, atol=1e-5)


def in_onnx(program: nn.Module, example: tuple, shapes: tuple, path: Path):
    """The program in ONNX Runtime: what it takes for the inputs, and the size of its file."""
    torch.onnx.export(program, example, dynamic_shapes=shapes, dynamo=True, verbose=False).save(
        str(path)
    )
    session = onnxruntime.InferenceSession(str(path))
    names = [one.name for one in session.get_inputs()]

    def call(*inputs: Tensor) -> Tensor:
        given = {name: one.numpy() for name, one in zip(names, inputs, strict=True)}
        return torch.from_numpy(session.run(None, given)[0])

    return call, sum(one.stat().st_size for one in path.parent.glob(f"{path.name}*"))


def test_onnx_runtime_serves_any_rows_with_the_matrix_once(tmp_path: Path):
    vocabulary = 5000
    model = llama(vocabulary=vocabulary, width=32, layers=1)
    program = Exportable(model, kwargs={"use_cache": False, "return_dict": False})
    example = (torch.zeros(K, 32), torch.full((K,), -1), text([7], 2, 5))
    call, size = in_onnx(program, example, (None, None, (BATCH,)), tmp_path / "any_rows.onnx")
    for number, (ids, batch, length) in enumerate(DRAWS):
        params, x = random_rows(model, ids, number), text(ids, batch, length)
        expected = functional_call(model, patch(params), (x,)).logits
        found = call(*program.inputs(params, rows=K), x)
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    assert size < 1.5 * sum(one.nbytes for one in model.parameters())
    rows, padded = program.inputs(params, rows=K)
    with pytest.raises(Exception, match="Unexpected input data type"):
        call(rows, padded.int(), x)


def test_onnx_runtime_serves_a_mixed_batch(tmp_path: Path):
    model = make("tied").requires_grad_(False)
    program = Exportable(model, assignment=True)
    example = (
        *program.inputs(adapters(model, [7]), assignment=[0, -1], rows=K, adapters=3),
        text([7], 2, 5),
    )
    shapes = (None, None, ({0: BATCH[0]}, BATCH))
    call, _ = in_onnx(program, example, shapes, tmp_path / "mixed.onnx")
    for ids, assignment in (([[7, 3], [3, 20, 5]], [1, -1, 0, 1]), ([[0], [1], [2]], [2])):
        each, x = adapters(model, *ids), text(ids[0], len(assignment), 6)
        expected = functional_call(model, patch_mixed(each, assignment), (x,))
        found = call(*program.inputs(each, assignment=assignment, rows=K, adapters=3), x)
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_rows_as_constants_in_onnx(tmp_path: Path):
    model = make("untied").requires_grad_(False)
    params, x = random_rows(model, [7, 3]), text([7], 2, 5)

    class Constant(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, x: Tensor) -> Tensor:
            return functional_call(self.model, patch(params), (x,))

    call, _ = in_onnx(Constant(), (x,), (BATCH,), tmp_path / "constant.onnx")
    longer = text([3], 3, 9)
    torch.testing.assert_close(call(longer), Constant()(longer), rtol=1e-5, atol=1e-5)
