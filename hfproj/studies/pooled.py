"""Whether numbers of a few seeds differ: an interval of a difference of means, by one rule for all documents."""

import math
from collections.abc import Mapping, Sequence

import numpy as np
from scipy import stats

from hfproj.checking import checked
from hfproj.errors import UsageError
from hfproj.results import Interval

LEVEL = 0.95


@checked
def pooled_interval(values: Mapping[str, Sequence[float]], first: str, second: str, *, rows: int = 0) -> Interval:
    """Return the 95 % interval of the mean of `first` minus that of `second`.

    Two variances add up, with Student's t at the degrees of freedom of Welch and Satterthwaite:

    * other seeds: s²/n of both, s² pooled over all of `values`, since three numbers alone say little of a spread. What
      has one value is taken as known (a measure before training has no seed);
    * other test rows: p(1 − p)/rows of both, as if each had rows of its own. Both were asked the same rows, so that the
      interval is rather too wide. `hfproj.results.paired_interval` is narrower, where answers row by row were kept.

    Args:
        values: Name → value of each seed.
        first: Name of the mean.
        second: Name of the mean that is subtracted.
        rows: Test rows behind each value, which is then a fraction of right answers; 0 leaves this part out.

    Raises:
        UsageError: If a name is unknown, no name has two seeds, or values are no fractions though there are rows.

    Example:
        >>> from hfproj.studies.pooled import pooled_interval
        >>> found = pooled_interval({"a": [1.0, 3.0], "b": [7.0, 9.0]}, "b", "a")  # 6 ± t(2)·√2
        >>> [round(value, 2) for value in found[:3]]
        [6.0, -0.08, 12.08]
    """
    for name in (first, second):
        if name not in values or not len(values[name]):
            raise UsageError(f"Expected values of {name!r}, got {sorted(values)}.")
    many = [np.asarray(own, dtype=np.float64) for own in values.values() if len(own) > 1]
    if not many:
        raise UsageError("Expected a name with two seeds at least, got one value each.")
    free = sum(len(own) - 1 for own in many)
    pooled = sum(float(((own - own.mean()) ** 2).sum()) for own in many) / free
    a, b = (np.asarray(values[name], dtype=np.float64) for name in (first, second))
    of_seeds = sum(pooled / len(own) for own in (a, b) if len(own) > 1)
    means = [float(own.mean()) for own in (a, b)]
    if rows and not all(0 <= mean <= 1 for mean in means):
        raise UsageError(f"Expected fractions of right answers among {rows} rows, got {means}.")
    total = of_seeds + (sum(mean * (1 - mean) / rows for mean in means) if rows else 0.0)
    t = float(stats.t.ppf((1 + LEVEL) / 2, free * (total / of_seeds) ** 2)) if of_seeds else 1.96
    half = t * math.sqrt(total)
    difference = means[0] - means[1]
    return Interval(difference, difference - half, difference + half)
