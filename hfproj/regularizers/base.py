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

A weight can be found by a target of the regularizer's value instead, a bound or a set point: see
:mod:`hfproj.regularizers.multipliers`.
"""

import math
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
from hfproj.regularizers.multipliers import Bound, Multiplier, SetPoint
from hfproj.typing import OneOf, Views

Schedule = OneOf["constant", "linear", "cosine"]
Layer = OneOf["h", "z"]
_START = 0.001  # of a weight that a target finds
Representations = Float[Tensor, "views batch in_dim"]
Projections = Float[Tensor, "views batch out_dim"]


class Weighted:
    """A regularizer with its weight, which may change from the first to the last step of training.

    Args:
        module: The regularizer.
        weight: Its weight at the start. None: 1, and 0.001 where a target finds it, so that nothing is lost before it
            has: what too large a weight takes out of h, an objective may not bring back.
        schedule: ``"constant"``, ``"linear"`` or ``"cosine"``.
        end_weight: Its weight at the end, for the other two.
        at_most: R*, a bound in the regularizer's own unit (nats for ``bottleneck``), not 0: the weight goes up while
            the value is larger, and down while it is smaller. None: there is none.
        keep_at: R*, a set point in the same unit, not 0: as above, and where the value is too small the weight is
            negative and pulls it up.
        weight_rate: η_λ, how fast the weight follows its target; None: 0.1 for a bound, 0.02 for a set point.

    Raises:
        UsageError: If the schedule is unknown, a weight is not finite, a target goes together with a schedule, a weight
            that is not positive, a second target, or a regularizer that has no weight, or the weight of a proximal step
            is or may become negative.

    Example:
        >>> Weighted(nn.Identity(), 1.0, schedule="linear").at(0.25)
        0.75
    """

    @checked
    def __init__(
        self, module: nn.Module, weight: float | None = None, *, schedule: Schedule = "constant",
        end_weight: float = 0.0, at_most: float | None = None, keep_at: float | None = None,
        weight_rate: float | None = None,
    ):  # fmt: skip
        check_choice("schedule", schedule, ("constant", "linear", "cosine"))
        if weight is None:
            weight = 1.0 if at_most is None and keep_at is None else _START
        if not (math.isfinite(weight) and math.isfinite(end_weight)):
            raise UsageError(f"Expected a regularizer's weight to be a finite number, got {weight} and {end_weight}.")
        if end_weight and schedule == "constant":
            raise UsageError(f"end_weight={end_weight} has no effect on a constant weight; give schedule='linear' too.")
        self.module, self.weight, self.schedule, self.end_weight = module, weight, schedule, end_weight
        self._targets = {n: v for n, v in {"at_most": at_most, "keep_at": keep_at}.items() if v is not None}
        self._values: list[Tensor] = []
        self._check_target(weight_rate)
        self._multiplier: Multiplier | None = None
        for name, target in self._targets.items():
            of = next(kind for kind in (Bound, SetPoint) if kind.option == name)
            self._multiplier = of(target, weight, weight_rate, type(module).__name__)

    def _check_target(self, weight_rate: float | None) -> None:
        given = (self.weight, self.schedule, self._targets, weight_rate)
        if not getattr(self.module, "has_weight", True) and given != (1.0, "constant", {}, None):
            raise UsageError(
                f"This {type(self.module).__name__} has a target of its own and no weight; leave weight, schedule, "
                "end_weight, at_most and keep_at out."
            )
        if getattr(self.module, "shrinks", False) and ("keep_at" in self._targets or min(self._weights()) < 0):
            raise UsageError(
                f"The proximal step of {type(self.module).__name__} makes weights smaller and never larger: it takes "
                "no negative weight, and no keep_at, which may find one; give at_most, or method='subgradient'."
            )
        if not self._targets:
            if weight_rate is not None:
                raise UsageError(
                    "weight_rate has no effect without a target, at_most or keep_at; give both, or leave it out."
                )
            return
        if len(self._targets) > 1:
            raise UsageError("Expected at_most, a bound, or keep_at, a set point, got both; leave one out.")
        ((name, target),) = self._targets.items()
        if not math.isfinite(target) or target == 0:
            raise UsageError(f"Expected {name} to be a finite number other than 0, got {target}.")
        rate = 1.0 if weight_rate is None else weight_rate
        if self.schedule != "constant" or not self.weight > 0 or not (rate > 0 and math.isfinite(rate)):
            raise UsageError(
                f"{name}={target} finds the weight itself: it takes a weight above 0 to start from (got "
                f"{self.weight}), a finite weight_rate above 0 (got {weight_rate}) and no schedule."
            )

    def __call__(self, model: nn.Module, h: Any, z: Any, *, step: Any = None) -> Tensor:
        """Return the regularizer's value, before the weight."""
        value = self.module(model, h, z, step=step)
        if self._multiplier is not None and torch.is_grad_enabled():
            self._values.append(value.detach())
        return value

    def at(self, progress: float) -> float:
        """Return the weight at `progress` in [0, 1] of the training; where a target finds it, that of the next step."""
        if not getattr(self.module, "has_weight", True):
            return 0.0
        if self._multiplier is not None:
            return self._multiplier.weight
        if self.schedule == "constant":
            return self.weight
        done = progress if self.schedule == "linear" else (1 - math.cos(math.pi * progress)) / 2
        return self.weight + (self.end_weight - self.weight) * done

    def largest(self) -> float:
        """Return the largest absolute weight of the training; infinite where a target finds it."""
        if self._multiplier is not None:
            return math.inf
        return max(map(abs, self._weights()))

    def _weights(self) -> tuple[float, float]:
        """Return the weights at the start and at the end."""
        return self.weight, self.end_weight if self.schedule != "constant" else self.weight

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
        if self._multiplier is not None and self._values:
            total = distributed.all_reduce_sum(double(torch.stack(self._values)).mean()).item()
            self._values.clear()
            if math.isfinite(total):  # else the step was no step
                self._multiplier.follow(total / distributed.world_size())

    def report(self, model: nn.Module) -> dict[str, float]:
        """Return what is logged beside the value: the regularizer's own numbers, and the weight that a target found."""
        report = getattr(self.module, "report", None)
        own = {} if report is None else report(model)
        return own if self._multiplier is None else {**own, "weight": self._multiplier.weight}

    def state(self) -> list[float | None] | None:
        """Return what a checkpoint keeps of a weight that a target finds."""
        return None if self._multiplier is None else self._multiplier.state()

    def take_up(self, state: Sequence[float | None] | None) -> None:
        """Go on from a `state`, or begin."""
        self._values.clear()
        if self._multiplier is not None:
            self._multiplier.take_up(state)

    def describe(self) -> dict[str, Any]:
        """Return what makes it again: weight, schedule or target, and the regularizer's own options."""
        options = {k: v for k, v in getattr(self.module, "created", {}).items() if k != "name"}
        if not getattr(self.module, "has_weight", True):
            return options
        moving = {} if self.schedule == "constant" else {"schedule": self.schedule, "end_weight": self.end_weight}
        if self._multiplier is not None:
            moving = {**self._targets, "weight_rate": self._multiplier.rate}
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
