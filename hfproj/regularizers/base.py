"""What a regularizer is, and its weight over training.

A regularizer is an ``nn.Module`` without parameters, called as ``regularizer(model, h, z, step=step)`` with

* ``model``: the ``PeftModel`` with a projection head, or a bare head; never an EMA teacher;
* ``h`` and ``z``: representations and projections of this process, ``[views, batch, dim]``; terms on weights need none;
* ``step``: the training step, from whose generator random terms draw, the same on all processes; None on one process:
  torch's own generator.

It returns a scalar, that of the global batch of all processes where it depends on rows. It raises `UsageError` for
features of another shape or type, and for a term on h of a frozen backbone. Optional methods:

* ``after_step(model, learning_rate, weight)``, called after each optimizer step (a proximal step);
* ``report(model)``, returning named numbers to log (the fraction of switched-off features).
"""

import math
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from hfproj.checking import checked
from hfproj.errors import UsageError, check_choice
from hfproj.functional.rows import gather_views
from hfproj.typing import OneOf, Views

Schedule = OneOf["constant", "linear", "cosine"]
Layer = OneOf["h", "z"]
Representations = Float[Tensor, "views batch in_dim"]
Projections = Float[Tensor, "views batch out_dim"]


class Weighted:
    """A regularizer with its weight, which may change from the first to the last step of training.

    Args:
        module: The regularizer.
        weight: Its weight at the start.
        schedule: ``"constant"``, ``"linear"`` or ``"cosine"``.
        end_weight: Its weight at the end, for the other two.

    Raises:
        UsageError: If the schedule is unknown or a weight is not finite.

    Example:
        >>> Weighted(nn.Identity(), 1.0, schedule="linear").at(0.25)
        0.75
    """

    @checked
    def __init__(
        self, module: nn.Module, weight: float = 1.0, *, schedule: Schedule = "constant", end_weight: float = 0.0
    ):
        check_choice("schedule", schedule, ("constant", "linear", "cosine"))
        if not (math.isfinite(weight) and math.isfinite(end_weight)):
            raise UsageError(f"Expected a regularizer's weight to be a finite number, got {weight} and {end_weight}.")
        self.module, self.weight, self.schedule, self.end_weight = module, weight, schedule, end_weight

    def at(self, progress: float) -> float:
        """Return the weight at `progress` in [0, 1] of the training."""
        if self.schedule == "constant":
            return self.weight
        done = progress if self.schedule == "linear" else (1 - math.cos(math.pi * progress)) / 2
        return self.weight + (self.end_weight - self.weight) * done

    def describe(self) -> dict[str, Any]:
        """Return what makes it again: weight, schedule and the regularizer's own options."""
        options = {k: v for k, v in getattr(self.module, "created", {}).items() if k != "name"}
        moving = {} if self.schedule == "constant" else {"schedule": self.schedule, "end_weight": self.end_weight}
        return {"weight": self.weight, **moving, **options}


def features(on: Layer, h: Tensor, z: Tensor, *, gather: bool = False) -> Views:
    """Return h or z, for regularizers that act on either; with `gather` the images of all processes, differentiably.

    Raises:
        UsageError: If `on` is neither ``"h"`` nor ``"z"``, the features have another shape or type, or h carries no
            gradient while z does.
    """
    check_on(on)
    x = check_views(on, h if on == "h" else z)
    if on == "h" and torch.is_grad_enabled() and z.requires_grad and not h.requires_grad:
        raise UsageError(
            "This regularizer acts on h, which carries no gradient: the backbone is frozen. Use on='z', or train the "
            "backbone (ProjectionHeadConfig(backbone_adapter=LoraConfig(r=8)) or trainable='full')."
        )
    return gather_views(x) if gather else x


def check_on(on: Layer) -> None:
    """Raise `UsageError` for features that are neither h nor z."""
    check_choice("features (option on)", on, ("h", "z"))


def check_views(name: str, x: Any) -> Views:
    """Return `x`, or raise `UsageError` if it is not ``[views, batch, dim]`` in floating-point numbers."""
    if not isinstance(x, Tensor) or x.ndim != 3 or not x.is_floating_point():
        given = f"{x.dtype} of shape {list(x.shape)}" if isinstance(x, Tensor) else type(x).__name__
        raise UsageError(
            f"A regularizer takes floating-point {name} of shape [views, batch, dim], got {given}. Stack the views: "
            f"torch.stack([{name}_a, {name}_b])."
        )
    return x
