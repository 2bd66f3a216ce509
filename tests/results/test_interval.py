import numpy as np
import pytest
import torch

from hfproj.errors import UsageError
from hfproj.results import Measurement, Results
from hfproj.results.measurement import pack_outcomes
from hfproj.results.verdict import paired_interval, verdicts


def draws_of(rows, gain, seed=0):
    generator = np.random.default_rng(seed)
    before = generator.random(rows) < 0.6
    after = np.where(generator.random(rows) < gain, True, before)
    return after, before


def test_agrees_with_the_normal_approximation():
    after, before = draws_of(2000, 0.1)
    difference = after.astype(float) - before
    half = 1.959964 * difference.std() / np.sqrt(2000)
    interval = paired_interval(after, before)
    assert interval.difference == pytest.approx(difference.mean())
    assert interval.low == pytest.approx(difference.mean() - half, abs=6e-4)
    assert interval.high == pytest.approx(difference.mean() + half, abs=6e-4)


def test_several_seeds_are_averaged_first():
    after, before = zip(*(draws_of(500, 0.1, seed) for seed in range(3)))
    interval = paired_interval(np.stack(after), torch.tensor(np.stack(before)), draws=2000)
    difference = np.mean(after, 0) - np.mean(before, 0)
    half = 1.959964 * difference.std() / np.sqrt(500)
    assert interval.low == pytest.approx(difference.mean() - half, abs=2e-3)
    assert interval.high == pytest.approx(difference.mean() + half, abs=2e-3)


def test_counts_and_resampling_agree():
    after, before = draws_of(400, 0.2)
    counted = paired_interval(after, before)
    resampled = paired_interval(after * 0.5, before * 0.5)  # differences of ±½ take the general way
    assert counted.low == pytest.approx(2 * resampled.low, abs=4e-3)
    assert counted.high == pytest.approx(2 * resampled.high, abs=4e-3)


def test_deterministic_and_wider_at_a_higher_level():
    after, before = draws_of(200, 0.1)
    assert paired_interval(after, before) == paired_interval(after, before)
    wide, narrow = paired_interval(after, before, level=0.99), paired_interval(after, before, level=0.5)
    assert wide.low <= narrow.low <= narrow.high <= wide.high


@pytest.mark.parametrize(
    ("after", "before", "options"),
    [
        ([1, 0], [1], {}),
        ([], [], {}),
        ([1.0, float("nan")], [1, 0], {}),
        ([1, 0], [1, 0], {"level": 1.0}),
        ([1, 0], [1, 0], {"draws": 0}),
    ],
)
def test_refusals(after, before, options):
    with pytest.raises(UsageError):
        paired_interval(after, before, **options)


def test_many_rows_of_several_seeds_are_counted(monkeypatch):
    """Their intervals are those of draws row by row, but for the noise of drawing."""
    sides = {when: [draws_of(2000, 0.1, seed)[i] for seed in range(3)] for i, when in enumerate(("after", "before"))}
    measured = [
        Measurement(
            "knn", "h", when, 0.5, unit="accuracy", protocol={"seed": seed}, outcomes=pack_outcomes(side.astype(int))
        )
        for when, own in sides.items()
        for seed, side in enumerate(own)
    ]
    [plain] = verdicts(Results(measurements=measured))
    assert plain.interval == paired_interval(*(np.stack(sides[when]) for when in ("after", "before")))
    monkeypatch.setattr("hfproj.results.verdict._MOST_ROWS", 1999)
    [counted] = verdicts(Results(measurements=measured))
    assert counted.interval != plain.interval
    assert counted.interval == pytest.approx(plain.interval, abs=6e-4)
