"""Autopsy and invariance report on the card and on the page: on request, escaped, and left out where damaged."""

import html
import math

import pytest
from card_results import a_result, body

from hfproj.reporting import render_card, render_report
from hfproj.reporting.pictures import pictures_of
from hfproj.results import Interval, Results
from hfproj.results.inside import Autopsy, Cut, Invariance, LayerFound, Moved, Score


def layer(name, accuracy=0.8, gain=0.0, condition=12.0):
    score = Score(accuracy, Interval(gain, gain - 0.01, gain + 0.01))
    return LayerFound(name, 16, 7.25, 16, condition, [1.0, 0.5, 0.0], {"linear": score})


def moved(name="rotation"):
    known = {"h": Interval(0.9, 0.85, 0.95), "head.0": Interval(0.8, 0.7, 0.9), "z": Interval(0.6, 0.5, 0.7)}
    by_layer = {"h": 0.5, "head.0": 0.4, "z": 0.1}
    return Moved(name, ("−15°", "+15°"), by_layer, by_layer, known, Interval(0.3, 0.2, 0.4), 0.25)


def found(name="head.0", transform="rotation"):
    cut = Cut("linear", name, 0.05, Interval(0.008, 0.002, 0.014), (200, 200))
    layers = [layer("layers.4"), layer("h"), layer(name, 0.81, 0.01), layer("z", 0.7, -0.1, math.inf)]
    return Autopsy(layers, [cut], Invariance([moved(transform)], {"images": 10}), {"level": 0.95})


def with_geometry(**geometry):
    return a_result(geometry=geometry)


def shown(text):
    """Return a card as it is read."""
    return html.unescape(body(text)).replace("\xa0", " ")


def test_the_card_has_them_on_request(tmp_path):
    results = with_geometry(autopsy=found().to_dict())
    text = shown(render_card(Results.load(results.save(tmp_path))))
    assert "### Inside the head" in text
    assert "| `head.0` | 16 | 7.2 | 16 | 12 | 0.810 | +1.0 [+0.0, +2.0] |" in text
    assert "By linear probe: keep up to head.0: +0.8 points [+0.2, +1.4] over h" in text
    assert "### What is left of each transform of the views" in text
    assert "+30.0 [+20.0, +40.0]" in text
    assert "∞" in text
    assert "Inside the head" not in render_card(a_result())


def test_the_invariance_report_alone():
    text = body(render_card(with_geometry(invariance=found().invariance.to_dict())))
    assert "### What is left of each transform of the views" in text
    assert "### Inside the head" not in text


def test_the_page_draws_both():
    results = with_geometry(autopsy=found().to_dict())
    titles = [picture.title for picture in pictures_of(results)]
    assert {"Inside the head", "What is left of each transform"} <= set(titles)
    assert "Inside the head" in render_report(results)
    alone = with_geometry(invariance=found().invariance.to_dict())
    assert "What is left of each transform" in [picture.title for picture in pictures_of(alone)]


@pytest.mark.parametrize("damaged", [
    {"layers": "many"}, {"layers": [], "cuts": 1, "protocol": {}}, [1], "text", {"layers": [{"name": "h"}]},
])  # fmt: skip
def test_damaged_ones_are_left_out(damaged):
    results = with_geometry(autopsy=damaged, invariance=damaged)
    text = render_card(results)
    assert "Inside the head" not in text
    assert "# mlp head" in text
    render_report(results)


def test_names_are_escaped():
    evil = "](javascript:x)|<script>"
    text = body(render_card(with_geometry(autopsy=found(evil, evil).to_dict())))
    assert "<script>" not in text
    rows = [line for line in text.splitlines() if line.startswith("|") and "javascript" in line]
    assert sorted({line.count(" | ") for line in rows}) == [3, 6, 8]  # as many cells as the tables have
    page = render_report(with_geometry(autopsy=found(evil, evil).to_dict()))
    assert "<script>" not in page
