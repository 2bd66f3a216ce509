"""history.parquet: what is written comes back, the same rows give the same bytes, damage is named."""

import os

import numpy as np
import pyarrow.parquet
import pytest
import torch

from hfproj.errors import AdapterFileError, UsageError
from hfproj.results.history import read_history, write_history

ROWS = [
    {"step": 0, "epoch": 0.0, "rankme_h": 12.5, "std_z": None},
    {"step": 10, "epoch": 0.5, "loss": 3.25},
    {"step": 20, "epoch": 1.0, "rankme_h": 13.5, "loss": 3.0},
]


def test_round_trip_of_what_was_measured_what_was_not_and_what_was_no_number(tmp_path):
    path = write_history(ROWS, tmp_path)
    assert path == tmp_path / "history.parquet"
    assert read_history(path) == read_history(tmp_path) == ROWS
    first = path.read_bytes()
    assert write_history(read_history(path), path).read_bytes() == first
    assert os.listdir(tmp_path) == ["history.parquet"]
    schema = pyarrow.parquet.read_schema(path)
    assert {name: str(schema.field(name).type) for name in schema.names} == {
        "step": "int64",
        "epoch": "double",
        "rankme_h": "double",
        "std_z": "double",
        "loss": "double",
    }


def test_scalars_of_torch_and_numpy_and_what_is_not_finite(tmp_path):
    row = {"step": np.int64(3), "a": torch.tensor(0.5), "b": np.float32(0.25), "c": float("inf"), "d": float("nan")}
    assert read_history(write_history([row], tmp_path)) == [{"step": 3, "a": 0.5, "b": 0.25, "c": None, "d": None}]


def test_a_resumed_run_leaves_out_what_it_measures_anew(tmp_path):
    write_history(ROWS, tmp_path)
    kept = read_history(tmp_path, until=10)
    assert kept == ROWS[:2]
    again = {"step": 10, "epoch": 0.5, "loss": 9.0}
    assert read_history(write_history([*ROWS, again], tmp_path))[1] == again
    seeds = [{"seed": seed, "step": step, "loss": float(seed)} for seed in (1, 0) for step in (10, 0)]
    rows = read_history(write_history(seeds, tmp_path))
    assert [(row["seed"], row["step"]) for row in rows] == [(0, 0), (0, 10), (1, 0), (1, 10)]


def test_no_row(tmp_path):
    assert read_history(write_history([], tmp_path)) == []


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"loss": 1.0}, "'step'"),
        ({"step": None}, "'step'"),
        ({"step": 1.5}, "whole number"),
        ({"step": float("nan")}, "'step'"),
        ({"step": 0, "cause": "temperature"}, "'cause'"),
        ({"step": 0, "flag": True}, "'flag'"),
        ({"step": 0, "spectrum": [1.0]}, "'spectrum'"),
        ({"step": 0, "h": torch.ones(2)}, "'h'"),
    ],
)
def test_what_is_no_row_is_refused_and_leaves_the_old_file(tmp_path, row, message):
    path = write_history(ROWS, tmp_path)
    before = path.read_bytes()
    with pytest.raises(UsageError, match=message):
        write_history([row], path)
    assert path.read_bytes() == before


def test_a_missing_file_and_damage(tmp_path):
    with pytest.raises(UsageError, match="no file"):
        read_history(tmp_path)
    path = write_history(ROWS, tmp_path)
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(AdapterFileError, match="damaged"):
        read_history(path)
    pyarrow.parquet.write_table(pyarrow.table({"x": [1]}), path)
    with pytest.raises(AdapterFileError, match="no column 'step'"):
        read_history(path)
