"""What the log says of a batch's h and z while training: RankMe, spread and positive-pair cosine of the joint batch."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from hfproj import distributed
from hfproj.diagnostics import positive_cosine, rankme, representation_std


def joint_views(rows: Any) -> Tensor | None:
    """Return ``[views, batch, dim]`` of the joint batch, in float32 or better; None where views differ in size."""
    if not isinstance(rows, Tensor):
        return None
    rows = rows.detach().to(torch.promote_types(rows.dtype, torch.float32))
    return distributed.gather_rows(rows.transpose(0, 1).contiguous()).transpose(0, 1)


def positive_cosines(layers: Mapping[str, Any]) -> dict[str, float]:
    """Return ``positive_cosine_<layer>`` of each layer that has two views or more."""
    joint = {name: joint_views(rows) for name, rows in layers.items()}
    return {
        f"positive_cosine_{name}": positive_cosine(rows)
        for name, rows in joint.items()
        if rows is not None and rows.shape[0] > 1
    }


def describe(layers: Mapping[str, Any]) -> dict[str, float]:
    """Return RankMe, std and positive-pair cosine of each layer."""
    logs: dict[str, float] = {}
    for name, rows in layers.items():
        joint = joint_views(rows)
        if joint is not None:
            logs[f"rankme_{name}"] = rankme(joint.flatten(0, 1))
            logs[f"std_{name}"] = representation_std(joint.flatten(0, 1))
    return logs | positive_cosines(layers)
