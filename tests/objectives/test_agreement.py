"""The committed comparison with public implementations has every method, and says that they agree."""

import json
from pathlib import Path

import pytest

from hfproj.objectives import list_objectives
from hfproj.regularizers import list_regularizers

RESULTS = Path(__file__).resolve().parents[2] / "recipes" / "benchmarks" / "results" / "agreement.json"
# What differs for a reason that the table gives: float32 constants of the other, and a floor under eigenvalues.
EXPLAINED = {"dino": 1e-8, "lejepa": 1e-8, "wasserstein": 1e-6}


def rows():
    return json.loads(RESULTS.read_text(encoding="utf-8"))["rows"]


def method(row):
    return row["name"].removeprefix("regularizer ").partition(",")[0]


def test_every_method_has_a_row():
    """After a new method: add a row to recipes/benchmarks/agreement.py and run it."""
    compared = {kind: set() for kind in ("objective", "regularizer")}
    for row in rows():
        compared["regularizer" if row["name"].startswith("regularizer ") else "objective"].add(method(row))
    assert compared["objective"] | {"cross_entropy"} == set(list_objectives())  # whose formula is torch's own
    assert compared["regularizer"] == set(list_regularizers())


@pytest.mark.parametrize("row", rows(), ids=lambda row: f"{row['name']} {row['peer']}")
def test_differences_are_rounding_or_explained(row):
    within = EXPLAINED.get(method(row), 0) if row["note"] else 0
    assert row["value"] <= max(within, 1e-14 * max(row["largest_value"], 5))
    assert row["gradient"] <= max(within, 1e-13 * max(row["largest_gradient"], 5))
    assert row["half"] <= (1e-4 if method(row) == "wasserstein" else 1e-5)
