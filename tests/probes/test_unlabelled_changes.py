"""What training did where there are no labels: intervals against the closed form of a mean, and what is claimed."""

import json
from pathlib import Path

import pytest
import torch

import hfproj
from hfproj.probes import RANKS, unlabelled_changes
from hfproj.results import Change, Interval, unlabelled_sense

RESULTS = Path(__file__).resolve().parents[2] / "recipes/benchmarks/results/checkpoint_ranking.json"


def rows(count, dim=12, seed=0):
    return torch.randn(count, dim, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_the_interval_of_a_mean_is_that_of_its_standard_error():
    """Alignment is a mean over images, so that its difference has a standard error in closed form."""
    one, noise = rows(400), rows(400, seed=1)
    before, after = (torch.stack([one, one + scale * noise]) for scale in (0.5, 0.4))
    unit = torch.nn.functional.normalize
    distance = [(unit(v[0], dim=1) - unit(v[1], dim=1)).square().sum(1) for v in (before, after)]
    difference = distance[1] - distance[0]
    found = unlabelled_changes(one, one, views=(before, after), draws=1000)[2]
    assert (found.name, found.sense) == ("alignment", "better")
    assert found.interval.difference == pytest.approx(float(difference.mean()))
    error = 1.96 * float(difference.std()) / 400**0.5
    assert found.interval.high - found.interval.difference == pytest.approx(error, rel=0.1)
    assert found.interval.difference - found.interval.low == pytest.approx(error, rel=0.1)


def test_flatter_is_better_and_steeper_is_worse():
    flat, steep = rows(300), rows(300) / torch.arange(1, 13)
    for first, last, sense in ((steep, flat, "better"), (flat, steep, "worse"), (flat, flat, "unclear")):
        changes = unlabelled_changes(first, last, draws=30)
        assert [change.sense for change in changes] == [sense, sense]
        assert unlabelled_sense(changes) == sense
    assert changes[0].interval == Interval(0.0, 0.0, 0.0)


def test_what_has_no_value_is_left_out():
    assert [change.name for change in unlabelled_changes(rows(50, 4), rows(50, 4, seed=1), draws=5)] == ["uniformity"]


def test_what_disagrees_is_unclear():
    one, other = (Change("uniformity", 0.0, d, Interval(d, d - 0.1, d + 0.1)) for d in (1.0, -1.0))
    assert unlabelled_sense([one, other]) == "unclear"
    assert str(one) == "uniformity of h went from 0.0000 to 1.0000 (95 % interval of the change +0.9000 to +1.1000)"


def test_the_same_seed_gives_the_same_and_global_randomness_is_left_alone():
    torch.manual_seed(3)
    state = torch.random.get_rng_state()
    first, again, other = (unlabelled_changes(rows(50), 2 + rows(50, seed=1), seed=s, draws=10) for s in (0, 0, 1))
    assert first == again != other
    assert torch.equal(state, torch.random.get_rng_state())


@pytest.mark.parametrize(
    ("before", "after", "options", "said"),
    [
        (rows(20), rows(19), {}, "got 20 and 19"),
        (rows(8), rows(8), {}, "16 or more"),
        (rows(20), rows(20), {"level": 1.0}, "0 < level < 1"),
        (rows(20), rows(20), {"draws": 1}, "draws ≥ 2"),
        (rows(20), rows(20), {"views": (torch.zeros(2, 3, 4), torch.zeros(2, 3, 4))}, "4 or more images"),
    ],
)
def test_what_can_not_be_compared(before, after, options, said):
    with pytest.raises(hfproj.UsageError, match=said):
        unlabelled_changes(before, after, **options)


def test_ranks_are_those_that_were_measured():
    measured = {
        row["measure"]: tuple(round(row[name], 2) for name in ("spearman", "low", "high"))
        for row in json.loads(RESULTS.read_text())["ranking"]
        if row["layer"] == "h" and row["low"] > 0
    }
    assert measured == {name: tuple(ranks) for name, ranks in RANKS.items()}
