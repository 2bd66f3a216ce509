"""Several views of a batch through a model, and what the log says of their h and z in the global batch."""

from collections.abc import Mapping, Sequence
from itertools import groupby
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor, nn

from hfproj import distributed
from hfproj.diagnostics import positive_cosine, rankme, representation_std
from hfproj.errors import UsageError

# ``[views, batch, dim]``, or ``[batch, dim]`` of each view where batches differ
Rows: TypeAlias = Tensor | list[Tensor]


class ViewOutputs(NamedTuple):
    """Outputs per view; each is ``[views, batch, dim]``, or a list of ``[batch, dim]`` where batches differ."""

    h: Any
    z: Any
    prediction: Any
    scores: Any
    scales: Any = None


def _shapes(view: Any) -> tuple:
    return tuple(view.shape) if isinstance(view, Tensor) else tuple((k, *v.shape) for k, v in sorted(view.items()))


def forward_views(model: nn.Module, views: Sequence[Any]) -> ViewOutputs:
    """Return h, z (and p, prototype logits) of all views; neighbouring views of one size share a forward pass.

    `views` are tensors ``[batch, …]`` or dicts of tensors, as a collator's ``"views"``; without an active head it is a
    UsageError.
    """
    names = {"h": "representation", "z": "projection", "prediction": "prediction", "scores": "scores"}
    rows: dict[str, list[Tensor]] = {name: [] for name in names}
    for _, neighbours in groupby(views, key=_shapes):
        group = list(neighbours)
        count = len(group)
        if isinstance(group[0], Tensor):
            out = model(torch.cat(group), num_views=count)
        else:
            out = model(**{k: torch.cat([v[k] for v in group]) for k in group[0]}, num_views=count)
        if getattr(out, "projection", None) is None:
            raise UsageError("The model returned no projection: it has no projection head, or its adapter is disabled.")
        for name, field in names.items():
            if getattr(out, field) is not None:
                rows[name] += getattr(out, field).chunk(count)
    joined = {n: torch.stack(r) if len({v.shape for v in r}) == 1 else r or None for n, r in rows.items()}
    return ViewOutputs(**joined, scales=out.scales)


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
