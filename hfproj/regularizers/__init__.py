"""Regularizers: scalar terms beside an objective, ``regularizer(model, h, z)``; h and z are ``[views, batch, dim]``."""

from typing import Any

from torch import nn

from hfproj.registry import Registry

__all__ = ["REGULARIZERS", "create_regularizer", "list_regularizers", "register_regularizer"]

REGULARIZERS = Registry("regularizer", {})


def create_regularizer(name: str, **options: Any) -> nn.Module:
    """Make a regularizer by its name.

    Args:
        name: One of `list_regularizers`.
        options: Keyword arguments of its constructor.

    Raises:
        UsageError: no regularizer has this name, or it has no such option.
    """
    return REGULARIZERS.create(name, **options)


def list_regularizers() -> dict[str, str]:
    """Return every regularizer's name with the line that describes it."""
    return REGULARIZERS.list()


def register_regularizer(name: str, cls: type, line: str = "") -> None:
    """Add a regularizer class of your own.

    Raises:
        UsageError: the name is taken.
    """
    REGULARIZERS.register(name, cls, line)
