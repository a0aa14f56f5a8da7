"""The path to a matrix: the modules that a call copies, and no more."""

from __future__ import annotations

from torch import nn

from tests.helpers.models import make, tokens
from ttfunc import functional_call, init_deltas, patch

X = tokens(7, 3)


def copied(model: nn.Module, target: str) -> set[str]:
    """The modules of which a call runs a copy."""
    names = {module: name for name, module in model.named_modules()}
    run, handles = [], []
    for module in list(names):
        handles.append(module.register_forward_hook(lambda one, *_: run.append(one)))
    functional_call(model, patch(init_deltas(model, [7], targets=target, init="mean")), X)
    for handle in handles:
        handle.remove()
    own = {names[one] for one in run if one in names}
    assert len(own) < len(run)
    return {name for name in names.values() if name not in own}


class Both(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = make("tied"), make("untied")

    def forward(self, x):
        return self.a(x) + self.b(x)


def test_the_path_is_what_leads_to_the_matrix_and_no_more():
    model = Both().requires_grad_(False)
    assert copied(model, "a.embed_tokens") == {"", "a", "a.embed_tokens", "a.lm_head"}
    assert copied(model, "b.embed_tokens") == {"", "b", "b.embed_tokens"}


def test_a_module_reached_by_two_paths_is_copied_once_and_with_both():
    model = make("encoder_decoder").requires_grad_(False)
    assert {"", "embed_tokens", "encoder", "lm_head"} <= copied(model, "embed_tokens")
