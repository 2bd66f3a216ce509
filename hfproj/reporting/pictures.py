"""The pictures of a page: which ones there are data for. Their words are in `templates/pictures.yaml`."""

import itertools
import math
import re
from collections.abc import Callable, Mapping, Sequence
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import yaml

from hfproj import limits, plots
from hfproj.plots.over_steps import metrics_of, over_steps
from hfproj.reporting.metadata import mapping
from hfproj.results import LAYERS, WHENS, Results
from hfproj.results.measurement import by_cell, mean_std

if TYPE_CHECKING:
    import matplotlib.figure

_MOST = 40  # pictures of a page, and series of a picture: nobody reads more, and each takes a second
_MOST_LAYERS = 300  # with a tick each
_WIDTH = 4.2  # inches: its letters stay readable on a telephone
_TRAINING = ("loss", "learning_rate", "update_ratio", "gradient_ratio", "timescale_ratio")
_COLLAPSE = ("rankme", "std")
_HELD_OUT = ("eval_knn", "eval_rankme")  # by the trainer's evaluation
_GEOMETRY: dict[str, Callable[..., Any]] = {
    "metric_condition_number": plots.plot_metric_condition,
    "orbits": plots.plot_orbits,
    "covariance": plots.plot_covariance,
    "autopsy": plots.plot_autopsy,
    "invariance": plots.plot_invariance,
}


PROBE_VIEWS = "probe views"  # what callbacks measure: augmented views of a few fixed images


class Words(NamedTuple):
    """What stands around a picture; `alt` is for those who cannot see it."""

    title: str
    caption: str
    alt: str


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
        spectra = dict(itertools.islice(results.spectra.items(), _MOST))
        draw = partial(plots.plot_spectrum, spectra)
        falls = any(_last_falls(values) for name, values in spectra.items() if name.startswith("h "))
        found.append(_picture("spectrum", draw, notes=["layernorm"] * falls, names=", ".join(spectra)))
    return [*found, *_over_steps(results), *_geometry(results.geometry)][:_MOST]


def _last_falls(spectrum: Any) -> bool:
    """Whether the last eigenvalue alone is all but 0."""
    values = np.asarray(spectrum[-2:] if isinstance(spectrum, list) else [], dtype=np.float64)
    return len(values) == 2 and bool(0 <= values[1] < 1e-3 * values[0])


def words_of_images(name: str) -> Words:
    """Return the words of a picture that lies beside the results, by its file's name."""
    return Words(**_words()[name.removesuffix(".png")])


@cache
def _words() -> dict[str, dict[str, str]]:
    return yaml.safe_load((Path(__file__).parent / "templates" / "pictures.yaml").read_text(encoding="utf-8"))


def _picture(kind: str, draw: Callable[..., Any], *, notes: Sequence[str] = (), **fill: str) -> Picture:
    """Return a picture that `draw` makes, its words filled in."""
    own, more = _words()[kind], _words()["notes"]
    title, alt = own["title"].format(**fill), own["alt"].format(**fill)
    caption = " ".join([own["caption"], *(more[note] for note in notes)])
    return Picture(title[0].upper() + title[1:], caption, alt, partial(draw, width=_WIDTH))


def _probes(results: Results) -> list[Picture]:
    """Return accuracies of h and z before and after training, where there are several, and those of every layer."""
    names, cells, layers = results.names("accuracy"), by_cell(results.measurements), results.layers
    sides: dict[str, dict[str, tuple[float, float]]] = {}
    for key, name in names.items():
        for layer in LAYERS:
            found = {when: mean_std(cells.get((key, layer, when), [])) for when in WHENS}
            if all(found.values()):
                sides[f"{name}: {layer}"] = {when: pair for when, pair in found.items() if pair}
    pictures = []
    if len(sides) > 2:
        sides = dict(itertools.islice(sides.items(), _MOST))
        draw = partial(plots.plot_groups, sides, "accuracy")
        pictures.append(_picture("probes", draw, notes=["bars"], names=", ".join(sides)))
    order, of_key = {layer: i for i, layer in enumerate(layers)}, dict[Any, dict[str, tuple[float, float]]]()
    for key, layer, when in sorted(cells, key=lambda cell: order[cell[1]]):
        of_key.setdefault((key, when), {})[layer] = mean_std(cells[key, layer, when]) or (0.0, 0.0)
    for key, name in names.items():
        curves: dict[str, dict[str, tuple[float, float]]] = {}
        for when in WHENS:
            curve = of_key.get((key, when), {})
            if 1 < len(curve.keys() - set(LAYERS)) <= _MOST_LAYERS:
                curves[f"{when} training"] = curve
        if curves:
            ends = f"{layers[0]} to {layers[-1]}"
            draw = partial(plots.plot_layers, curves, name)
            pictures.append(_picture("layers", draw, notes=["bars"], name=name, names=ends))
    return pictures


def _over_steps(results: Results) -> list[Picture]:
    logged = [row for row in results.log if "loss" in row and "step" in row]
    rows = results.history or [{name.removeprefix("batch_"): v for name, v in row.items()} for row in logged]
    held_out = [row for row in results.log if "step" in row and any(str(name).startswith(_HELD_OUT) for name in row)]
    found = [_curves("held_out", held_out, [m for m in metrics_of(held_out) if m in _HELD_OUT])] if held_out else []
    if not rows:
        return found
    notes = ["batch"] * (not results.history) + ["bands"] * (len({row["step"] for row in rows}) < len(rows))
    metrics, of = metrics_of(rows), PROBE_VIEWS if results.history else "the training batch"
    rest = [name for name in metrics if name not in _COLLAPSE + _TRAINING + ("grad_norm",)]
    references = _references(results)
    for kind, names in (("collapse", _COLLAPSE), ("training", _TRAINING), ("diagnostics", rest)):
        if shown := [name for name in names if name in metrics][:_MOST]:
            ratios = ["ratio"] if any(name.endswith("_ratio") for name in shown) else []
            measured = ["views"] if results.history and any({*metrics[name]} & {*LAYERS} for name in shown) else []
            lines = ["even"] * ("std" in shown and "std" in references) + ["alike"] * (
                "loss" in {*shown} & {*references}
            )
            chosen = {name: lines for name, lines in references.items() if name in shown}
            options = {"of": of, "references": chosen, "start": bool(results.history)}
            found.append(_curves(kind, rows, shown, [*ratios, *lines, *measured, *notes], **options))
    curvature = [name for name in ("lambda_min", "lambda_max") if np.isfinite(over_steps(rows, name)[1]).any()]
    if curvature:
        where = str(results.config.get("curvature_of") or "")
        ends = "; ".join(_ends(rows, name, []) for name in curvature)
        draw = partial(plots.plot_eigenvalues, rows, of="the head's parameters" if where == "head" else where)
        found.append(_picture("curvature", draw, ends=ends))
    return found


def _curves(
    kind: str, rows: Sequence[Mapping[str, Any]], metrics: Sequence[str], notes: Sequence[str] = (), **options: Any
) -> Picture:
    layers = metrics_of(rows)
    ends = "; ".join(_ends(rows, name, layers[name]) for name in metrics)
    return _picture(kind, partial(plots.plot_history, rows, metrics=metrics, **options), notes=notes, ends=ends)


def _references(results: Results) -> dict[str, dict[str, float]]:
    """Return what curves are compared with, as far as the results tell: metric → text → value."""
    adapter, training = mapping(results.config.get("adapter")), mapping(results.config.get("training"))
    found: dict[str, dict[str, float]] = {}
    for name in ("in_dim", "out_dim"):
        if isinstance(width := adapter.get(name), int) and 0 < width <= limits.WIDTH:
            found.setdefault("std", {})[f"1/√{width}"] = width**-0.5
    objective, views = mapping(adapter.get("objective")), mapping(results.config.get("recipe")).get("views")
    batch, options = training.get("per_device_train_batch_size"), {*objective} - {"name", "temperature"}
    plain = not adapter.get("regularizers") and not options and not views
    if objective.get("name") == "nt_xent" and plain and isinstance(batch, int) and 1 < batch <= limits.WIDTH:
        processes = re.search(r"--num_processes[ =](\d{1,6})\b", results.command)
        count = batch * int(processes[1] if processes else 1)
        found["loss"] = {f"ln(2·{count} − 1)": math.log(2 * count - 1)}
    return found


def _ends(rows: Sequence[Mapping[str, Any]], metric: str, layers: Sequence[str]) -> str:
    """Return first and last value of a metric in words."""
    ends = []
    for layer in layers or [""]:
        values = over_steps(rows, f"{metric}_{layer}" if layer else metric)[1]
        values = values[np.isfinite(values)]
        ends.append(f"{f'of {layer} ' if layer else ''}from {values[0]:.3g} to {values[-1]:.3g}")
    return f"{metric.replace('_', ' ')} {', '.join(ends)}"


def _geometry(geometry: Mapping[str, Any]) -> list[Picture]:
    draw = {kind: partial(plot, geometry.get(kind)) for kind, plot in _GEOMETRY.items()}
    shown = {kind: values for kind, values in geometry.items() if values}
    if values := shown.get("feature_weights"):
        layers = values.get("layers") or {} if isinstance(values, Mapping) else values
        draw["feature_weights"] = partial(plots.plot_feature_weights, layers, features=mapping(values).get("features"))
        shown["feature_weights"] = layers
    if kept := mapping(shown.get("autopsy")).get("invariance"):
        draw["invariance"], shown["invariance"] = partial(plots.plot_invariance, kept), kept
    return [_picture(kind, draw[kind], names=_names(shown[kind])) for kind in draw if kind in shown]


def _names(values: Any) -> str:
    return ", ".join(map(str, values)) if isinstance(values, Mapping) else "one layer"
