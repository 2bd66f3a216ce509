"""What the log says of the h and z of several views, in the global batch."""

from collections.abc import Mapping
from typing import TypeAlias

import torch
from torch import Tensor

from hfproj import distributed
from hfproj.diagnostics.spectrum import rankme
from hfproj.diagnostics.spread import representation_std
from hfproj.diagnostics.views import positive_cosine

# ``[views, batch, dim]``, or ``[batch, dim]`` of each view where batches differ
Rows: TypeAlias = Tensor | list[Tensor]


def detached(rows: Rows) -> Rows:
    """Return `rows` without their gradients."""
    return [r.detach() for r in rows] if isinstance(rows, list) else rows.detach()


def global_views(rows: Rows) -> Tensor | None:
    """Return ``[views, batch, dim]`` of the global batch, in float32 or better; None where views differ in size."""
    if not isinstance(rows, Tensor):
        return None
    rows = rows.detach().to(torch.promote_types(rows.dtype, torch.float32))
    return distributed.gather_rows(rows.transpose(0, 1).contiguous()).transpose(0, 1)


def describe_rows(layers: Mapping[str, Rows], *, spread: bool = True) -> dict[str, float]:
    """Return ``positive_cosine_<layer>`` where there are two views or more, and where `spread` RankMe and std."""
    gathered = {name: global_views(rows) for name, rows in layers.items()}
    whole = {name: rows for name, rows in gathered.items() if rows is not None}
    found: dict[str, float] = {}
    for name, rows in whole.items() if spread else ():
        flat = rows.flatten(0, 1)
        found |= {f"rankme_{name}": rankme(flat), f"std_{name}": representation_std(flat)}
    return found | {f"positive_cosine_{n}": positive_cosine(rows) for n, rows in whole.items() if rows.shape[0] > 1}
