"""The pictures of a report: which ones there are data for, and how to read each."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np

from hfproj import plots
from hfproj.plots.over_steps import metrics_of, over_steps
from hfproj.results import LAYERS, WHENS, Results

_WIDTH = 4.2  # inches: its letters stay readable on a telephone
_TRAINING = ("loss", "learning_rate", "update_ratio", "gradient_ratio", "timescale_ratio")
_COLLAPSE = ("rankme", "std")
_HESSIANS = {"head": "the head's parameters"}
_BATCH = " The numbers are those of the training batch, from the log."
_RATIO = (
    " The update ratio is the length of a step over that of the parameters: with a head far above the backbone, the "
    "backbone sees a head that has settled."
)
_SEEDS = " Bands: one standard deviation over seeds."
_ACROSS = " Bars and bands, if any: one standard deviation over seeds."


class Picture(NamedTuple):
    """A figure with its words; `draw` returns it."""

    title: str
    caption: str
    alt: str
    draw: Callable[[], Any]


def pictures_of(results: Results) -> list[Picture]:
    """Return a picture of everything that was recorded, in the order of the page."""
    found = []
    if results.spectra:
        curves = ", ".join(results.spectra)
        found.append(
            Picture(
                "Spectrum of the covariance",
                "Variance along each principal direction of the features, largest first. A flat curve uses all "
                "directions; one that falls off the lower edge has collapsed in the remaining ones.",
                f"Eigenvalues of the covariance against their rank, on a logarithmic scale: {curves}.",
                partial(plots.plot_spectrum, results.spectra, width=_WIDTH),
            )
        )
    return [*_probes(results), *found, *_over_steps(results), *_geometry(results.geometry)]


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
        pictures.append(
            Picture(
                "Probes before and after training",
                "Accuracy on held-out items of classifiers that saw the features alone." + _ACROSS,
                f"Accuracies before and after training: {_names(sides)}.",
                partial(plots.plot_groups, sides, "accuracy", width=_WIDTH),
            )
        )
    for key, name in names.items():
        curves: dict[str, dict[str, tuple[float, float]]] = {}
        for when in WHENS:
            means = {layer: results.mean_std(key, layer, when) for layer in results.layers}
            curve = {layer: pair for layer, pair in means.items() if pair}
            if len(curve.keys() - set(LAYERS)) > 1:
                curves[f"{when} training"] = curve
        if curves:
            pictures.append(
                Picture(
                    f"{name[0].upper()}{name[1:]}, layer by layer",
                    "Where the representation is best. A head that forgets what the objective calls irrelevant lies "
                    "below the layers before it." + _ACROSS,
                    f"{name} of each layer, from {' to '.join(results.layers[:: len(results.layers) - 1])}.",
                    partial(plots.plot_layers, curves, name, width=_WIDTH),
                )
            )
    return pictures


def _over_steps(results: Results) -> list[Picture]:
    rows, note = results.history, ""
    if not rows:
        rows, note = [row for row in results.log if "loss" in row and "step" in row], _BATCH
    if not rows:
        return []
    metrics = metrics_of(rows)
    if len({row["step"] for row in rows}) < len(rows):
        note += _SEEDS
    rest = [name for name in metrics if name not in _COLLAPSE + _TRAINING + ("grad_norm",)]
    groups = [
        (
            "Rank and spread while training",
            "RankMe is the number of directions in use; the std of unit rows is 1/√dim where they spread evenly. Both "
            "falling towards their floor is collapse. z falling while h stays is what a head may do.",
            _COLLAPSE,
        ),
        (
            "Training",
            "The loss that was minimised, and how fast." + (_RATIO if "update_ratio" in metrics else ""),
            _TRAINING,
        ),
        ("Further diagnostics", "What else was recorded while training.", rest),
    ]
    found = []
    for title, caption, names in groups:
        shown = [name for name in names if name in metrics]
        if shown:
            alt = "; ".join(_ends(rows, name, metrics[name]) for name in shown)
            draw = partial(plots.plot_history, rows, metrics=shown, width=_WIDTH)
            found.append(Picture(title, caption + note, f"{title}. {alt}.", draw))
    curvature = [name for name in ("lambda_min", "lambda_max") if np.isfinite(over_steps(rows, name)[1]).any()]
    if curvature:
        of = str(results.config.get("curvature_of") or "")
        found.append(
            Picture(
                "Extreme curvature",
                "Smallest and largest eigenvalue of the Hessian of the loss; bars show the bound on the error. Below "
                "zero the point is no minimum: there is a direction in which it is left.",
                f"Extreme eigenvalues of the Hessian. {'; '.join(_ends(rows, name, []) for name in curvature)}.",
                partial(plots.plot_eigenvalues, rows, of=_HESSIANS.get(of, of), width=_WIDTH),
            )
        )
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
    found = []
    if geometry.get("metric_condition_number"):
        values = geometry["metric_condition_number"]
        found.append(
            Picture(
                "Condition number of the metric",
                "How unevenly the head stretches directions of h (G = JᵀJ, J the Jacobian of the head), a dot per "
                "sample: 1 where all directions that it keeps count alike, large where some all but vanish. The box "
                "holds the middle half of the samples, the line in it is the median.",
                f"Condition numbers of the pullback metric per sample, of {_names(values)}.",
                partial(plots.plot_metric_condition, values, width=_WIDTH),
            )
        )
    if geometry.get("orbits"):
        values = geometry["orbits"]
        found.append(
            Picture(
                "Orbits of augmentation",
                "Each line is one image while a transformation is turned up, in the plane of the two principal "
                "components. A head that does not see the transformation contracts lines to points. Each panel has "
                "its own scale: compare the length of lines with the distance between them.",
                f"Orbits of augmentation in the plane of two principal components, of {_names(values)}.",
                partial(plots.plot_orbits, values, width=_WIDTH),
            )
        )
    if geometry.get("covariance"):
        values = geometry["covariance"]
        found.append(
            Picture(
                "Correlation of dimensions",
                "Off the diagonal, colour means that two dimensions say the same; white is none. Grey dimensions have "
                "no variance.",
                f"Heat map of correlations between dimensions, of {_names(values)}.",
                partial(plots.plot_covariance, values, width=_WIDTH),
            )
        )
    if geometry.get("feature_weights"):
        values = geometry["feature_weights"]
        layers = values.get("layers") or {} if isinstance(values, Mapping) else values
        features = values.get("features") if isinstance(values, Mapping) else None
        found.append(
            Picture(
                "Weight of features",
                "How strongly each layer carries each feature, against the layer's mean. CV is the coefficient of "
                "variation: where it grows with depth, later layers keep fewer features.",
                f"Relative weights of features, of {_names(layers)}.",
                partial(plots.plot_feature_weights, layers, features=features, width=_WIDTH),
            )
        )
    return found


def _names(values: Any) -> str:
    return ", ".join(map(str, values)) if isinstance(values, Mapping) else "one layer"
