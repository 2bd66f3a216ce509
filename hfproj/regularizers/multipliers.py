"""Weights that a target of the regularizer's value finds: multipliers of a constraint R ≤ R* or R = R*.

After each optimizer step, with the relative excess e = (R − R*) / |R*|, R the mean over the step's micro-batches and
all processes, and ē a moving average of e clipped to [−1, 1]:

* `Bound`, R ≤ R*: dual ascent on the logarithm, ``log λ ← log λ + η_λ · e + (ē − ē')`` by no more than log 1.05 up or
  down, ē' the average before the step, ē of a fifth of each step's e: while R approaches R* the weight holds back. λ is
  positive, and stays within a factor of a million of its start: where R is below R* by itself, λ goes to 0, and nothing
  pulls R up.
* `SetPoint`, R = R*: the augmented Lagrangian ``λ R + ρ (R − R*)² / (2 |R*|)``, whose gradient is that of R times
  λ + ρ ē. Here λ may be negative, which pulls R up. ``λ ← λ + η_λ · ρ · ē``, ē of 0.3 of each step's e; ρ grows by up
  to 5 % a step while |ē| is above 0.05, shrinks by 1 % else, and is halved where ē goes from one side of that band to
  the other. ρ stays within a factor of a million of its start.

References:
    Platt and Barr 1987, Constrained differential optimization (with damping); Rezende and Viola 2018, arXiv 1810.00597
    (on log λ); Bertsekas 1982, Constrained Optimization and Lagrange Multiplier Methods (augmented Lagrangian);
    Riedmiller and Braun 1993, RPROP (a gain that grows while the sign stays and shrinks where it changes).

Deviations:
    Ours: relative to R*, clipped, with these constants.
"""

import math
import warnings
from abc import ABC, abstractmethod
from collections.abc import Sequence

from hfproj import distributed
from hfproj.errors import UsageError

_LARGEST_CHANGE, _FARTHEST = math.log(1.05), math.log(1e6)  # of a logarithm: in a step, and from its start
_BAND = 0.05  # of the relative excess: within it ρ has no reason to grow
State = list[float | None]


class Multiplier(ABC):
    """A weight that follows a target.

    Args:
        target: R*, finite and not 0.
        start: Weight, or penalty ρ, to start from, above 0.
        rate: η_λ, above 0; None: the class's own.
        name: Of the regularizer, for warnings.
    """

    option: str  # that gives the target
    parts: int  # of a state
    rate: float  # unless another is given
    smoothing: float

    def __init__(self, target: float, start: float, rate: float | None, name: str):
        self.target, self.start, self.name = target, start, name
        self.rate = rate if rate is not None else self.rate
        self.take_up(None)
        self._said = False

    @property
    @abstractmethod
    def weight(self) -> float:
        """The weight of the next step."""

    @abstractmethod
    def state(self) -> State:
        """What a checkpoint keeps."""

    def take_up(self, state: Sequence[float | None] | None) -> None:
        """Go on from a state, or begin.

        Raises:
            UsageError: If it is the state of another kind of target.
        """
        if state is not None and len(state) != self.parts:
            raise UsageError(
                f"Expected a checkpoint of a training with {self.option} of {self.name}, got one of another kind of "
                "target; resume with the target that it was trained with."
            )
        self._take_up(state or [None] * self.parts)

    @abstractmethod
    def _take_up(self, state: Sequence[float | None]) -> None: ...

    @abstractmethod
    def follow(self, value: float) -> None:
        """Move the weight after a step in which the regularizer had this value."""

    def _smoothed(self, before: float | None, value: float) -> tuple[float, float]:
        """Return the step's excess e and the moving average ē."""
        excess = (value - self.target) / abs(self.target)
        clipped = min(max(excess, -1.0), 1.0)
        return excess, clipped if before is None else before + self.smoothing * (clipped - before)

    def _within(self, log: float) -> float:
        """Return a logarithm within reach of its start; say once that it is at the end of it."""
        start = math.log(self.start)
        if log >= start + _FARTHEST and not self._said and distributed.rank() == 0:
            self._said = True
            warnings.warn(
                f"{self.name} stays away from its target of {self.target}: its weight is a million times the one it "
                f"started from, {self.start:g}, and goes no higher. Give a target that can be reached, or start "
                "higher.",
                stacklevel=2,
            )
        return min(max(log, start - _FARTHEST), start + _FARTHEST)


class Bound(Multiplier):
    """The weight of R ≤ R*."""

    option, parts = "at_most", 2
    rate, smoothing = 0.1, 0.2

    @property
    def weight(self) -> float:
        """The weight of the next step."""
        return math.exp(self._log)

    def state(self) -> State:
        """Logarithm of the weight, and ē."""
        return [self._log, self._excess]

    def _take_up(self, state: Sequence[float | None]) -> None:
        log, self._excess = state
        self._log = math.log(self.start) if log is None else log

    def follow(self, value: float) -> None:
        """Move the weight after a step in which the regularizer had this value."""
        before = self._excess
        excess, self._excess = self._smoothed(before, value)
        change = self.rate * excess + (0.0 if before is None else self._excess - before)
        self._log = self._within(self._log + min(max(change, -_LARGEST_CHANGE), _LARGEST_CHANGE))


class SetPoint(Multiplier):
    """The weight of R = R*, which may be negative."""

    option, parts = "keep_at", 4
    rate, smoothing = 0.02, 0.3

    @property
    def weight(self) -> float:
        """The weight of the next step; that of the first is `start`."""
        return self.start if self._excess is None else self._weight + math.exp(self._log) * self._excess

    def state(self) -> State:
        """λ, the logarithm of ρ, ē, and the side of the target it was on when it was last outside of the band."""
        return [self._weight, self._log, self._excess, self._side]

    def _take_up(self, state: Sequence[float | None]) -> None:
        weight, log, self._excess, side = state
        self._weight, self._side = weight or 0.0, side or 0.0
        self._log = math.log(self.start) if log is None else log

    def follow(self, value: float) -> None:
        """Move the weight after a step in which the regularizer had this value."""
        _, excess = self._smoothed(self._excess, value)
        self._excess, beyond = excess, abs(excess) - _BAND
        log = self._log
        if beyond > 0:
            side = math.copysign(1.0, excess)
            log += math.log(0.5) if side == -self._side else 0.0
            self._side = side
        self._weight += self.rate * math.exp(log) * excess
        self._log = self._within(log + (_LARGEST_CHANGE * min(1.0, beyond / 0.2) if beyond > 0 else -0.01))
