"""Runs on one and two processes that are killed or stopped at random moments and started again with "auto"."""

import signal

import numpy as np
import pytest
import runs
import torch


def assert_same(folder, world, codes, **options):
    """Compare with a run that nothing interrupted."""
    expected = folder.with_name("expected")
    assert runs.wait(runs.start(expected, world, resume=None, result=f"{expected}.pt", **options)) == [0] * world
    assert codes[-1] == [0] * world
    there, here = torch.load(f"{expected}.pt"), torch.load(f"{folder}.pt")
    assert there.keys() == here.keys()
    assert [n for n in there if not torch.equal(there[n], here[n])] == []


@pytest.mark.parametrize(
    ("world", "number"),
    [
        (1, signal.SIGKILL),
        pytest.param(2, signal.SIGKILL, marks=pytest.mark.long),
        (1, signal.SIGTERM),
        pytest.param(2, signal.SIGTERM, marks=pytest.mark.long),
    ],
)
def test_started_again_until_it_is_done(tmp_path, world, number):
    rng = np.random.default_rng([world, number])
    folder = tmp_path / "run"
    codes = runs.interrupted(folder, world, number, rng, few=4, most=2, result=f"{folder}.pt", save_total_limit=2)
    assert len(codes) == 3
    if number == signal.SIGTERM:
        assert codes[:-1] == [[75] * world] * 2
    assert_same(folder, world, codes)
