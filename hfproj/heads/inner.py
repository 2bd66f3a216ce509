"""A head inside a head, given by name and options."""

from typing import Any

from torch import nn

from hfproj.errors import UsageError
from hfproj.heads import create_head


def create_inner(name: str, *, in_dim: int, options: dict[str, Any] | None, out_dim: int | None) -> nn.Module:
    """Make the head `name` inside another one, whose `out_dim` (if given) is that of the inner head.

    Raises:
        UsageError: no head has this name, an option can't work, or `options` have another `out_dim`.

    Example:
        >>> create_inner("linear", in_dim=4, options=None, out_dim=2).out_dim
        2
    """
    options = dict(options or {})
    if out_dim is not None and options.setdefault("out_dim", out_dim) != out_dim:
        raise UsageError(
            f"out_dim={out_dim}, but the options of the inner head {name!r} say out_dim={options['out_dim']}: give the "
            "width once."
        )
    return create_head(name, in_dim=in_dim, **options)
