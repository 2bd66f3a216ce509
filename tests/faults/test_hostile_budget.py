"""Files made to take memory or time, each within the budget of `hfproj.limits`: in processes that end beyond it."""

import pytest
from hostile_files import CATEGORIES
from hostile_run import run


def check(category, every=1):
    found = run([category], every)[category]
    assert not found["failures"]
    return found


FILES = [(".pth", 190), ("history", 1500), ("read_results", 100)]


@pytest.mark.parametrize(
    ("category", "least", "every"),
    [(*files, 4) for files in FILES] + [pytest.param(*files, 1, marks=pytest.mark.long) for files in FILES],
)
def test_files_stay_within_the_budget(category, least, every):
    found = check(category, every)
    assert found["tried"] >= least // every
    assert found["most_bytes"][0]["bytes"] < 1 << 28


@pytest.mark.long
def test_results_that_are_shown_stay_within_the_budget():
    assert check("shown_results")["tried"] >= 40


@pytest.mark.long
def test_adapters_stay_within_the_budget():
    assert check("hostile adapters")["tried"] >= 900
    assert set(CATEGORIES) == {"hostile adapters", ".pth", "history", "results"}
