"""Verdicts on claims, by rules that are fixed before a run: *holds*, *fails* or *cannot be judged*.

A test of a claim is a contrast, a weighted sum of cells (means over seeds). Its 95 % interval has two sources:

* other seeds: the spread s over seeds of what a row on a data set adds to the contrast, so that the contrast has the
  variance ``Σ s² / seeds`` (Welch's: rows differ in their spread, a collapsed one from a BatchNorm's). Columns of one
  row, as accuracy of h and of z, are of the same runs and go into one s, as pairs. Rows are taken as independent,
  though they share images and order: what they have in common makes the interval too wide rather than too narrow;
* other test images, where right and wrong answers are known: the variance over images of the contrast of answers,
  averaged over seeds, divided by the number of images. Rows and columns with answers on the same images are taken
  together, as pairs.

The two add up, with Student's t at the degrees of freedom of Welch and Satterthwaite. Columns on a logarithmic scale
are compared by their logarithms. A cell that lacks the number of one of its seeds (NaN, nothing positive on a
logarithmic scale) is not judged by those that are left; one whose seeds agree to the last digit counts as without
spread. The claim of a single test holds if the whole interval is on its side, fails if the whole interval is on the
other, and cannot be judged else; a claim of several tests holds if all do, and fails if one does. Nothing is corrected
for the number of claims: of 20 that say nothing, about one is decided by chance.

Of whether two columns rank the rows alike (`Agree`) the rows on their data sets are the sample: points are means over
seeds, whose noise is in the spread of the points, and the interval is that of a rank correlation of so many points.

References:
    Satterthwaite 1946, "An Approximate Distribution of Estimates of Variance Components" (degrees of freedom); Fieller,
    Hartley, Pearson 1957, "Tests for Rank Correlation Coefficients" (variance 1.06/(n − 3) of Fisher's z of Spearman's
    ρ).
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from scipy import stats

from hfproj.reproduction.claims import Agree, Cells, Claim, More, Same, Test, Trend, cells_of
from hfproj.reproduction.study import Study
from hfproj.results import unpack_outcomes

LEVEL = 0.95
HOLDS, FAILS, UNCLEAR = "holds", "fails", "cannot be judged"
Run = Mapping[str, Any]  # a record: "row", "data", "seed", "values", "outcomes"
Weights = dict[tuple[str, str, str], float]  # (row, data, column) → weight in a contrast


class Judged(NamedTuple):
    """One test of a claim: its number with the interval, and the verdict.

    Attributes:
        verdict: "holds", "fails" or "cannot be judged".
        value, low, high: Of the contrast; of its logarithm's exponential for columns on a logarithmic scale; of
            Spearman's ρ. NaN if nothing could be computed.
        why: What is missing, where it is.
        ratio: Whether the number is a ratio.
    """

    verdict: str
    value: float
    low: float
    high: float
    why: str = ""
    ratio: bool = False


def judge(study: Study, claim: Claim, runs: Sequence[Run]) -> tuple[str, list[Judged]]:
    """Return the verdict of a claim on runs of its study, and that of each of its tests.

    Example:
        >>> from hfproj.reproduction.registry import get_study
        >>> study = get_study("last_layer.table1")
        >>> judge(study, study.claims[0], [])[0]
        'cannot be judged'
    """
    found = [_judged(study, test, runs) for test in claim.tests]
    verdicts = {one.verdict for one in found}
    whole = FAILS if FAILS in verdicts else HOLDS if verdicts == {HOLDS} else UNCLEAR
    return whole, found


def _judged(study: Study, test: Test, runs: Sequence[Run]) -> Judged:
    cells = cells_of(Claim(text="", tests=(test,), source=""))
    if lacking := _lacking(study, cells, runs):
        return _unclear(lacking)
    if isinstance(test, Agree):
        return _agreement(study, test, runs)
    if lacking := _half_known(study, cells, runs):
        return _unclear(lacking)
    log = study.column(cells[0].column).log
    value, low, high = interval(study, weights(study, test), runs)
    if isinstance(test, More):
        against = 0.0 if isinstance(test.second, Cells) else math.log(test.second) if log else test.second
        verdict = _side(low - against, high - against, -1 if test.less else 1, test.margin)
    elif isinstance(test, Trend):
        verdict = _side(low, high, 1 if test.rises else -1)
    else:
        inside = -test.margin < low and high < test.margin
        outside = low > test.margin or high < -test.margin
        yes, no = (outside, inside) if test.apart else (inside, outside)
        verdict = HOLDS if yes else FAILS if no else UNCLEAR
    if log:
        value, low, high = math.exp(value), math.exp(low), math.exp(high)
    return Judged(verdict, value, low, high, ratio=log)


def _side(low: float, high: float, sign: int, margin: float = 0.0) -> str:
    """Return whether an interval, turned round if the sign is -1, lies above a margin."""
    low, high = sorted((sign * low, sign * high))
    return HOLDS if low > margin else FAILS if high < margin else UNCLEAR


def _unclear(why: str) -> Judged:
    return Judged(UNCLEAR, math.nan, math.nan, math.nan, why)


def weights(study: Study, test: More | Same | Trend) -> Weights:
    """Return the contrast of a test: what each cell (row, data, column) counts.

    Example:
        >>> from hfproj.reproduction.registry import get_study
        >>> test = More(Cells("200-NN", ("d0 = 0.94 d, c = 0",)), Cells("200-NN", ("d0 = 0.39 d, c = 0",)))
        >>> sorted(weights(get_study("last_layer.table1"), test).values())
        [-0.5, -0.5, 0.5, 0.5]
    """
    found: Weights = {}
    if isinstance(test, Trend):
        rows = test.cells.rows or tuple(row.name for row in study.rows)
        along = [Cells(test.cells.column, (row,), test.cells.data) for row in rows]
        ranks = np.arange(len(along)) - (len(along) - 1) / 2
        parts = list(zip(along, (ranks / (ranks**2).sum()).tolist(), strict=True))
    else:
        parts = [(test.first, 1.0)] + ([(test.second, -1.0)] if isinstance(test.second, Cells) else [])
    for cells, weight in parts:
        places = study.places(cells)
        for place in places:
            found[place] = found.get(place, 0.0) + weight / len(places)
    return found


def interval(study: Study, contrast: Weights, runs: Sequence[Run]) -> tuple[float, float, float]:
    """Return a contrast with the ends of its interval; without a second seed the interval is the whole line."""
    of_run: dict[tuple[str, str], Any] = {}  # (row, data) → what it adds, for each seed
    for (row, data, column), weight in contrast.items():
        if not weight:  # the middle of a trend
            continue
        own = weight * values_of(study, runs, row, data, column)
        of_run[row, data] = of_run.get((row, data), 0.0) + own
    value = sum(float(own.mean()) for own in of_run.values())
    variances: list[tuple[float, float]] = []  # of the contrast: (variance, degrees of freedom) of each source
    for own in of_run.values():
        free = len(own) - 1
        variances.append((float(own.var(ddof=1)) / len(own) if free else math.inf, free))
    variances += [(variance, math.inf) for variance in _image_variances(study, contrast, runs)]
    total = sum(variance for variance, _ in variances)
    if not math.isfinite(total):
        return value, -math.inf, math.inf
    freedom = sum(variance**2 / free for variance, free in variances)
    t = stats.t.ppf((1 + LEVEL) / 2, total**2 / freedom) if freedom else 1.96
    half = float(t) * math.sqrt(total)
    return value, value - half, value + half


def _image_variances(study: Study, contrast: Weights, runs: Sequence[Run]) -> list[float]:
    """Return the variance of the contrast over each set of test images of which right and wrong answers are known."""
    answers: dict[tuple[str, str, int], np.ndarray] = {}
    for (row, data, name), weight in contrast.items():
        column = study.column(name)
        packed = _outcomes(runs, row, data, name)
        if column.log or not packed:
            continue
        right = np.mean([unpack_outcomes(text) for text in packed], axis=0)
        images = (data, column.other, len(right))
        answers[images] = answers.get(images, np.zeros(len(right))) + weight * right
    return [float(np.var(own, ddof=1) / len(own)) for own in answers.values()]


def _outcomes(runs: Sequence[Run], row: str, data: str, column: str) -> list[str]:
    return [text for run in _runs_of(runs, row, data) if (text := run["outcomes"].get(column)) is not None]


def _agreement(study: Study, test: Agree, runs: Sequence[Run]) -> Judged:
    """Return Spearman's ρ of two columns over rows and data, with Fisher's interval."""
    places = study.places(test.x)
    if min(len(_runs_of(runs, row, data)) for row, data, _ in places) < 2:
        return Judged(UNCLEAR, math.nan, -math.inf, math.inf)
    x, y = ([values_of(study, runs, row, data, c).mean() for row, data, _ in places] for c in (test.x.column, test.y))
    if np.ptp(x) == 0 or np.ptp(y) == 0:
        return _unclear("a column has one value only")
    rho = float(stats.spearmanr(x, y).statistic)
    z, half = math.atanh(max(-0.9999, min(0.9999, rho))), 1.96 * math.sqrt(1.06 / (len(places) - 3))
    low, high = math.tanh(z - half), math.tanh(z + half)
    return Judged(_side(low, high, test.sign), rho, low, high)


def values_of(study: Study, runs: Sequence[Run], row: str, data: str, column: str) -> np.ndarray:
    """Return the values of a cell, ``[seeds]``; their logarithms for a column that is compared so."""
    log = study.column(column).log
    found = [run["values"].get(column) for run in _runs_of(runs, row, data)]
    known = np.array([v for v in found if v is not None and math.isfinite(v) and (v > 0 or not log)], dtype=np.float64)
    return np.log(known) if log else known


def _runs_of(runs: Iterable[Run], row: str, data: str) -> list[Run]:
    return sorted((r for r in runs if r["row"] == row and r["data"] == data), key=lambda r: r["seed"])


def _lacking(study: Study, cells: Iterable[Cells], runs: Sequence[Run]) -> str:
    """Return which cell has no value, or lacks that of a seed; "" if none does."""
    places = {place for one in cells for place in study.places(one)}
    have = {place: (len(values_of(study, runs, *place)), len(_runs_of(runs, *place[:2]))) for place in places}
    without = sorted(place for place, (values, made) in have.items() if not values or values < made)
    if not without:
        return ""
    row, data, column = without[0]
    values, made = have[without[0]]
    what = f"{made - values} of {made} seeds without a value" if values else "no value"
    more = f" and {len(without) - 1} more" if len(without) > 1 else ""
    return f"{what} of {column} of {row} on {data}{more}"


def _half_known(study: Study, cells: Iterable[Cells], runs: Sequence[Run]) -> str:
    """Return which cell has no right and wrong answers while others have; "" if all have, or none."""
    places = dict.fromkeys(place for one in cells for place in study.places(one))
    kept = {place: len(_outcomes(runs, *place)) == len(_runs_of(runs, *place[:2])) for place in places}
    if not any(kept.values()) or all(kept.values()):
        return ""
    row, data, column = next(place for place, whole in kept.items() if not whole)
    return f"no single answers of {column} of {row} on {data}, which others have"
