"""Callbacks that watch a training: rank and spread, curvature, update ratios, probes, and an alarm at collapse.

They read `last_batch`, `history` and the model of the trainer that they are given to, and import `training.setup`,
`training.evaluation` and what lies below.
"""

from hfproj.training.callbacks.collapse import CollapseCallback
from hfproj.training.callbacks.curvature import CurvatureCallback
from hfproj.training.callbacks.online_probe import OnlineProbeCallback
from hfproj.training.callbacks.watching import ProbeWatch, SpectrumCallback, UpdateRatioCallback, Watch

__all__ = [
    "CollapseCallback", "CurvatureCallback", "OnlineProbeCallback", "ProbeWatch", "SpectrumCallback",
    "UpdateRatioCallback", "Watch",
]  # fmt: skip
