"""Results as a line, in a notebook and in pandas."""

import sys
from html.parser import HTMLParser

import pytest

from hfproj.errors import HfprojError
from hfproj.results import Measurement, Missing, Results

HOSTILE = "<script>alert(1)</script>"


def measured(name="digits"):
    return Results(
        measurements=[
            Measurement("knn", layer, when, value, name, "accuracy", {"k": 20, "seed": seed})
            for layer in ("h", "z")
            for when, value in (("before", 0.8), ("after", 0.9))
            for seed in (0, 1)
        ],
        seeds=[0, 1],
        missing=[Missing("rankme", "h", "after", f"one row of {name}")],
        log=[{"step": step, "loss": 1.0} for step in range(1000)],
    )


def test_a_line_is_short_and_says_what_was_measured():
    line = repr(measured())
    assert (
        line
        == "Results(20-NN accuracy of h, z before and after training, on digits, 2 seeds; .table() shows the numbers)"
    )
    assert repr(Results()) == "Results(nothing measured)"
    many = [Measurement(f"probe{i}", f"layer{i}", "after", 0.5, "x" * 500) for i in range(99)]
    line = repr(Results(measurements=many))
    assert "95 more" in line
    assert len(line) < 300


def test_a_notebook_shows_the_table_and_the_verdict_escaped():
    class Tags(HTMLParser):
        def __init__(self, page):
            super().__init__()
            self.tags = set()
            self.feed(page)

        def handle_starttag(self, tag, attributes):
            self.tags.add(tag)

    page = measured(HOSTILE)._repr_html_()
    assert Tags(page).tags == {"table", "thead", "tbody", "tr", "th", "td", "p", "strong"}
    assert "0.9000 ± 0.0000" in page
    assert "The representation got better" in page
    assert "Not measured" in page
    assert Results()._repr_html_() == "<p>Nothing was measured.</p>"


def test_pandas_has_a_row_a_measurement():
    pytest.importorskip("pandas")
    frame = measured().to_pandas()
    assert len(frame) == 8
    after = frame[(frame.layer == "h") & (frame.when == "after")]
    assert after.value.tolist() == [0.9, 0.9]
    assert after.seed.tolist() == [0, 1]
    assert set(frame.measure) == {"20-NN accuracy"}
    assert frame.protocol[0] == {"k": 20}
    assert Results().to_pandas().empty


def test_without_pandas_it_says_so(monkeypatch):
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(HfprojError, match="pip install pandas"):
        measured().to_pandas()
