"""The pictures of a page: which ones there are data for. Their words are in `templates/pictures.yaml`."""

from collections.abc import Callable, Mapping, Sequence
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import yaml

from hfproj import plots
from hfproj.plots.over_steps import metrics_of, over_steps
from hfproj.reporting.metadata import mapping
from hfproj.results import LAYERS, WHENS, Results

if TYPE_CHECKING:
    import matplotlib.figure

_WIDTH = 4.2  # inches: its letters stay readable on a telephone
_TRAINING = ("loss", "learning_rate", "update_ratio", "gradient_ratio", "timescale_ratio")
_COLLAPSE = ("rankme", "std")
_HESSIANS = {"head": "the head's parameters"}
_GEOMETRY = {
    "metric_condition_number": plots.plot_metric_condition,
    "orbits": plots.plot_orbits,
    "covariance": plots.plot_covariance,
}


class Picture(NamedTuple):
    """A figure with its words; `draw` returns it."""

    title: str
    caption: str
    alt: str
    draw: Callable[[], "matplotlib.figure.Figure"]


def pictures_of(results: Results) -> list[Picture]:
    """Return a picture of everything that was recorded, in the order of the page."""
    found = _probes(results)
    if results.spectra:
        found.append(_picture("spectrum", plots.plot_spectrum, results.spectra, names=", ".join(results.spectra)))
    return [*found, *_over_steps(results), *_geometry(results.geometry)]


@cache
def _words() -> dict[str, dict[str, str]]:
    return yaml.safe_load((Path(__file__).parent / "templates" / "pictures.yaml").read_text(encoding="utf-8"))


def _picture(
    kind: str, plot: Any, *data: Any, notes: Sequence[str] = (), options: Mapping[str, Any] | None = None, **fill: str
) -> Picture:
    """Return a picture of some data, its words filled in."""
    own, more = _words()[kind], _words()["notes"]
    title, alt = own["title"].format(**fill), own["alt"].format(**fill)
    caption = " ".join([own["caption"], *(more[note] for note in notes)])
    return Picture(title[0].upper() + title[1:], caption, alt, partial(plot, *data, width=_WIDTH, **(options or {})))


def _probes(results: Results) -> list[Picture]:
    """Return accuracies of h and z before and after training, where there are several, and those of every layer."""
    names = results.names("accuracy")
    sides: dict[str, dict[str, tuple[float, float]]] = {}
    for key, name in names.items():
        for layer in LAYERS:
            found = {when: results.mean_std(key, layer, when) for when in WHENS}
            if all(found.values()):
                sides[f"{name}: {layer}"] = {when: pair for when, pair in found.items() if pair}
    pictures = []
    if len(sides) > 2:
        named = ", ".join(sides)
        pictures.append(_picture("probes", plots.plot_groups, sides, "accuracy", notes=["bars"], names=named))
    for key, name in names.items():
        curves: dict[str, dict[str, tuple[float, float]]] = {}
        for when in WHENS:
            means = {layer: results.mean_std(key, layer, when) for layer in results.layers}
            curve = {layer: pair for layer, pair in means.items() if pair}
            if len(curve.keys() - set(LAYERS)) > 1:
                curves[f"{when} training"] = curve
        if curves:
            ends = f"{results.layers[0]} to {results.layers[-1]}"
            pictures.append(_picture("layers", plots.plot_layers, curves, name, notes=["bars"], name=name, names=ends))
    return pictures


def _over_steps(results: Results) -> list[Picture]:
    rows: Sequence[Mapping[str, Any]] = results.history
    notes = []
    if not rows:
        rows = [row for row in results.log if "loss" in row and "step" in row]
        notes.append("batch")
    if not rows:
        return []
    metrics = metrics_of(rows)
    if len({row["step"] for row in rows}) < len(rows):
        notes.append("bands")
    rest = [name for name in metrics if name not in _COLLAPSE + _TRAINING + ("grad_norm",)]
    found = []
    for kind, names in (("collapse", _COLLAPSE), ("training", _TRAINING), ("diagnostics", rest)):
        if shown := [name for name in names if name in metrics]:
            ratio = ["ratio"] if "update_ratio" in shown else []
            ends = "; ".join(_ends(rows, name, metrics[name]) for name in shown)
            options: dict[str, Any] = {"metrics": shown}
            found.append(_picture(kind, plots.plot_history, rows, notes=ratio + notes, options=options, ends=ends))
    curvature = [name for name in ("lambda_min", "lambda_max") if np.isfinite(over_steps(rows, name)[1]).any()]
    if curvature:
        of = str(results.config.get("curvature_of") or "")
        ends = "; ".join(_ends(rows, name, []) for name in curvature)
        options = {"of": _HESSIANS.get(of, of)}
        found.append(_picture("curvature", plots.plot_eigenvalues, rows, options=options, ends=ends))
    return found


def _ends(rows: Sequence[Mapping[str, Any]], metric: str, layers: Sequence[str]) -> str:
    """Return first and last value of a metric in words."""
    ends = []
    for layer in layers or [""]:
        _, values, _ = over_steps(rows, f"{metric}_{layer}" if layer else metric)
        values = values[np.isfinite(values)]
        ends.append(f"{f'of {layer} ' if layer else ''}from {values[0]:.3g} to {values[-1]:.3g}")
    return f"{metric.replace('_', ' ')} {', '.join(ends)}"


def _geometry(geometry: Mapping[str, Any]) -> list[Picture]:
    found = [
        _picture(kind, plot, geometry[kind], names=_names(geometry[kind]))
        for kind, plot in _GEOMETRY.items()
        if geometry.get(kind)
    ]
    if values := geometry.get("feature_weights"):
        layers = mapping(values).get("layers") or {} if isinstance(values, Mapping) else values
        options = {"features": mapping(values).get("features")}
        found.append(
            _picture("feature_weights", plots.plot_feature_weights, layers, options=options, names=_names(layers))
        )
    return found


def _names(values: Any) -> str:
    return ", ".join(map(str, values)) if isinstance(values, Mapping) else "one layer"
