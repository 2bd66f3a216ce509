"""Regularizers: scalar terms beside an objective, ``regularizer(model, h, z)``; h and z are ``[views, batch, dim]``.

:mod:`hfproj.regularizers.base` says how they are called and what else they may do. This room imports the registry,
`functional` and what lies below them, no sibling.
"""

from collections.abc import Mapping
from numbers import Real
from typing import Any

from torch import nn

from hfproj.checking import checked
from hfproj.errors import UsageError
from hfproj.registry import Registry
from hfproj.regularizers.base import Weighted

__all__ = ["REGULARIZERS", "Weighted", "create_regularizer", "list_regularizers", "register_regularizer"]

_ENTRIES = {
    "bottleneck": ("bottleneck:Bottleneck", "matrix mutual information of h and z"),
    "koleo": ("koleo:KoLeo", "pushes each row from its nearest neighbour (DINOv2)"),
    "orthogonality": ("orthogonality:Orthogonality", "‖WWᵀ − I‖² of the last layer: singular values of 1"),
    "sigreg": ("sigreg:SIGReg", "pulls features to N(0, I) along random directions (LeJEPA)"),
    "sparse_head": ("sparse_head:SparseHead", "L2,1 norm that switches whole input features of the head off"),
    "vicreg_terms": ("vicreg_terms:VICRegTerms", "variance and covariance terms of VICReg, on z or h"),
    "wasserstein": ("wasserstein:Wasserstein", "Wasserstein distance of unit rows from uniform on the sphere"),
    "werank": ("werank:WERank", "‖WᵀW − I‖ of every layer, encoder and head"),
}
_OF_WEIGHT = ("weight", "schedule", "end_weight", "at_most", "keep_at", "weight_rate")
REGULARIZERS: Registry[nn.Module] = Registry(
    "regularizer",
    {name: (f"hfproj.regularizers.{where}", line) for name, (where, line) in _ENTRIES.items()},
    base=nn.Module, needs=["forward"], calls=lambda cls: {"forward": ["model", "h", "z", "step="]},
)  # fmt: skip


@checked
def create_regularizer(name: str, **options: Any) -> nn.Module:
    """Make a regularizer by its name.

    Args:
        name: One of `list_regularizers`.
        options: Keyword arguments of its constructor.

    Raises:
        UsageError: If no regularizer has this name, it has no such option, or it refuses an option's value.
    """
    return REGULARIZERS.create(name, **options)


@checked
def list_regularizers() -> dict[str, str]:
    """Return every regularizer's name with the line that describes it."""
    return REGULARIZERS.list()


@checked
def register_regularizer(name: str, cls: type[nn.Module], line: str = "") -> None:
    """Add a regularizer class of your own; a checkpoint trained with it needs the same call before it is loaded.

    Args:
        name: What :func:`create_regularizer` will know it by.
        cls: Its constructor takes keywords only; it is called as :mod:`hfproj.regularizers.base` says.
        line: What it is; by default the first line of the class docstring.

    Raises:
        UsageError: If the name is taken, or the class is no ``nn.Module`` with ``forward(model, h, z, step=…)``.
    """
    REGULARIZERS.register(name, cls, line)


def weighted(name: str, value: object) -> Weighted:
    """Return the regularizer that `value` describes, with its weight.

    Args:
        name: One of `list_regularizers`, unless `value` is a regularizer itself.
        value: Its weight; or a dict of its options and those of `Weighted`; or a regularizer.

    Raises:
        UsageError: If no regularizer has this name, it has no such option, or the weight is no number.
    """
    if isinstance(value, Weighted):
        return value
    if isinstance(value, nn.Module):
        return Weighted(value)
    options = dict(value) if isinstance(value, Mapping) else {"weight": value}
    own: dict[str, Any] = {k: options.pop(k) for k in _OF_WEIGHT if k in options}
    for key in own.keys() - {"schedule"}:
        if not isinstance(own[key], Real) or isinstance(own[key], bool):
            raise UsageError(
                f"Expected the {key} of the regularizer {name!r} to be a number, got {own[key]!r}; options go into a "
                f"dict: {{{name!r}: {{'weight': 0.1, 'option': value}}}}."
            )
        own[key] = float(own[key])
    return Weighted(create_regularizer(name, **options), **own)
