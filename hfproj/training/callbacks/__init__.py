"""Callbacks that watch a training: rank and spread, curvature, update ratios, probes, and an alarm at collapse."""

from hfproj.training.callbacks.collapse import CollapseCallback
from hfproj.training.callbacks.curvature import CurvatureCallback
from hfproj.training.callbacks.online_probe import OnlineProbeCallback
from hfproj.training.callbacks.spectrum import SpectrumCallback
from hfproj.training.callbacks.updates import UpdateRatioCallback

__all__ = ["CollapseCallback", "CurvatureCallback", "OnlineProbeCallback", "SpectrumCallback", "UpdateRatioCallback"]
