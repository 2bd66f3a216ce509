"""What studies follow along training, beside metrics of `hfproj.SpectrumCallback`: callbacks by name.

Papers' own are added by `register_watch` in their file.
"""

from collections.abc import Callable, Sequence
from typing import Any

from transformers import TrainerCallback

from hfproj.training import CurvatureCallback, OnlineProbeCallback, SpectrumCallback, UpdateRatioCallback

POINTS = 25  # of a training, about
Watcher = Callable[[int], TrainerCallback]  # of the steps between two measurements
WATCHES: dict[str, Watcher] = {
    "curvature": lambda every: CurvatureCallback(every=every),
    "update_ratio": lambda every: UpdateRatioCallback(every=every),
    "online": lambda every: OnlineProbeCallback(every=every),
}


def register_watch(name: str) -> Callable[[Watcher], Watcher]:
    """Return a decorator that makes a function of the steps between two measurements a watch by this name."""

    def add(watcher: Watcher) -> Watcher:
        WATCHES[name] = watcher
        return watcher

    return add


def watchers(names: Sequence[str], steps: int) -> list[TrainerCallback]:
    """Return the callbacks that follow these names along a training of so many steps."""
    every = max(1, round(steps / POINTS))
    metrics: Any = [name for name in names if name not in WATCHES]
    found: list[TrainerCallback] = [SpectrumCallback(metrics=metrics, every=every)] if metrics else []
    return found + [WATCHES[name](every) for name in names if name in WATCHES]
