"""What a regularizer is, and its weight over training.

A regularizer is an ``nn.Module`` without parameters, called as ``regularizer(model, h, z, step=step)`` with h and z
``[views, batch, dim]`` of this process; it returns a scalar, of the joint batch of all processes where it depends on
rows. ``model`` is the ``PeftModel`` (or a bare head), never a moving-average copy. Optional methods:

* ``after_step(model, learning_rate, weight)``, called after each optimizer step (a proximal step);
* ``report(model)``, returning named numbers to log (the share of switched-off features).
"""

import math
from typing import Any

from torch import nn

from hfproj.errors import UsageError, unknown

SCHEDULES = ("constant", "linear", "cosine")


class Weighted:
    """A regularizer with its weight, which may change from the first to the last step of training.

    Args:
        module: The regularizer.
        weight: Its weight at the start.
        schedule: ``"constant"``, ``"linear"`` or ``"cosine"``.
        end_weight: Its weight at the end, for the other two.

    Raises:
        UsageError: an unknown schedule, or a weight that is not finite.

    Example:
        >>> Weighted(nn.Identity(), 1.0, schedule="linear").at(0.25)
        0.75
    """

    def __init__(self, module: nn.Module, weight: float = 1.0, *, schedule: str = "constant", end_weight: float = 0.0):
        if schedule not in SCHEDULES:
            raise unknown("schedule", schedule, SCHEDULES)
        if not (math.isfinite(weight) and math.isfinite(end_weight)):
            raise UsageError(f"A regularizer's weight must be a finite number, got {weight} and {end_weight}.")
        self.module, self.weight, self.schedule, self.end_weight = module, weight, schedule, end_weight

    def at(self, progress: float) -> float:
        """Return the weight at `progress` in [0, 1] of the training."""
        if self.schedule == "constant":
            return self.weight
        share = progress if self.schedule == "linear" else (1 - math.cos(math.pi * progress)) / 2
        return self.weight + (self.end_weight - self.weight) * share

    def describe(self) -> dict[str, Any]:
        """Return what makes it again: weight, schedule and the regularizer's own options."""
        options = {k: v for k, v in getattr(self.module, "created", {}).items() if k != "name"}
        moving = {} if self.schedule == "constant" else {"schedule": self.schedule, "end_weight": self.end_weight}
        return {"weight": self.weight, **moving, **options}
