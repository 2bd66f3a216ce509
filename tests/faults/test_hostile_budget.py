"""Files made to take memory or time, each within the budget of `hfproj.limits`: in processes that end beyond it."""

import pytest
from hostile_files import CATEGORIES
from hostile_run import run


def check(category):
    found = run([category])[category]
    assert not found["failures"]
    return found


@pytest.mark.parametrize(("category", "least"), [(".pth", 190), ("history", 1500), ("read_results", 100)])
def test_files_stay_within_the_budget(category, least):
    found = check(category)
    assert found["tried"] >= least
    assert found["most_bytes"][0]["bytes"] < 1 << 28


@pytest.mark.long
def test_results_that_are_shown_stay_within_the_budget():
    assert check("shown_results")["tried"] >= 40


@pytest.mark.long
def test_adapters_stay_within_the_budget():
    assert check("hostile adapters")["tried"] >= 900
    assert set(CATEGORIES) == {"hostile adapters", ".pth", "history", "results"}
