"""Figures: what they show, that the same numbers give the same bytes, and that bad input is refused in words."""

import itertools
import math
import os
import pickle
import sys

import forked
import numpy as np
import pytest
import torch

from hfproj.errors import HfprojError, UsageError
from hfproj.plots import (
    orbit_coordinates,
    plot_autopsy,
    plot_covariance,
    plot_curves,
    plot_eigenvalues,
    plot_feature_weights,
    plot_groups,
    plot_history,
    plot_invariance,
    plot_layers,
    plot_metric_condition,
    plot_orbits,
    plot_spectrum,
)
from hfproj.plots.over_steps import metrics_of, over_steps

SPECTRA = {
    "z after": torch.tensor([1.0, 0.1, 0.0]),
    "h before": [1.0, 0.5, 0.2, 0.1],
    "h after": np.array([1.0, 0.7, 0.4, 0.2]),
    "z before": [0.5, 0.1, None],
}


def test_curves_axes_and_styles():
    axes = plot_spectrum(SPECTRA).axes[0]
    lines = axes.get_lines()
    labels = [line.get_label() for line in lines]
    assert labels[0] == "representation h, before training"
    assert labels[3] == "projection z, after training"
    assert len({line.get_color() for line in lines}) == len({str(line._dash_pattern) for line in lines}) == 4
    assert axes.get_yscale() == "log"
    assert axes.get_xlabel() == "rank of the eigenvalue"
    assert "eigenvalue" in axes.get_ylabel()
    assert list(lines[0].get_xdata()) == [1, 2, 3, 4]
    assert axes.get_ylim()[0] >= 1e-10  # a zero eigenvalue leaves the picture at its lower edge


def test_other_names_and_one_eigenvalue():
    axes = plot_spectrum({"mine": [1.0], "yours": [2.0, 1.0]}).axes[0]
    assert [line.get_label() for line in axes.get_lines()] == ["mine", "yours"]


@pytest.mark.parametrize("suffix", ["png", "svg", "pdf"])
def test_the_same_spectra_give_the_same_bytes(tmp_path, suffix):
    for name in ("a", "b"):
        plot_spectrum(SPECTRA, tmp_path / f"{name}.{suffix}")
    assert (tmp_path / f"a.{suffix}").read_bytes() == (tmp_path / f"b.{suffix}").read_bytes()
    assert sorted(os.listdir(tmp_path)) == [f"a.{suffix}", f"b.{suffix}"]


def loaded_before_and_after_a_plot():
    before = [name for name in sys.modules if name.startswith("matplotlib")]
    plot_spectrum({"h after": [1.0, 0.5]})
    return before, [name for name in ("matplotlib", "matplotlib.pyplot") if name in sys.modules]


def test_global_state_of_matplotlib_stays_untouched():
    assert forked.returned(loaded_before_and_after_a_plot) == [([], ["matplotlib"])]


@pytest.mark.parametrize("spectra", [{}, {"h after": []}, {"h after": [0.0, 0.0]}, {"h after": [None]}])
def test_nothing_to_draw(spectra):
    with pytest.raises(UsageError):
        plot_spectrum(spectra)


def test_unknown_format(tmp_path):
    with pytest.raises(UsageError, match=r"\.png, \.svg or \.pdf"):
        plot_spectrum(SPECTRA, tmp_path / "a.gif")


def test_without_matplotlib(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.backends.backend_agg", None)
    with pytest.raises(HfprojError, match=r"pip install hfproj\[plots\]"):
        plot_spectrum(SPECTRA)


HISTORY = [
    {"step": 0, "epoch": 0.0, "rankme_h": 30.0, "rankme_z": 20.0, "std_h": 0.03, "lambda_min": -2.0, "lambda_max": 9.0},
    {"step": 5, "epoch": 0.5, "loss": 3.0},
    {
        "step": 10,
        "epoch": 1.0,
        "rankme_h": None,
        "rankme_z": 10.0,
        "std_h": 0.02,
        "lambda_min": -0.1,
        "lambda_max": 5.0,
    },
    {"step": 20, "epoch": 2.0, "rankme_h": 28.0, "rankme_z": 5.0, "std_h": 0.01, "lambda_min": 0.5, "lambda_max": 4.0},
]
ORBITS = np.random.default_rng(0).normal(size=(3, 5, 7))
COVARIANCE = np.cov(np.random.default_rng(1).normal(size=(4, 20)))
KNOWN = {"h": [0.9, 0.8, 1.0], "z": [0.6, 0.5, 0.7]}
MOVED = {
    "transform": "rotation", "ends": ["−15°", "+15°"], "distance": {"h": 0.5, "z": 0.2}, "cosine": {"h": 0.9, "z": 1.0},
    "known": KNOWN, "lost": [0.3, 0.2, 0.4], "degeneracy": 0.5,
}  # fmt: skip
INVARIANCE = {"moved": [MOVED, {**MOVED, "transform": "crop"}], "protocol": {}}
SCORES = {probe: {"accuracy": 0.8, "over_h": [0.02, 0.01, 0.03]} for probe in ("linear", "knn")}
LAYER = {"dim": 8, "rankme": 3.0, "numerical_rank": 7, "condition": None, "spectrum": [1.0, 0.1, 0.0], "scores": SCORES}
CUT = {"probe": "knn", "layer": "head.0", "lead": 0.1, "confirmed": [0.02, 0.01, 0.03], "rows": [9, 9]}
AUTOPSY = {
    "layers": [{**LAYER, "name": name} for name in ("layers.4", "h", "head.0", "head.1", "z")], "cuts": [CUT],
    "invariance": INVARIANCE, "protocol": {},
}  # fmt: skip
FIGURES = {
    plot_spectrum: (SPECTRA,),
    plot_history: (HISTORY,),
    plot_eigenvalues: (HISTORY,),
    plot_metric_condition: ({"layer 1": [3.0, 4.0, 9.0], "layer 2": [30.0, float("inf"), 50.0]},),
    plot_orbits: ({"h": ORBITS, "z": orbit_coordinates(ORBITS / 10)},),
    plot_covariance: ({"h": COVARIANCE, "z": COVARIANCE[:2, :2]},),
    plot_feature_weights: ({"x": [1.0, 1.0], "h": [1.0, 0.5]},),
    plot_curves: ({"a": ([1, 2], [3.0, 4.0], [0.1, 0.2]), "b": ([1, 2], [2.0, None])}, "step", "loss"),
    plot_layers: ({"a": {"block_1": 0.5, "h": (0.6, 0.1)}, "b": {"block_1": 0.4, "z": 0.2}}, "accuracy"),
    plot_autopsy: (AUTOPSY,),
    plot_invariance: (INVARIANCE,),
    plot_groups: ({"one": {"a": (1.0, 0.1), "b": 2.0}, "two": {"a": 3.0}}, "accuracy"),
}


@pytest.mark.parametrize("plot", FIGURES, ids=lambda f: f.__name__)
def test_every_figure_is_the_same_each_time_and_labels_its_axes(plot, tmp_path):
    for name in ("a", "b"):
        figure = plot(*FIGURES[plot], path=tmp_path / f"{name}.svg")
    assert (tmp_path / "a.svg").read_bytes() == (tmp_path / "b.svg").read_bytes()
    for axes in figure.axes:
        named = axes.get_title("left") or axes.get_ylabel() or [t.get_text() for t in axes.get_yticklabels()]
        assert axes.get_xlabel() or axes.get_xticklabels()
        assert named


@pytest.mark.parametrize("plot", FIGURES, ids=lambda f: f.__name__)
@pytest.mark.parametrize("width", [4.0, 6.4])
def test_nothing_is_cut_off_at_any_width(plot, width):
    figure = plot(*FIGURES[plot], width=width)
    figure.draw_without_rendering()
    box = figure.get_tightbbox()
    assert box.x0 > -0.02
    assert box.x1 < width + 0.02
    assert box.y0 > -0.02
    assert box.y1 < figure.get_figheight() + 0.02


@pytest.mark.parametrize("plot", FIGURES, ids=lambda f: f.__name__)
def test_every_figure_refuses_what_is_no_width_and_needs_matplotlib(plot, monkeypatch):
    with pytest.raises(UsageError, match="width between 4 and 40"):
        plot(*FIGURES[plot], width=640.0)
    monkeypatch.setitem(sys.modules, "matplotlib.backends.backend_agg", None)
    with pytest.raises(HfprojError, match=r"pip install hfproj\[plots\]"):
        plot(*FIGURES[plot])


def test_history_has_a_panel_per_metric_and_a_gap_where_nothing_was_measured():
    figure = plot_history(HISTORY)
    assert [axes.get_title("left") for axes in figure.axes] == ["RankMe, in directions", "representation std"]
    h, z = figure.axes[0].get_lines()
    assert h.get_xdata().tolist() == [0, 10, 20]
    np.testing.assert_array_equal(h.get_ydata(), [30, np.nan, 28])
    np.testing.assert_array_equal(z.get_ydata(), [20, 10, 5])
    assert h.get_color() != z.get_color()
    assert h.get_marker() != z.get_marker()
    assert figure.axes[0].get_ylim()[0] == 0
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["representation h", "projection z"]
    assert metrics_of(HISTORY) == {"rankme": ["h", "z"], "std": ["h"], "loss": []}


def test_rows_of_several_seeds_become_their_mean_and_deviation():
    rows = [{"step": step, "seed": seed, "std_z": step + seed} for seed in (0, 2, 4) for step in (10, 0)]
    x, mean, std = over_steps([*rows, {"step": 20, "std_z": 1.0}], "std_z")
    assert x.tolist() == [0, 10, 20]
    assert mean.tolist() == [2, 12, 1]
    assert std.tolist() == [2, 2, 0]
    assert over_steps(HISTORY, "rankme_z")[2] is None
    assert len(plot_history(rows).axes[0].collections) == 1  # the band


def test_history_names_what_there_is():
    with pytest.raises(UsageError, match="Available: loss, rankme, std"):
        plot_history(HISTORY, metrics=["lidar"])
    for rows in ([], [{"rankme_h": 1.0}], [{"step": None}]):
        with pytest.raises(UsageError, match="history"):
            plot_history(rows)


def test_eigenvalues_on_both_sides_of_zero_with_their_bounds():
    bounded = [{**row, "lambda_min_error": 0.25} for row in HISTORY]
    axes = plot_eigenvalues(bounded, of="h").axes[0]
    assert axes.get_yscale() == "symlog"
    assert axes.get_title("left") == "Hessian of the loss in h"
    low, high = axes.get_ylim()
    assert low < -2.25
    assert high > 9
    assert [0, 0] in [list(line.get_ydata()) for line in axes.get_lines()]
    [bars] = [c for c in axes.collections if hasattr(c, "get_segments")]
    assert [segment[:, 1].tolist() for segment in bars.get_segments()] == [[-2.25, -1.75], [-0.35, 0.15], [0.25, 0.75]]
    positive = [{"step": 0, "lambda_min": 0.1, "lambda_max": 2.0}]
    low, high = plot_eigenvalues(positive).axes[0].get_ylim()
    assert -0.01 < low < 0
    assert high > 2
    with pytest.raises(UsageError, match="lambda_min"):
        plot_eigenvalues([{"step": 0, "loss": 1.0}])


def test_metric_condition_counts_what_is_not_finite():
    axes = plot_metric_condition({"a": [1.0, 10.0, 100.0], "b": [5.0, None, float("inf")]}).axes[0]
    assert [text.get_text() for text in axes.get_yticklabels()] == ["a", "b\n(2 of 3 not finite)"]
    assert axes.get_xscale() == "log"
    assert sorted(axes.collections[0].get_offsets()[:, 0].tolist()) == [1, 10, 100]
    for values in ({}, {"a": []}, {"a": [None]}, {"a": [0.0]}, {"a": ["x"]}, {"a": 3}):
        with pytest.raises(UsageError):
            plot_metric_condition(values)


def test_orbit_coordinates_are_those_of_the_covariance():
    features = np.random.default_rng(3).normal(size=(4, 6, 9)) * np.arange(1, 10)
    plane = orbit_coordinates(torch.tensor(features))
    rows = features.reshape(-1, 9)
    values, vectors = np.linalg.eigh(np.cov(rows.T))
    expected = (rows - rows.mean(0)) @ vectors[:, [-1, -2]]
    points = np.reshape(plane["points"], (-1, 2))
    np.testing.assert_allclose(np.abs(points), np.abs(expected), atol=1e-10)
    np.testing.assert_allclose(plane["explained"], values[[-1, -2]] / values.sum(), atol=1e-12)
    moved = orbit_coordinates(features + 5)
    np.testing.assert_allclose(moved["points"], plane["points"], atol=1e-10)
    line = orbit_coordinates(np.arange(3.0)[None, :, None] * [1.0, 2.0])  # all on one line
    np.testing.assert_allclose(line["explained"], [1, 0], atol=1e-12)
    assert orbit_coordinates(np.ones((2, 3, 4)))["explained"] == [0, 0]


def test_orbits_draw_each_sweep_from_its_start_to_its_end():
    figure = plot_orbits({"h": ORBITS[..., :2], "z": ORBITS}, names=["cat", "dog", "ship"])
    lines = figure.axes[0].get_lines()[:9]
    for i in range(3):
        sweep, start, end = lines[3 * i : 3 * i + 3]
        np.testing.assert_array_equal(sweep.get_xydata(), ORBITS[i, :, :2])
        np.testing.assert_array_equal(start.get_xydata(), ORBITS[i, :1, :2])
        np.testing.assert_array_equal(end.get_xydata(), ORBITS[i, -1:, :2])
        assert start.get_markerfacecolor() == "white"
        assert end.get_markerfacecolor() == sweep.get_color()
    assert "% of var." in figure.axes[1].get_xlabel()
    legend = [text.get_text() for text in figure.legends[0].get_texts()]
    assert legend == ["cat", "dog", "ship", "start", "end"]
    many = plot_orbits({"h": np.random.default_rng(0).normal(size=(30, 3, 2))})
    assert len(many.legends[0].get_texts()) == 2
    for orbits in (
        {},
        {"h": [[1.0, 2.0]]},
        {"h": np.ones((2, 2, 1))},
        {"h": np.full((1, 2, 2), np.nan)},
        {"h": {"explained": [1, 0]}},
        {"h": {"points": ORBITS[..., :2], "explained": [1.0]}},
    ):
        with pytest.raises(UsageError):
            plot_orbits(orbits)
    with pytest.raises(UsageError, match="a name of its own"):
        plot_orbits({"h": ORBITS}, names=["cat", "cat", "dog"])


def test_covariance_is_drawn_as_correlation_around_white():
    covariance = [[4.0, -1.0, 0.0], [-1.0, 1.0, 0.0], [0.0, 0.0, 0.0]]
    [image] = plot_covariance({"h": covariance}).axes[0].images
    assert image.get_clim() == (-1, 1)
    assert image.get_array().filled(9).tolist() == [[1, -0.5, 9], [-0.5, 1, 9], [9, 9, 9]]  # 9: no variance
    [image] = plot_covariance({"h": covariance}, correlation=False).axes[0].images
    assert image.get_clim() == (-4, 4)
    np.testing.assert_array_equal(image.get_array(), covariance)
    for wrong in ([[1.0, 2.0]], [[1.0, 2.0], [0.0, 1.0]], [[1.0, None], [None, 1.0]], [[-1.0]], [1.0]):
        with pytest.raises(UsageError, match=r"covariance of 'h'"):
            plot_covariance({"h": wrong})


def test_feature_weights_are_relative_and_unnamed_ones_are_sorted():
    lines = plot_feature_weights({"h": [1.0, 3.0], "z": [2.0, 2.0]}, features=["a", "b$"]).axes[0].get_lines()
    assert [line.get_ydata().tolist() for line in lines[:2]] == [[0.5, 1.5], [1, 1]]
    axes = plot_feature_weights({"h": [1.0, 3.0, 0.0], "z": [4.0]}).axes[0]
    np.testing.assert_allclose(axes.get_lines()[0].get_ydata(), [2.25, 0.75, np.nan])
    assert axes.get_xlabel() == "rank of the feature by weight"
    for weights in ({}, {"h": []}, {"h": [-1.0, 2.0]}, {"h": [0.0]}, {"h": [None]}):
        with pytest.raises(UsageError):
            plot_feature_weights(weights)
    with pytest.raises(UsageError, match="2 weights for 1 features"):
        plot_feature_weights({"h": [1.0, 2.0]}, features=["a"])


def test_curves_and_their_bands():
    axes = plot_curves(FIGURES[plot_curves][0], "x", "y", x_scale="log", y_scale="symlog", zero_line=True).axes[0]
    assert (axes.get_xscale(), axes.get_yscale()) == ("log", "symlog")
    assert axes.get_legend_handles_labels()[1] == ["a", "b"]
    band = axes.collections[0].get_paths()[0].vertices
    np.testing.assert_allclose([band[:, 1].min(), band[:, 1].max()], [2.9, 4.2])
    for curves in ({}, {"a": [1, 2, 3, 4]}, {"a": ([1], [1, 2])}, {"a": ([1], [None])}, {"a": ([], [])}, {"a": "xy"}):
        with pytest.raises(UsageError):
            plot_curves(curves, "x", "y")
    with pytest.raises(UsageError, match="no point to draw on a log scale"):
        plot_curves({"a": ([1, 2], [-1.0, 0.0])}, "x", "y", y_scale="log")
    with pytest.raises(UsageError, match="Did you mean 'log'"):
        plot_curves({"a": ([1], [1])}, "x", "y", y_scale="lg")


def band_of(collection):
    """The lower and the upper end of a band at its first x."""
    vertices = collection.get_paths()[0].vertices
    at = vertices[vertices[:, 0] == vertices[:, 0].min(), 1]
    return [at.min(), at.max()]


def test_a_band_on_a_logarithmic_axis_is_a_factor_and_never_reaches_zero():
    curves = {"a": ([1, 2], [2.0, 3.0], [4.0, 0.0])}  # 2 ± 4 would begin below 0
    [band] = plot_curves(curves, "x", "y", y_scale="log").axes[0].collections
    np.testing.assert_allclose(band_of(band), [2 / math.e**2, 2 * math.e**2])
    [band] = plot_curves(curves, "x", "y").axes[0].collections
    np.testing.assert_allclose(band_of(band), [-2.0, 6.0])
    bars = plot_groups({"one": {"a": (2.0, 4.0)}}, "y", y_scale="log").axes[0].containers[0][2][0]
    np.testing.assert_allclose(bars.get_segments()[0][:, 1], [2 / math.e**2, 2 * math.e**2])


def test_history_of_seeds_on_a_logarithmic_axis_is_their_geometric_mean_and_deviation():
    rows = [
        {"step": step, "seed": seed, "condition_number_h": value * 100**step}
        for step in (0, 1)
        for seed, value in enumerate((1.0, 10.0, 100.0))
    ]
    [panel] = plot_history(rows, metrics=["condition_number"]).axes
    assert panel.get_yscale() == "log"
    np.testing.assert_allclose(panel.get_lines()[0].get_ydata(), [10.0, 1000.0])  # the means are 37 and 3700
    np.testing.assert_allclose(band_of(panel.collections[0]), [1.0, 100.0])  # one deviation of log10, 1, both ways
    narrow = [{**row, "condition_number_h": 5.0 + row["seed"]} for row in rows]
    [panel] = plot_history(narrow, metrics=["condition_number"]).axes
    assert panel.get_yscale() == "linear"
    np.testing.assert_allclose(panel.get_lines()[0].get_ydata(), [6.0, 6.0])
    np.testing.assert_allclose(band_of(panel.collections[0]), [5.0, 7.0])


def test_groups_lie_beside_each_other():
    axes = plot_groups({"one": {"h": (1.0, 0.25), "z": 2.0}, "two": {"z": (3.0, 0.5)}}, "y").axes[0]
    h, z = (container[0] for container in axes.containers)
    assert (h.get_ydata().tolist(), z.get_ydata().tolist()) == ([1], [2, 3])
    assert h.get_xdata()[0] < 0 < z.get_xdata()[0] < 0.5 < z.get_xdata()[1]
    assert axes.containers[0][2][0].get_segments()[0][:, 1].tolist() == [0.75, 1.25]
    for groups in ({}, {"a": {}}, {"a": 1.0}, {"a": {"h": None}}, {"a": {"h": (1, -1)}}, {"a": {"h": (1, 2, 3)}}):
        with pytest.raises(UsageError):
            plot_groups(groups, "y")
    with pytest.raises(UsageError, match="Unknown scale"):
        plot_groups({"a": {"h": 1}}, "y", y_scale="x")


def test_a_curve_may_lack_layers():
    axes = plot_layers(*FIGURES[plot_layers]).axes[0]
    assert [label.get_text() for label in axes.get_xticklabels()] == ["block_1", "h", "z"]
    a, b = axes.lines
    np.testing.assert_array_equal(a.get_ydata(), [0.5, 0.6, np.nan])
    np.testing.assert_array_equal(b.get_ydata(), [0.4, np.nan, 0.2])
    for curves in ({}, {"a": {}}, {"a": {"h": 1.0}}, {"a": {"h": None, "z": 1.0}}, {"a": [1.0, 2.0]}):
        with pytest.raises(UsageError):
            plot_layers(curves, "accuracy")


@pytest.mark.parametrize(("count", "rotation"), [(2, 0), (5, 30), (14, 90)])
def test_long_names_do_not_run_into_each_other(count, rotation):
    series = {name: 1.0 for name in "abcdefghijk"}
    figure = plot_groups({f"a long name, of two lines: {i}": series for i in range(count)}, "y")
    figure.draw_without_rendering()
    labels = figure.axes[0].get_xticklabels()
    turn = np.deg2rad(-rotation)
    edges = []  # along the normal of the text, from one label to the next
    for label in labels:
        assert label.get_rotation() == rotation
        thickness = 1.2 * label.get_fontsize() * (label.get_text().count("\n") + 1) * figure.dpi / 72
        edges.append((label.get_window_extent().x1 * abs(np.sin(turn)), thickness))
    if rotation:
        assert all(right[0] - left[0] >= left[1] for left, right in itertools.pairwise(edges))


def test_names_are_drawn_as_they_are():
    figure = plot_curves({"a$b_{$": ([1, 2], [1, 2]), "$x$": ([1, 2], [2, 3])}, "$", "cost in $")
    figure.draw_without_rendering()
    assert figure.axes[0].get_ylabel() == r"cost in \$"  # an escaped dollar is drawn as a dollar


def test_many_series_stay_apart():
    series = {f"series {i}": ([1, 2], [i, i]) for i in range(20)}
    lines = plot_curves(series, "x", "y").axes[0].get_lines()
    assert len({(line.get_color(), line.get_marker()) for line in lines}) == 20


def test_a_legend_stands_over_what_it_explains():
    rows = [{"step": s, "loss": 1.0 - s, "update_ratio_head": 0.1 + s, "std_h": 0.1, "std_z": 0.2} for s in range(3)]
    mixed = plot_history(rows, metrics=["loss", "update_ratio", "std"])
    assert mixed.legends == []
    assert [axes.get_legend() is not None for axes in mixed.axes] == [False, True, True]
    assert len(plot_history(rows, metrics=["std"]).legends) == 1


def test_history_says_of_what_and_compares():
    options = {"of": "probe views", "references": {"std": {"1/√dim": 0.5}, "none": {"x": 1.0}}, "start": True}
    figure = plot_history(HISTORY, metrics=["rankme", "std", "loss"], **options, width=8.0)
    titles = [axes.get_title("left").replace("\n", " ") for axes in figure.axes]
    assert titles == ["RankMe of probe views, in directions", "representation std of probe views", "loss"]
    rank, std, loss = figure.axes
    starts = [segments.get_segments()[0][:, 1].tolist() for segments in rank.collections]
    assert starts == [[30, 30], [20, 20]]  # of h and of z, before training
    assert not loss.collections
    assert [text.get_text() for text in std.texts] == ["1/√dim"]
    assert [0.5, 0.5] in [list(line.get_ydata()) for line in std.get_lines()]
    assert std.get_ylim()[1] > 0.5


def test_a_notebook_shows_a_figure_as_it_is_written(tmp_path):
    figure = plot_spectrum(SPECTRA, tmp_path / "spectrum.png")
    assert figure._repr_png_() == (tmp_path / "spectrum.png").read_bytes()
    assert pickle.loads(pickle.dumps(figure))._repr_png_()[:8] == b"\x89PNG\r\n\x1a\n"
