"""Projection heads: ``z = head(h)``, each an ``nn.Module`` with ``in_dim`` and ``out_dim``, made by name.

A head takes ``h`` as ``[batch, in_dim]`` or ``[views, batch, in_dim]`` and keeps the leading dimensions; any other
shape raises `UsageError`. Its options are numbers, strings, booleans, and lists and dicts of them, so that a
configuration file can hold them. Heads of papers are names with options of the class ``mlp``:
:mod:`hfproj.heads.presets`. This room imports the registry, `functional` and what lies below them, no sibling.
"""

import re
from collections.abc import Iterable
from typing import Any

from torch import nn

from hfproj.checking import checked
from hfproj.errors import UsageError
from hfproj.heads.presets import PRESETS
from hfproj.registry import Registry

__all__ = ["HEADS", "create_head", "list_heads", "register_head"]

_ENTRIES = {
    "identity": ("linear:IdentityHead", "z = h: the objective acts on the representation itself"),
    "linear": ("linear:LinearHead", "one linear layer, optionally followed by a norm"),
    "mlp": ("mlp:MLPHead", "linear layers with norms and activations between them (SimCLR and most)"),
    "reweight": ("reweight:ReweightHead", "fixed: entry i of h times kappa^-i, nothing to train"),
    "symmetric_relu": (
        "symmetric_relu:SymmetricReLUHead",
        "two linear layers around a symmetric ReLU, the identity map at first",
    ),
    "subvector": ("subvector:SubvectorHead", "DirectCLR: the first d0 entries of h"),
    "constant_subvector": (
        "subvector:ConstantSubvectorHead",
        "the first d0 entries of h, and a constant in place of the others",
    ),
    "quantized": ("quantized:QuantizedHead", "another head, its output rounded to a few levels"),
    "topk": ("topk:TopKHead", "sparse autoencoder that keeps the largest units, without a loss of its own"),
}
HEADS: Registry[nn.Module] = Registry(
    "head",
    {**{name: (f"hfproj.heads.{where}", line) for name, (where, line) in _ENTRIES.items()}, **PRESETS},
    base=nn.Module, needs=["forward"], options=["in_dim"], calls=lambda cls: {"forward": ["h"]},
)  # fmt: skip


@checked
def create_head(name: str, *, in_dim: int, **options: Any) -> nn.Module:
    """Make a head by its name.

    Args:
        name: One of :func:`list_heads`.
        in_dim: Width of the representation h.
        options: Keyword arguments of the head's constructor.

    Raises:
        UsageError: If no head has this name, it has no such option, or the head refuses an option's value.

    Example:
        >>> import torch
        >>> head = create_head("mlp", in_dim=384, out_dim=64, hidden_dim=512)
        >>> tuple(head(torch.randn(2, 8, 384)).shape)
        (2, 8, 64)
    """
    return HEADS.create(name, in_dim=in_dim, **options)


def check_known(names: Iterable[object], where: str) -> None:
    """Refuse heads of a saved adapter that are not known here: an own class has to be registered before it is loaded.

    Raises:
        UsageError: If one is not; the message says how it is registered.
    """
    for name in names:
        # One that can't be registered is no class of somebody's own.
        if isinstance(name, str) and name not in HEADS.list() and re.fullmatch(r"[\w.-]+", name):
            shown = repr(name) if len(name) <= 80 else f"{name[:79]!r}…"
            raise UsageError(
                f"{where}: no head {shown} is known here. Either it is its author's own: get its code, look at it, and "
                f"run hfproj.register_head({shown}, …) before you load the adapter; or the file is damaged."
            )


@checked
def list_heads() -> dict[str, str]:
    """Return every head's name with the line that describes it.

    Example:
        >>> list_heads()["linear"]
        'one linear layer, optionally followed by a norm'
    """
    return HEADS.list()


@checked
def register_head(name: str, cls: type[nn.Module], line: str = "") -> None:
    """Add a head class of your own; an adapter saved with it needs the same call before it is loaded.

    Args:
        name: What :func:`create_head` will know it by.
        cls: Its constructor takes keywords only, among them ``in_dim``; instances have ``in_dim`` and ``out_dim``.
        line: What it is; by default the first line of the class docstring.

    Raises:
        UsageError: If the name is taken, or the class is no ``nn.Module`` with ``forward(h)`` and an option ``in_dim``.
    """
    HEADS.register(name, cls, line)
