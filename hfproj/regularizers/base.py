"""What a regularizer is, and its weight over training.

A regularizer is an ``nn.Module`` without parameters, called as ``regularizer(model, h, z, step=step)`` with

* ``model``: the ``PeftModel`` with a projection head, or a bare head; never an EMA teacher;
* ``h`` and ``z``: representations and projections of this process, ``[views, batch, dim]``; terms on weights need none;
* ``step``: the training step, from whose generator random terms draw, the same on all processes; None on one process:
  torch's own generator.

It returns a scalar, that of the global batch of all processes where it depends on rows. It raises `UsageError` for
features of another shape or type, and for a term on h of a frozen backbone. Optional methods:

* ``after_step(model, learning_rate, weight)``, called after each optimizer step (a proximal step);
* ``follow(model, progress)``, called after it with the fraction of the training that is done, in (0, 1] (a schedule);
* ``report(model)``, returning named numbers to log (the fraction of switched-off features).

One whose attribute ``has_weight`` is False is no part of the loss, and is given no weight.

A weight can be found by a target instead: for R ≤ R*, after each optimizer step

    log λ ← log λ + η_λ · e + (ē − ē'),    e = (R − R*) / |R*|,    by no more than log 1.05 up or down,

dual ascent on the multiplier of the constraint, with R the mean over the step's micro-batches and all processes. ē is
the moving average of e (clipped to [−1, 1], a fifth of each step's), ē' that of the step before: while R approaches R*
the weight holds back, and does not overshoot. λ stays within a factor of a million of where it starts.

References:
    Platt and Barr 1987, Constrained differential optimization (with damping); Rezende and Viola 2018, arXiv 1810.00597
    (on log λ).

Deviations:
    Ours: relative to R*, clipped, with η_λ = 0.1 and this damping.
"""

import math
import warnings
from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from hfproj import distributed
from hfproj.checking import checked
from hfproj.errors import UsageError, check_choice
from hfproj.functional.feature_rows import double
from hfproj.functional.rows import gather_views
from hfproj.typing import OneOf, Views

Schedule = OneOf["constant", "linear", "cosine"]
Layer = OneOf["h", "z"]
_LARGEST_CHANGE, _FARTHEST = math.log(1.05), math.log(1e6)  # of log λ in a step, and from its start
_RATE, _SMOOTHING = 0.1, 0.2
Representations = Float[Tensor, "views batch in_dim"]
Projections = Float[Tensor, "views batch out_dim"]


class Weighted:
    """A regularizer with its weight, which may change from the first to the last step of training.

    Args:
        module: The regularizer.
        weight: Its weight at the start.
        schedule: ``"constant"``, ``"linear"`` or ``"cosine"``.
        end_weight: Its weight at the end, for the other two.
        at_most: R*, a target in the regularizer's own unit (nats for ``bottleneck``), not 0: the weight goes up while
            the value is larger, and down while it is smaller. None: the weight is that of the schedule.
        weight_rate: η_λ, how fast the weight follows the target.

    Raises:
        UsageError: If the schedule is unknown, a weight is not finite, or a target goes together with a schedule, a
            weight that is not positive, or a regularizer that has none.

    Example:
        >>> Weighted(nn.Identity(), 1.0, schedule="linear").at(0.25)
        0.75
    """

    @checked
    def __init__(
        self, module: nn.Module, weight: float = 1.0, *, schedule: Schedule = "constant", end_weight: float = 0.0,
        at_most: float | None = None, weight_rate: float = _RATE,
    ):  # fmt: skip
        check_choice("schedule", schedule, ("constant", "linear", "cosine"))
        if not (math.isfinite(weight) and math.isfinite(end_weight)):
            raise UsageError(f"Expected a regularizer's weight to be a finite number, got {weight} and {end_weight}.")
        self.module, self.weight, self.schedule, self.end_weight = module, weight, schedule, end_weight
        self.at_most, self.weight_rate = at_most, weight_rate
        self._values: list[Tensor] = []
        self._log_weight = 0.0
        self._excess: float | None = None
        self._said = False
        self._check_target()
        self.take_up(None)

    def _check_target(self) -> None:
        given = (self.weight, self.schedule, self.at_most)
        if not getattr(self.module, "has_weight", True) and given != (1.0, "constant", None):
            raise UsageError(
                f"This {type(self.module).__name__} has a target of its own and no weight; leave weight, schedule, "
                "end_weight and at_most out."
            )
        if self.at_most is None:
            if self.weight_rate != _RATE:
                raise UsageError("weight_rate has no effect without at_most, the target; give both, or leave it out.")
            return
        if not math.isfinite(self.at_most) or self.at_most == 0:
            raise UsageError(f"Expected at_most to be a finite number other than 0, got {self.at_most}.")
        if self.schedule != "constant" or not self.weight > 0 or not self.weight_rate > 0:
            raise UsageError(
                f"at_most={self.at_most} finds the weight itself: it takes a weight above 0 to start from (got "
                f"{self.weight}), a weight_rate above 0 (got {self.weight_rate}) and no schedule."
            )

    def __call__(self, model: nn.Module, h: Any, z: Any, *, step: Any = None) -> Tensor:
        """Return the regularizer's value, before the weight."""
        value = self.module(model, h, z, step=step)
        if self.at_most is not None and torch.is_grad_enabled():
            self._values.append(value.detach())
        return value

    def at(self, progress: float) -> float:
        """Return the weight at `progress` in [0, 1] of the training; where a target finds it, that of the next step."""
        if not getattr(self.module, "has_weight", True):
            return 0.0
        if self.at_most is not None:
            return math.exp(self._log_weight)
        if self.schedule == "constant":
            return self.weight
        done = progress if self.schedule == "linear" else (1 - math.cos(math.pi * progress)) / 2
        return self.weight + (self.end_weight - self.weight) * done

    def largest(self) -> float:
        """Return the largest absolute weight of the training; infinite where a target finds it."""
        if self.at_most is not None:
            return math.inf
        return max(abs(self.weight), abs(self.end_weight if self.schedule != "constant" else self.weight))

    def after_step(self, model: nn.Module, learning_rate: float, progress: float, done: float) -> None:
        """Do what the regularizer does after an optimizer step, and let the weight follow its target.

        Args:
            model: As in `__call__`.
            learning_rate: Of the head's parameters at this step.
            progress: Fraction of the training before the step.
            done: The same after it.
        """
        if (after_step := getattr(self.module, "after_step", None)) is not None:
            after_step(model, learning_rate, self.at(progress))
        if (follow := getattr(self.module, "follow", None)) is not None:
            follow(model, done)
        if self.at_most is not None and self._values:
            total = distributed.all_reduce_sum(double(torch.stack(self._values)).mean()).item()
            self._values.clear()
            self._ascend((total / distributed.world_size() - self.at_most) / abs(self.at_most))

    def _ascend(self, excess: float) -> None:
        clipped = min(max(excess, -1.0), 1.0)
        change = 0.0 if self._excess is None else _SMOOTHING * (clipped - self._excess)  # of the moving average
        self._excess = clipped if self._excess is None else self._excess + change
        change += self.weight_rate * excess
        start = math.log(self.weight)
        log_weight = self._log_weight + min(max(change, -_LARGEST_CHANGE), _LARGEST_CHANGE)
        self._log_weight = min(max(log_weight, start - _FARTHEST), start + _FARTHEST)
        if self._log_weight == start + _FARTHEST and not self._said and distributed.rank() == 0:
            self._said = True
            warnings.warn(
                f"{type(self.module).__name__} stays above at_most={self.at_most}: its weight is a million times the "
                f"one it started from, {self.weight:g}, and goes no higher. Raise the target, or start higher.",
                stacklevel=2,
            )

    def report(self, model: nn.Module) -> dict[str, float]:
        """Return what is logged beside the value: the regularizer's own numbers, and the weight that a target found."""
        report = getattr(self.module, "report", None)
        own = {} if report is None else report(model)
        return own if self.at_most is None else {**own, "weight": self.at(1.0)}

    def state(self) -> list[float | None] | None:
        """Return what a checkpoint keeps of a weight that a target finds: its logarithm, and ē."""
        return None if self.at_most is None else [self._log_weight, self._excess]

    def take_up(self, state: Sequence[float | None] | None) -> None:
        """Go on from a `state`, or begin."""
        self._values.clear()
        if self.at_most is not None:
            log_weight, self._excess = state or (None, None)
            self._log_weight = math.log(self.weight) if log_weight is None else log_weight

    def describe(self) -> dict[str, Any]:
        """Return what makes it again: weight, schedule or target, and the regularizer's own options."""
        options = {k: v for k, v in getattr(self.module, "created", {}).items() if k != "name"}
        if not getattr(self.module, "has_weight", True):
            return options
        moving = {} if self.schedule == "constant" else {"schedule": self.schedule, "end_weight": self.end_weight}
        if self.at_most is not None:
            moving = {"at_most": self.at_most, "weight_rate": self.weight_rate}
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
