"""What a caller gives for a model: a module, and not the TokenModule of one."""

from __future__ import annotations

from torch import nn


def is_token_module(given: object) -> bool:
    """Whether it is a TokenModule, which has the class of its model for tools that ask."""
    return getattr(type(given), "_is_token_module", False) is True


def refuse_token_module(given: object, instead: str) -> None:
    """Raise TypeError for a TokenModule, with what to write `instead`."""
    if is_token_module(given):
        raise TypeError(
            f"got a TokenModule, which is a {type(given).__name__} with its rows in it, where one "
            f"of the two is needed alone. Write {instead}."
        )


def check_model(given: object, order: str, instead: str) -> None:
    """Raise TypeError for anything but a model: with the right `order`, or what to write."""
    refuse_token_module(given, instead)
    if not isinstance(given, nn.Module):
        raise TypeError(f"a model is needed, got {type(given).__name__}. The order is {order}.")
