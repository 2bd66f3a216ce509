"""What training did to a layer: the difference of each accuracy with the interval that says whether it is one, what
became of the rank, and both as `findings` in the words of `words`.
"""

from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
import torch

from hfproj import limits
from hfproj.checking import checked
from hfproj.errors import UsageError
from hfproj.results import words
from hfproj.results.measurement import LAYERS, Key, Measured, Measurement, by_cell, mean_std, unpack_outcomes

_MOST_DRAWN, _MOST_VALUES = 1 << 30, 100  # rows times draws, beyond which equal differences are drawn as one
# Rows of all measures of several seeds, beyond which it is so for each; then of so many values, of fifteen seeds.
_MOST_ROWS, _FEW_VALUES = 50_000, 32
_ROUNDING = 1e-5  # of a measure in float32: equal images differ by less


class Interval(NamedTuple):
    """A mean difference (`difference`, after − before, in the unit of the measure) with the ends of its interval."""

    difference: float
    low: float
    high: float


class Verdict(NamedTuple):
    """What training did to one accuracy of a layer: means over seeds, and the interval of the difference if known.

    Attributes:
        label: The accuracy as people write it.
        dataset: What it was measured on.
        before, after: Means over seeds.
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
    key: Key = ("", "", "")

    @property
    def sense(self) -> str:
        """One of "better", "worse" and, where the interval holds 0, "unclear"."""
        low, high = self.interval[1:] if self.interval else [self.after - self.before] * 2
        return "better" if low > 0 else "worse" if high < 0 else "unclear"

    @property
    def headline(self) -> str:
        """The sense in words."""
        return words.HEADLINES[self.sense].format(layer=words.LAYER_NAMES.get(self.layer, f"layer {self.layer}"))

    @property
    def sentence(self) -> str:
        """What was measured before and after, with the interval, without a full stop."""
        name = self.key[0]
        gain, how = self.after - self.before, f"; {words.NO_INTERVAL}"
        if self.interval:
            gain, how = self.interval[0], f", {words.INTERVAL} {words.interval(name, *self.interval[1:])}"
        way = _way(name, self.before, self.after)
        return f"{self.label} of {self.layer}{_on(self.dataset)} {way} ({words.change(name, gain)}{how})"


class RankChange(NamedTuple):
    """What training did to RankMe of a layer on a data set: means over seeds, `before` and `after`, 1 to dim."""

    layer: str
    dataset: str
    before: float
    after: float

    @property
    def collapsed(self) -> bool:
        """Whether less than half of it is left, a sign of dimensional collapse."""
        return self.after < self.before / 2


class Finding(NamedTuple):
    """What training did, in words: a headline, and a text that ends in a full stop.

    Attributes:
        sense: One of the keys of `words.HEADLINES`: "alarm", "worse", "collapse", "unclear", "better", "rank" or
            "backbone".
        headline: The few words to set in bold.
        text: What was measured, and what follows from it.
        unlabelled: Whether it is what measures without labels say of h.
    """

    sense: str
    headline: str
    text: str
    unlabelled: bool = False

    def __str__(self) -> str:
        return f"{self.headline}: {self.text}"

    @property
    def warns(self) -> bool:
        """Whether a reader must be warned."""
        return self.sense in ("alarm", "worse", "collapse", "backbone")


@checked
def paired_interval(
    correct_after: object, correct_before: object, *, level: float = 0.95, draws: int = 10_000, seed: int = 0
) -> Interval:
    """Return the mean of `after − before` with its percentile bootstrap interval, paired over rows.

        d_i = after_i − before_i, averaged over seeds first;  quantiles of mean(d_i) over rows i drawn with replacement

    The rows are paired, so that what is hard for both models cancels. Seeds are averaged, not resampled: the interval
    speaks of other test rows, not of other training runs.

    Args:
        correct_after: One number (or bool) per test row, `[rows]`, or `[seeds, rows]`.
        correct_before: The same for the other model, same rows in the same order. The numbers of seeds may differ.
        level: Probability that the interval is meant to cover.
        draws: Bootstrap samples.
        seed: Of the bootstrap.

    Raises:
        UsageError: If shapes do not pair, there is no row, a value is not finite, level is outside (0, 1) or draws < 1.

    Example:
        >>> paired_interval([1, 1, 1, 0], [1, 1, 1, 0])
        Interval(difference=0.0, low=0.0, high=0.0)
    """
    if not 0 < level < 1 or draws < 1:
        raise UsageError(f"Expected 0 < level < 1 and draws ≥ 1, got level={level} and draws={draws}.")
    after, before = _per_row(correct_after, "correct_after"), _per_row(correct_before, "correct_before")
    if after.shape != before.shape:
        raise UsageError(f"Expected the same rows after and before, got {after.size} after and {before.size} before.")
    return _bootstrap(after - before, level, draws, seed, _MOST_DRAWN)


def _bootstrap(difference: np.ndarray, level: float, draws: int, seed: int, most_drawn: int) -> Interval:
    generator = np.random.default_rng(seed % 2**64)
    if np.isin(difference, (-1, 0, 1)).all():  # one seed: counts of the three outcomes are all that a draw needs
        counts = np.array([(difference == value).sum() for value in (-1, 0, 1)])
        drawn = generator.multinomial(difference.size, counts / difference.size, size=draws)
        means = (drawn[:, 2] - drawn[:, 0]) / difference.size
    elif (rows := difference.size) * draws > most_drawn and len(values := np.unique(difference)) <= _MOST_VALUES:
        counts = np.array([(difference == value).sum() for value in values])
        means = generator.multinomial(rows, counts / rows, size=draws) @ values / rows
    else:
        means = np.array([difference[generator.integers(0, rows, rows)].mean() for _ in range(draws)])
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return Interval(float(difference.mean()), float(low), float(high))


@checked
def verdicts(results: Measured, layer: str = "h") -> list[Verdict]:
    """Return one of every accuracy of a layer that was measured before and after training.

    Example:
        >>> from hfproj.results import Results
        >>> measured = [Measurement("knn", "h", w, v, unit="accuracy") for w, v in (("before", 0.8), ("after", 0.9))]
        >>> [verdict.sense for verdict in verdicts(Results(measurements=measured))]
        ['better']
    """
    cells = by_cell(m for m in results.measurements if m.layer == layer and m.unit == "accuracy")
    many = sum(4 * len(own[0].outcomes) for own in cells.values() if len(own) > 1) > 2 * _MOST_ROWS
    found = []
    for key in dict.fromkeys(key for key, _, when in cells if when == "after"):
        before, after = (cells.get((key, layer, when), []) for when in ("before", "after"))
        if before:
            first, last = (sum(m.value for m in side) / len(side) for side in (before, after))
            found.append(Verdict(after[0].label, key[1], first, last, _interval(before, after, many), layer, key))
    return found


@checked
def rank_changes(results: Measured, layers: Iterable[str] = LAYERS) -> list[RankChange]:
    """Return one of every RankMe of some layers that was measured before and after training.

    Example:
        >>> from hfproj.results import Results
        >>> ranks = [Measurement("rankme", "z", w, v) for w, v in (("before", 14.0), ("after", 1.2))]
        >>> [(change.layer, change.collapsed) for change in rank_changes(Results(measurements=ranks))]
        [('z', True)]
    """
    changes, cells = [], by_cell(results.measurements)
    for key in dict.fromkeys(m.key for m in results.measurements if m.name == "rankme"):
        for layer in layers:
            before, after = (mean_std(cells.get((key, layer, when), [])) for when in ("before", "after"))
            if before is not None and after is not None:
                changes.append(RankChange(layer, key[1], before[0], after[0]))
    return changes


class Change(NamedTuple):
    """What training did to a measure of h without labels that is better where it is lower.

    Attributes:
        name: "alpha_req", "uniformity" or "alignment".
        before, after: Its values.
        interval: Of the difference.
    """

    name: str
    before: float
    after: float
    interval: Interval

    @property
    def sense(self) -> str:
        """One of "better", "worse" and, where the interval holds 0 but for rounding, "unclear"."""
        _, low, high = self.interval
        return "better" if high < -_ROUNDING else "worse" if low > _ROUNDING else "unclear"

    def __str__(self) -> str:
        ends = words.interval(self.name, self.interval.low, self.interval.high)
        way = _way(self.name, self.before, self.after)
        return f"{words.label(self.name, '', {})} of h {way} ({words.INTERVAL} of the change {ends})"


@checked
def unlabelled_sense(changes: Sequence[Change]) -> str:
    """Return "better" or "worse" if all `changes` say so, each with an interval without 0; else "unclear".

    Example:
        >>> moves = [Change("uniformity", -1.0, -2.0, Interval(-1.0, -1.2, -0.8))]
        >>> unlabelled_sense(moves), unlabelled_sense([])
        ('better', 'unclear')
    """
    senses = {change.sense for change in changes}
    return senses.pop() if len(senses) == 1 else "unclear"


def recorded(changes: Sequence[Change]) -> dict[str, dict[str, float]]:
    """Return changes as `Results.geometry["unlabelled"]` holds them: `findings` tells them where there are no labels.

    Example:
        >>> from hfproj.results import Results
        >>> moves = [Change("uniformity", -1.0, -2.0, Interval(-1.0, -1.2, -0.8))]
        >>> findings(Results(geometry={"unlabelled": recorded(moves)}))[0].headline
        'The representation got better, as far as can be told without labels'
    """
    return {
        c.name: {"before": c.before, "after": c.after, "low": c.interval.low, "high": c.interval.high} for c in changes
    }


@checked
def findings(results: Measured) -> list[Finding]:
    """Return what training did to h and z in words, warnings first; gains of z alone are not told.

    Example:
        >>> from hfproj.results import Results
        >>> ranks = [Measurement("rankme", "z", w, v) for w, v in (("before", 14.0), ("after", 1.2))]
        >>> [str(finding) for finding in findings(Results(measurements=ranks))]
        ['A sign of dimensional collapse: RankMe of z went from 14.0 to 1.2 (less than half).']
    """
    ranks = rank_changes(results)
    spoken = [_ranks(ranks)] if ranks else []
    found = [
        _backbone(results),
        _alarm(results.geometry.get("collapse")),
        *(_judged(results, "worse", layer) for layer in LAYERS),
    ]
    found += [finding for finding in spoken if finding.warns]
    found += [_judged(results, sense, "h") for sense in ("better", "unclear")]
    found += [] if verdicts(results) else [_unlabelled(results)]
    return [f for f in [*found, *(finding for finding in spoken if not finding.warns)] if f is not None]


def _judged(results: Measured, sense: str, layer: str) -> Finding | None:
    found = [verdict for verdict in verdicts(results, layer) if verdict.sense == sense]
    if not found:
        return None
    others = {verdict.sense for verdict in verdicts(results, layer)} - {sense}
    advice = words.ADVICE.get((sense, layer)) if sense != "unclear" or not others else None
    text = "; ".join(verdict.sentence for verdict in found) + "."
    return Finding(sense, found[0].headline, f"{text} {advice}" if advice else text)


def _ranks(changes: Sequence[RankChange]) -> Finding:
    """Return the changes of RankMe in words: of a data set "of h went from 17.0 to 18.0 and of z went from …"."""
    parts = []
    for dataset in dict.fromkeys(change.dataset for change in changes):
        ways: list[str] = []
        for change in (change for change in changes if change.dataset == dataset):
            way = _way("rankme", change.before, change.after)
            ways.append(f"of {change.layer} {way}{f' ({words.LESS_THAN_HALF})' * change.collapsed}")
        parts.append(f"{words.LABELS['rankme']} {' and '.join(ways)}{_on(dataset)}")
    sense = "collapse" if any(change.collapsed for change in changes) else "rank"
    return Finding(sense, words.HEADLINES[sense], "; ".join(parts) + ".")


def _alarm(alarm: Any) -> Finding | None:
    if not isinstance(alarm, Mapping) or not alarm:
        return None
    step = f" at step {alarm['step']}" if alarm.get("step") is not None else ""
    what = alarm.get("what") or alarm.get("cause") or "its cause was not recorded."
    kind = "guard" if str(alarm.get("metric")).startswith("knn_overlap") else "alarm"  # which is no collapse
    return Finding("alarm", words.HEADLINES[kind] + step, str(what))


def _unlabelled(results: Measured) -> Finding | None:
    """Return what measures without labels say, where there are none; a file's own words are not among them."""
    kept, changes = results.geometry.get("unlabelled"), []
    for name in words.ARROWS:
        values = kept.get(name) if isinstance(kept, Mapping) else None
        found = [values.get(part) for part in ("before", "after", "low", "high")] if isinstance(values, Mapping) else []
        numbers = [float(value) for value in found if isinstance(value, int | float) and abs(value) < 1e9]
        if len(numbers) == 4:
            before, after, low, high = numbers
            changes.append(Change(name, before, after, Interval(after - before, low, high)))
    if not changes:
        return None
    sense = unlabelled_sense(changes)
    text = f"{'; '.join(map(str, changes))}. {words.UNLABELLED_SIGN}"
    return Finding(sense, words.UNLABELLED_HEADLINES[sense], text, unlabelled=True)


def _backbone(results: Measured) -> Finding | None:
    """Return that the adapter is used on other weights than it was made on, where its config says so."""
    adapter: Any = getattr(results, "config", {}).get("adapter")
    kept = adapter.get("fingerprint") if isinstance(adapter, Mapping) else None
    other = kept.get("instead_of") if isinstance(kept, Mapping) else None
    return (
        Finding("backbone", words.HEADLINES["backbone"], words.BACKBONE["meant"].format(other=other)) if other else None
    )


def _way(name: str, before: float, after: float) -> str:
    return words.WENT.format(before=words.number(name, before), after=words.number(name, after))


def _on(dataset: str) -> str:
    return f" on {dataset}" if dataset else ""


def _per_row(values: object, name: str) -> np.ndarray:
    try:
        values = values.detach().cpu().numpy() if isinstance(values, torch.Tensor) else values
        values = np.asarray(values, dtype=np.float64)
    except (TypeError, ValueError, RuntimeError):
        raise UsageError(f"Expected {name} as numbers [rows] or [seeds, rows], got {type(values).__name__}.") from None
    if values.ndim not in (1, 2) or values.size == 0 or not np.isfinite(values).all():
        raise UsageError(f"Expected {name} as finite numbers [rows] or [seeds, rows], got shape {list(values.shape)}.")
    return values.mean(0) if values.ndim == 2 else values


def _interval(before: list[Measurement], after: list[Measurement], many: bool) -> Interval | None:
    """Return the interval of the gain, or None where outcomes row by row were not kept, or not of the same rows."""
    return _interval_of(tuple(m.outcomes for m in after), tuple(m.outcomes for m in before), many)


@lru_cache(maxsize=limits.MEASUREMENTS)  # a page asks several times
def _interval_of(after: tuple[str, ...], before: tuple[str, ...], many: bool) -> Interval | None:
    try:
        sides = [np.stack(list(map(unpack_outcomes, side))) for side in (after, before)]
        if not many:
            return paired_interval(*sides)
        difference = _per_row(sides[0], "after") - _per_row(sides[1], "before")
        few = len(np.unique(difference)) <= _FEW_VALUES
        return _bootstrap(difference, 0.95, 10_000, 0, 0) if few else None
    except (UsageError, ValueError):
        return None
