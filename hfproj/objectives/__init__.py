"""Objectives: what a head is trained on, each an ``nn.Module`` with buffers only, made by name.

    objective(z, *, labels=None, target=None, prediction=None, scores=None, index=None, step=None) -> ObjectiveOutput

with projections ``z: [views, batch, dim]``; :mod:`hfproj.objectives.base` says what the rest is.
"""

from typing import Any

from torch import nn

from hfproj.registry import Registry

__all__ = ["OBJECTIVES", "create_objective", "list_objectives", "register_objective"]

OBJECTIVES = Registry(
    "objective",
    {
        "nt_xent": ("hfproj.objectives.nt_xent:NTXent", "SimCLR: tell the views of an image from all other images"),
    },
)


def create_objective(name: str, **options: Any) -> nn.Module:
    """Make an objective by its name.

    Args:
        name: One of :func:`list_objectives`.
        options: Keyword arguments of the objective's constructor.

    Raises:
        UsageError: no objective has this name, it has no such option, or an option's value cannot work.

    Example:
        >>> create_objective("nt_xent", temperature=0.5).temperature
        0.5
    """
    return OBJECTIVES.create(name, **options)


def list_objectives() -> dict[str, str]:
    """Return every objective's name with the line that describes it.

    Example:
        >>> "nt_xent" in list_objectives()
        True
    """
    return OBJECTIVES.list()


def register_objective(name: str, cls: type[nn.Module], line: str = "") -> None:
    """Add an objective class of your own.

    Args:
        name: What :func:`create_objective` will know it by.
        cls: Called as the module docstring says, with the class attributes ``views`` and ``needs``.
        line: What it is; defaults to the first line of the class docstring.

    Raises:
        UsageError: the name is taken.
    """
    OBJECTIVES.register(name, cls, line)
