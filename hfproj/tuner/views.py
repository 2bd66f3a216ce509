"""Several views of a batch through a model."""

from collections.abc import Sequence
from itertools import groupby
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from hfproj.errors import UsageError


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
