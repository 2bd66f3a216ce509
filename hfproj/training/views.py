"""Several views of a batch through a model with a head, in as few forward passes as their sizes allow."""

from collections.abc import Sequence
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


def _signature(view: Any) -> tuple:
    if isinstance(view, Tensor):
        return tuple(view.shape)
    return tuple((k, tuple(v.shape)) for k, v in sorted(view.items()))


def _concatenate(views: Sequence[Any]) -> Any:
    if isinstance(views[0], Tensor):
        return torch.cat(list(views))
    return {k: torch.cat([v[k] for v in views]) for k in views[0]}


def forward_views(model: nn.Module, views: Sequence[Any]) -> ViewOutputs:
    """Return h, z (and p, scores) of all views; neighbouring views of one size share a forward pass.

    Args:
        model: A model with an active projection head.
        views: Tensors ``[batch, …]`` or dicts of such tensors, as a collator's ``"views"``.

    Raises:
        UsageError: the model has no active head.
    """
    parts: list[dict[str, Tensor]] = []
    start = 0
    while start < len(views):
        stop = start + 1
        while stop < len(views) and _signature(views[stop]) == _signature(views[start]):
            stop += 1
        group = _concatenate(views[start:stop])
        kwargs = {"num_views": stop - start}
        out = model(**group, **kwargs) if isinstance(group, dict) else model(group, **kwargs)
        if getattr(out, "projection", None) is None:
            raise UsageError("The model returned no projection: it has no projection head, or its adapter is disabled.")
        names = ("representation", "projection", "prediction", "scores")
        found = {n: getattr(out, n) for n in names if getattr(out, n) is not None}
        for i in range(stop - start):
            parts.append({n: t.chunk(stop - start)[i] for n, t in found.items()})
        start = stop

    def gathered(name: str) -> Any:
        rows = [p[name] for p in parts if name in p]
        if not rows:
            return None
        return torch.stack(rows) if len({r.shape for r in rows}) == 1 else rows

    return ViewOutputs(
        h=gathered("representation"),
        z=gathered("projection"),
        prediction=gathered("prediction"),
        scores=gathered("scores"),
        scales=out.scales,
    )
