"""What training did to the accuracies of a layer: the difference, and the interval that says whether it is one."""

from typing import NamedTuple

from hfproj.errors import UsageError
from hfproj.probes.interval import Interval, paired_interval
from hfproj.results import Measurement, Results


class Verdict(NamedTuple):
    """What training did to one accuracy of a layer: means over seeds, and the interval of the difference if known."""

    label: str
    dataset: str
    before: float
    after: float
    interval: Interval | None

    @property
    def sense(self) -> str:
        """One of "better", "worse" and, where the interval holds 0, "unclear"."""
        low, high = self.interval[1:] if self.interval else [self.after - self.before] * 2
        return "better" if low > 0 else "worse" if high < 0 else "unclear"

    @property
    def headline(self) -> str:
        """The sense in words."""
        return {
            "better": "The representation got better",
            "worse": "The representation got worse",
            "unclear": "No gain was measured",
        }[self.sense]


def verdicts(results: Results, layer: str = "h") -> list[Verdict]:
    """Return one of every accuracy of a layer that was measured before and after training.

    Example:
        >>> measured = [Measurement("knn", "h", w, v, unit="accuracy") for w, v in (("before", 0.8), ("after", 0.9))]
        >>> [verdict.sense for verdict in verdicts(Results(measurements=measured))]
        ['better']
    """
    found = []
    for before, after in _pairs(results, layer):
        options = {"dataset": after.dataset, **after.settings}
        first = results.value(before.name, layer, "before", **options)
        last = results.value(after.name, layer, "after", **options)
        found.append(Verdict(after.label, after.dataset, first, last, _interval(results, after.name, layer, options)))
    return found


def _pairs(results: Results, layer: str) -> list[tuple[Measurement, Measurement]]:
    """Return one (before, after) of every accuracy of a layer that has both."""
    pairs: dict[tuple, tuple[Measurement, Measurement]] = {}
    for after in results.measurements:
        for before in results.measurements:
            same = (before.layer, before.when, before.key) == (layer, "before", after.key)
            if same and (after.layer, after.when, after.unit) == (layer, "after", "accuracy"):
                pairs.setdefault(after.key, (before, after))
    return list(pairs.values())


def _interval(results: Results, name: str, layer: str, options: dict) -> Interval | None:
    """Return the interval of the gain, or None where outcomes row by row were not kept."""
    try:
        return paired_interval(
            results.outcomes(name, layer, "after", **options), results.outcomes(name, layer, "before", **options)
        )
    except UsageError:
        return None
