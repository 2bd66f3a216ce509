"""What training did to a layer: the difference of each accuracy with the interval that says whether it is one, and what
became of the rank.
"""

from collections.abc import Iterable
from typing import NamedTuple

import numpy as np

from hfproj.errors import UsageError
from hfproj.results import LAYERS, Measurement, Results, unpack_outcomes
from hfproj.results.intervals import Interval, paired_interval

_WHAT = {"h": "representation", "z": "projection"}


class Verdict(NamedTuple):
    """What training did to one accuracy of a layer: means over seeds, and the interval of the difference if known.

    Attributes:
        label: The accuracy as people write it.
        dataset: What it was measured on.
        before: Mean over seeds.
        after: Mean over seeds.
        interval: Of the difference, paired over test rows; None where answers row by row were not kept.
        layer: "h", "z", or an intermediate layer's name.
        key: `Measurement.key` of the measurements that it speaks of.
    """

    label: str
    dataset: str
    before: float
    after: float
    interval: Interval | None
    layer: str = "h"
    key: tuple[str, str, str] = ("", "", "")

    @property
    def sense(self) -> str:
        """One of "better", "worse" and, where the interval holds 0, "unclear"."""
        low, high = self.interval[1:] if self.interval else [self.after - self.before] * 2
        return "better" if low > 0 else "worse" if high < 0 else "unclear"

    @property
    def headline(self) -> str:
        """The sense in words."""
        what = f"The {_WHAT.get(self.layer, f'layer {self.layer}')} got"
        return {"better": f"{what} better", "worse": f"{what} worse", "unclear": "No gain was measured"}[self.sense]


def verdicts(results: Results, layer: str = "h") -> list[Verdict]:
    """Return one of every accuracy of a layer that was measured before and after training.

    Example:
        >>> measured = [Measurement("knn", "h", w, v, unit="accuracy") for w, v in (("before", 0.8), ("after", 0.9))]
        >>> [verdict.sense for verdict in verdicts(Results(measurements=measured))]
        ['better']
    """
    measured = [m for m in results.measurements if m.layer == layer and m.unit == "accuracy"]
    found = []
    for key in dict.fromkeys(m.key for m in measured if m.when == "after"):
        before, after = ([m for m in measured if (m.key, m.when) == (key, when)] for when in ("before", "after"))
        if before:
            first, last = _mean(before), _mean(after)
            interval = _interval(before, after)
            found.append(Verdict(after[0].label, after[0].dataset, first, last, interval, layer, key))
    return found


class RankChange(NamedTuple):
    """What training did to RankMe of a layer: means over seeds."""

    layer: str
    dataset: str
    before: float
    after: float

    @property
    def collapsed(self) -> bool:
        """Whether less than half of it is left, a sign of dimensional collapse."""
        return self.after < self.before / 2


def rank_changes(results: Results, layers: Iterable[str] = LAYERS) -> list[RankChange]:
    """Return one of every RankMe of some layers that was measured before and after training.

    Example:
        >>> ranks = [Measurement("rankme", "z", w, v) for w, v in (("before", 14.0), ("after", 1.2))]
        >>> [(change.layer, change.collapsed) for change in rank_changes(Results(measurements=ranks))]
        [('z', True)]
    """
    changes = []
    for key in dict.fromkeys(m.key for m in results.measurements if m.name == "rankme"):
        for layer in layers:
            before, after = (results.mean_std(key, layer, when) for when in ("before", "after"))
            if before is not None and after is not None:
                changes.append(RankChange(layer, key[1], before[0], after[0]))
    return changes


def _mean(measured: list[Measurement]) -> float:
    return sum(m.value for m in measured) / len(measured)


def _interval(before: list[Measurement], after: list[Measurement]) -> Interval | None:
    """Return the interval of the gain, or None where outcomes row by row were not kept, or not of the same rows."""
    try:
        return paired_interval(_outcomes(after), _outcomes(before))
    except (UsageError, ValueError):
        return None


def _outcomes(measured: list[Measurement]) -> np.ndarray:
    """Return right and wrong `[seeds, rows]`; a ValueError where some are missing or damaged."""
    for m in measured:
        count, _, digits = m.outcomes.partition(":")
        if int(count) > 4 * len(digits):  # four rows a digit: more would be made up, and may be too many to hold
            raise ValueError("The outcomes are damaged.")
    return np.stack([unpack_outcomes(m.outcomes) for m in measured])
