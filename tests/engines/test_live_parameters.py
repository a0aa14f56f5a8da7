"""Parameters that are looked up in another dictionary."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from ttfunc.engines.live_parameters import LiveParameters


def test_it_shows_what_the_other_has_now_and_its_own_replacements():
    own = {"weight": 1, "bias": 2}
    live = LiveParameters(own, {"weight": "w"})
    assert dict(live) == live.copy() == {"weight": "w", "bias": 2}
    own["bias"] = 3
    own["scale"] = None
    assert list(live.items()) == [("weight", "w"), ("bias", 3), ("scale", None)]
    assert (list(live), list(live.keys()), len(live)) == (list(own), list(own), 3)
    assert list(live.values()) == ["w", 3, None]
    assert live["weight"] == live.get("weight") == "w"
    assert live.get("none", 5) == 5
    assert "scale" in live
    with pytest.raises(KeyError, match="none"):
        live["none"]


def test_what_is_written_to_it_is_written_to_the_other():
    own = {"weight": 1, "bias": 2}
    live = LiveParameters(own, {"weight": "w"})
    live["weight"] = 4
    del live["bias"]
    assert own == {"weight": 4}
    assert live.pop("weight") == 4
    assert not own


def test_a_module_works_with_it():
    module, copy = nn.Linear(3, 2), nn.Linear(3, 2)
    vars(copy)["_parameters"] = LiveParameters(module._parameters, {"weight": torch.ones(2, 3)})
    assert [name for name, _ in copy.named_parameters()] == ["weight", "bias"]
    module.bias = nn.Parameter(torch.full((2,), 5.0))
    assert torch.equal(copy(torch.ones(1, 3)), torch.tensor([[8.0, 8.0]]))
