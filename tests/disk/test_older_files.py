"""Files that version 0.1.0 wrote load as they did; `rows_of_0_1_0` has them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from tests.helpers.oracle import same_bits
from ttfunc import combine, functional_call, load, merge, patch, save

FILES = Path(__file__).parent / "rows_of_0_1_0"
V, D = 6, 4
# The ids of each file, and the value from which its rows count up in steps of 1/8.
FOUND = {"old": ([4, 1], -1.0), "new": ([7, 2, 6], -2.0), "then": ([8], -3.0)}


class Model(nn.Module):
    def __init__(self, tie: bool) -> None:
        super().__init__()
        self.embed_tokens, self.lm_head = nn.Embedding(V, D), nn.Linear(D, V, bias=False)
        for i, module in enumerate((self.embed_tokens, self.lm_head)):
            module.weight = nn.Parameter(torch.arange(V * D).view(V, D) + 100.0 * i)
        if tie:
            self.lm_head.weight = self.embed_tokens.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.lm_head(self.embed_tokens(x))


@pytest.mark.parametrize("tie", [True, False], ids=["tied", "untied"])
def test_files_of_the_first_version_load(tie: bool, tmp_path: Path):
    model, end = Model(tie), "tied" if tie else "untied"
    loaded = {name: load(FILES / f"{name}_{end}.safetensors", model) for name in FOUND}
    for name, (ids, first) in FOUND.items():
        params = loaded[name]
        assert list(params.deltas) == ["embed_tokens.weight", "lm_head.weight"][: 2 - tie]
        for matrix, rows in params.deltas.items():
            assert params.token_indices[matrix].tolist() == ids
            expected = first + torch.arange(len(ids) * D).view(-1, D) / 8
            assert torch.equal(rows, expected)
            held = model.get_parameter(matrix)
            for token, original in zip(ids, params.originals[matrix], strict=True):
                assert torch.equal(original, held[token] if token < V else torch.zeros(D))
        # Written anew, they are the same tensors.
        save(params, tmp_path / name)
        written = load_file(tmp_path / name)
        assert same_bits(written, load_file(FILES / f"{name}_{end}.safetensors"))
    every = combine(loaded["old"], loaded["new"], loaded["then"])
    longer = nn.ModuleDict(
        {"embed_tokens": nn.Embedding(9, D), "lm_head": nn.Linear(D, 9, bias=False)}
    )
    longer.load_state_dict(merge(model.state_dict(), every))
    x = torch.tensor([[4, 8, 6, 7, 0, 2]])
    expected = longer["lm_head"](longer["embed_tokens"](x))
    torch.testing.assert_close(functional_call(model, patch(every), x), expected)
