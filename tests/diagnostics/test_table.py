"""docs/diagnostics.md: a row for every measure, which says what the code does."""

import inspect
import re
from pathlib import Path

import pytest
import torch
from diagnostics.features import decaying, normal

from hfproj import diagnostics
from hfproj.diagnostics import SpectrumState, ViewState

TEXT = (Path(__file__).resolve().parents[2] / "docs" / "diagnostics.md").read_text(encoding="utf-8")
OF_SEVERAL = {"clid_scores", "weight_inequality", "layer_inequality"}  # what compares models or layers: in the text
STATES = {"`SpectrumState`": SpectrumState, "`ViewState`": ViewState}


def rows():
    lines = [line for line in TEXT.splitlines() if line.startswith("|")]
    headings = [cell.strip() for cell in lines[0].strip("|").split("|")]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]
    assert all(len(row) == len(headings) for row in cells)
    return {row[0].strip("`"): dict(zip(headings, row)) for row in cells}


ROWS = rows()


def test_every_measure_has_a_row():
    functions = {name for name in diagnostics.__all__ if inspect.isfunction(getattr(diagnostics, name))}
    assert set(ROWS) == functions - OF_SEVERAL
    assert all(f"`{name}`" in TEXT for name in [*OF_SEVERAL, *STATES.values()] if isinstance(name, str))


@pytest.mark.parametrize("name", ROWS)
def test_a_row_says_whether_it_streams(name):
    streams = [state for state in STATES.values() if hasattr(state, name.removesuffix("_of_views"))]
    assert streams == [STATES[cell] for cell in [ROWS[name]["streams"]] if cell in STATES]


def numbers(name, f):
    measure = getattr(diagnostics, name)
    needs = ROWS[name]["needs"]
    views = torch.stack([f, f.roll(1, 1)])
    arguments = {
        "f": (f,),
        "views": (views,),
        "`[objects, views, dim]`": (views.transpose(0, 1),),
        "h and z": (f, f[:, :3]),
        "views of h and z": (views, views[..., :3]),
        "f and known features φ": (f, decaying(len(f), 2, seed=1)),
    }[needs]
    return torch.as_tensor(measure(*arguments), dtype=torch.float64).flatten()


@pytest.mark.parametrize("name", ROWS)
def test_a_row_says_whether_it_centres(name):
    f = decaying(180, 12, 0.5)
    if name == "numerical_rank":
        f = f[:, :5] @ normal(5, 12)  # an offset adds a direction
    lengths = torch.linspace(1, 3, 180, dtype=torch.float64)[:, None]
    value, shifted, scaled = (numbers(name, g) for g in (f, f + 9, f * lengths))
    ignores_offsets = torch.allclose(value, shifted, rtol=1e-8)
    assert ignores_offsets == (ROWS[name]["centres"] == "yes")
    if ROWS[name]["centres"] == "unit":
        assert torch.allclose(value, scaled, rtol=1e-8)


def test_its_example_gives_the_numbers_of_the_functions():
    (code,) = re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)
    exec(code, names := {})
    z = names["features"].transpose(0, 1).flatten(1, 2)
    assert names["state"].rankme() == pytest.approx(diagnostics.rankme(z.flatten(0, 1)), rel=1e-10)
    assert names["views"].lidar() == pytest.approx(diagnostics.lidar_of_views(z), rel=1e-12)


def test_the_benchmark_it_links_to():
    (link,) = re.findall(r"\]\((\.\./[^)]+)\)", TEXT)
    assert link == "../recipes/benchmarks/results/diagnostics.md"
