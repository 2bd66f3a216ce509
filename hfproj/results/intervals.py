"""Bootstrap interval of a difference between two models that were scored on the same rows.

    d_i = after_i − before_i, averaged over seeds first;  quantiles of mean(d_i) over rows i drawn with replacement

The rows are paired, so that what is hard for both models cancels. Seeds are averaged, not resampled: the interval
speaks of other test rows, not of other training runs.
"""

from typing import NamedTuple

import numpy as np
import torch

from hfproj.errors import UsageError


class Interval(NamedTuple):
    """A mean difference with the ends of its interval."""

    difference: float
    low: float
    high: float


def paired_interval(
    correct_after: object, correct_before: object, *, level: float = 0.95, draws: int = 10_000, seed: int = 0
) -> Interval:
    """Return the mean of `after − before` with its percentile bootstrap interval, paired over rows.

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
        raise UsageError(f"Paired rows must be the same rows: got {after.size} after and {before.size} before.")
    difference = after - before
    generator = np.random.default_rng(seed)
    if np.isin(difference, (-1, 0, 1)).all():  # one seed: counts of the three outcomes are all that a draw needs
        counts = np.array([(difference == value).sum() for value in (-1, 0, 1)])
        drawn = generator.multinomial(difference.size, counts / difference.size, size=draws)
        means = (drawn[:, 2] - drawn[:, 0]) / difference.size
    else:
        rows = difference.size
        means = np.array([difference[generator.integers(0, rows, rows)].mean() for _ in range(draws)])
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return Interval(float(difference.mean()), float(low), float(high))


def _per_row(values: object, name: str) -> np.ndarray:
    values = values.detach().cpu().numpy() if isinstance(values, torch.Tensor) else values
    values = np.asarray(values, dtype=np.float64)
    if values.ndim not in (1, 2) or values.size == 0 or not np.isfinite(values).all():
        raise UsageError(f"Expected {name} as finite numbers [rows] or [seeds, rows], got shape {list(values.shape)}.")
    return values.mean(0) if values.ndim == 2 else values
