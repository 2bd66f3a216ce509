"""What geometry was measured: covariance, weights of features, condition numbers of the pullback metric, orbits.

The plane of orbits is that of the two principal components of all points, centred on their mean: PCA by SVD of
`[objects · steps, dim]`, the sign of a component such that its entry of largest size is positive.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from hfproj.checking import checked
from hfproj.errors import UsageError
from hfproj.plots import canvas
from hfproj.plots.canvas import INK, TITLE, WIDTH, Figure, Target, as_array, as_mapping


@checked
def plot_covariance(
    covariances: Mapping[str, Any], path: Target = None, *, correlation: bool = True, width: float = WIDTH
) -> Figure:
    """Return heat maps of the covariance of features, a panel per layer.

    White is zero, red positive, blue negative. Off the diagonal, colour means that two dimensions say the same
    (redundancy); a decorrelated representation shows the diagonal alone.

    Args:
        covariances: Layer ("h", "z") → covariance `[dim, dim]`, as `Results.geometry["covariance"]`.
        correlation: Divide by the standard deviations, so that all entries lie in [−1, 1]. Dimensions without
            variance are grey.
        path, width: File to write, whose suffix says the format (png, svg, pdf); width in inches, 4 to 40.

    Raises:
        HfprojError: If matplotlib is not installed.
        UsageError: If there is no layer, or a matrix is not square, finite and symmetric, or has a negative variance.

    Example:
        >>> plot_covariance({"h": [[4.0, 1.0], [1.0, 1.0]]}).axes[0].images[0].get_array().tolist()
        [[1.0, 0.5], [0.5, 1.0]]
    """
    matrices = {n: _as_matrix(n, m) for n, m in as_mapping(covariances, "covariances: layer → [dim, dim]").items()}
    figure, axes = canvas.panels(len(matrices), width=width, height=2.5 if width > 5.2 and len(matrices) > 1 else 2.9)
    for panel, (layer, matrix) in zip(axes, matrices.items()):
        if correlation:
            std = np.sqrt(np.where(np.diag(matrix) > 0, np.diag(matrix), np.nan))
            matrix = np.clip(matrix / std / std[:, None], -1, 1)
        limit = 1.0 if correlation else np.abs(matrix).max() or 1.0
        panel.set_facecolor("0.75")
        look = {"cmap": "RdBu_r", "vmin": -limit, "vmax": limit, "interpolation": "nearest"}  # white is zero
        image = panel.imshow(np.ma.masked_invalid(matrix), **look)
        panel.set_title(canvas.layer_name(layer), **TITLE)
        panel.locator_params(integer=True)
        panel.set(xlabel="dimension", ylabel="dimension")
        label = "correlation" if correlation else "covariance"
        figure.colorbar(image, cax=panel.inset_axes((1.04, 0, 0.05, 1)), label=label)
    return canvas.finish(figure, path)


def _as_matrix(name: str, values: Any) -> np.ndarray:
    matrix = as_array(values, f"the covariance of {name!r}", shape="[dim, dim]", dims=2)
    rows, columns = matrix.shape
    if rows != columns or not np.isfinite(matrix).all():
        raise UsageError(f"Expected the covariance of {name!r} square and finite, got shape {[rows, columns]}.")
    scale = np.abs(matrix).max()
    if np.abs(matrix - matrix.T).max() > 1e-6 * scale or np.diag(matrix).min() < -1e-9 * scale:
        wanted = f"the covariance of {name!r} to be symmetric, variances ≥ 0 on its diagonal"
        raise UsageError(f"Expected {wanted}, got another matrix.")
    return matrix


@checked
def plot_feature_weights(
    layers: Mapping[str, Any], path: Target = None, *, features: Sequence[str] | None = None, width: float = WIDTH
) -> Figure:
    """Return a figure of feature weights per layer, relative to the layer's mean.

    The legend has the coefficient of variation (CV): where it grows from layer to layer, weighting is progressive, and
    the last layer keeps fewer features than the first.

    Args:
        layers: Layer, in order → weight of each feature. Weights without names (the singular values of a layer) are
            sorted descending; then layers may differ in width.
        features: Names of the features, which fix their order.
        path, width: File to write, whose suffix says the format (png, svg, pdf); width in inches, 4 to 40.

    Raises:
        HfprojError: If matplotlib is not installed.
        UsageError: If there is no layer, or weights are negative, not finite, all zero, or not one per name.

    Example:
        >>> figure = plot_feature_weights({"h": [1.0, 3.0], "z": [1.0, 9.0]}, features=["colour", "shape"])
        >>> [text.get_text() for text in figure.axes[0].get_legend().get_texts()]
        ['representation h (CV 0.50)', 'projection z (CV 0.80)']
    """
    figure, [axes] = canvas.new_figure(width=width, height=3.8)
    drawn = {n: _as_weights(n, w, features) for n, w in as_mapping(layers, "weights: layer → one per feature").items()}
    style = canvas.styles(drawn)
    for name, weights in drawn.items():
        relative = weights / weights.mean()
        look = {**style[name], "marker": style[name]["marker"] if len(weights) <= 30 else None, "linewidth": 1.6}
        look["label"] = f"{canvas.layer_name(name)} (CV {relative.std():.2f})"
        axes.plot(np.arange(1, len(weights) + 1), np.where(relative > 0, relative, np.nan), **look)
    axes.axhline(1, color="0.5", linewidth=0.8, zorder=1.5)
    canvas.log_scale(axes, "y")
    axes.set_ylabel("weight / mean of its layer (log scale)")
    if features is not None and len(features) <= 12:
        canvas.name_ticks(axes, features, first=1, wrap=14)
    canvas.dress(axes, x="feature" if features is not None else "rank of the feature by weight")
    axes.legend(frameon=False, handlelength=3.2)
    return canvas.finish(figure, path)


def _as_weights(name: str, values: Any, features: Sequence[str] | None) -> np.ndarray:
    weights = as_array(values, f"the weights of {name!r}", shape="[features]", dims=1)
    if not np.isfinite(weights).all() or (weights < 0).any() or not weights.any():
        raise UsageError(f"Expected finite weights of {name!r}, 0 or more and not all 0; got {weights[:5]} …")
    if features is None:
        return np.sort(weights)[::-1]
    if len(features) != len(weights):
        raise UsageError(f"The layer {name!r} has {len(weights)} weights for {len(features)} features.")
    return weights


@checked
def plot_metric_condition(values: Mapping[str, Any], path: Target = None, *, width: float = WIDTH) -> Figure:
    r"""Return a figure of condition numbers per layer, a dot per sample.

    The condition number is that of G = JᵀJ on its rank: 1 where the head stretches all directions that it keeps alike.
    Boxes reach from the lower to the upper quartile, with a line at the median; whiskers from 5 % to 95 % of samples.

    Args:
        values: Layer, in order → condition number of the pullback metric of each sample, as
            `Results.geometry["metric_condition_number"]`. None, NaN and infinity (a metric without full rank) are
            counted beside the layer's name and not drawn.
        path, width: File to write, whose suffix says the format (png, svg, pdf); width in inches, 4 to 40.

    Raises:
        HfprojError: If matplotlib is not installed.
        UsageError: If there is no layer, one has no finite value, or a value is not positive.

    Example:
        >>> figure = plot_metric_condition({"layer 1": [2.0, 3.0, 5.0], "layer 2": [20.0, 80.0, None]})
        >>> [label.get_text() for label in figure.axes[0].get_yticklabels()]
        ['layer 1', 'layer 2\n(1 of 3 not finite)']
    """
    layers = as_mapping(values, "condition numbers: layer → one per sample")
    figure, [axes] = canvas.new_figure(width=width, height=1.5 + 0.55 * len(layers))
    labels, finite = [], []
    for name, given in layers.items():
        sample = as_array(given, f"the condition numbers of {name!r}", shape="[samples]", dims=1)
        kept = sample[np.isfinite(sample)]
        if not kept.size or (kept <= 0).any():
            raise UsageError(f"Expected positive condition numbers of {name!r}, one finite; got {sample[:5]} …")
        lost = sample.size - kept.size
        labels.append(canvas.literal(name, wrap=24) + (f"\n({lost} of {sample.size} not finite)" if lost else ""))
        finite.append(kept)
    places = np.arange(len(finite))
    scatter = np.random.default_rng(0)  # vertical offsets: dots of equal value lie beside each other
    for place, kept in zip(places, finite):
        offsets = scatter.uniform(-0.2, 0.2, kept.size)
        axes.scatter(kept, place + offsets, s=9, color="#0072B2", alpha=0.5, linewidths=0, zorder=3)
    box = {"patch_artist": True, "boxprops": {"facecolor": "#CFE3F1", "edgecolor": INK}, "showfliers": False}
    look = {**box, "medianprops": {"color": "#D55E00", "linewidth": 2}, "orientation": "horizontal"}
    axes.boxplot(finite, positions=places, widths=0.56, whis=(5, 95), **look)
    axes.set_yticks(places, labels)
    axes.set_ylim(len(finite) - 0.5, -0.5)  # the first layer on top
    canvas.log_scale(axes, "x")
    canvas.dress(axes, x="condition number of G (log scale)", grid="x")
    return canvas.finish(figure, path)


@checked
def plot_orbits(
    orbits: Mapping[str, Any], path: Target = None, *, names: Sequence[str] | None = None, width: float = WIDTH
) -> Figure:
    """Return a figure of orbits in the plane of two principal components, a panel per layer.

    Each line is one object under a sweep, from its start (large hollow marker) to its end (large full one). A head that
    is invariant to the transformation contracts lines to points; the panels have scales of their own.

    Args:
        orbits: Layer ("h", "z") → coordinates `[objects, steps, 2]`, a mapping with these as "points" and the fractions
            of variance as "explained" (`orbit_coordinates`), or features `[objects, steps, dim]`, which are projected.
        names: Of the objects, for the legend (drawn for up to 8 objects).
        path, width: File to write, whose suffix says the format (png, svg, pdf); width in inches, 4 to 40.

    Raises:
        HfprojError: If matplotlib is not installed.
        UsageError: If there is no layer, or points have another shape, or are not finite.

    Example:
        >>> sweep = [[[0.0, 0.0], [1.0, 1.0]], [[3.0, 0.0], [4.0, 1.0]]]
        >>> [axes.get_title(loc='left') for axes in plot_orbits({"h": sweep, "z": sweep}).axes]
        ['representation h', 'projection z']
    """
    planes = {layer: _as_plane(layer, given) for layer, given in as_mapping(orbits, "orbits: layer → points").items()}
    count = max(len(points) for points, _ in planes.values())
    shown = [str(name) for name in names] if names is not None else [f"object {i + 1}" for i in range(count)]
    if len(set(shown)) < count:
        raise UsageError(f"Expected a name of its own for each of {count} objects, got {len(set(shown))}.")
    style = list(canvas.styles([f"{i}" for i in range(count)]).values())
    figure, axes = canvas.panels(len(planes), width=width, height=3.1)
    handles: dict[str, Any] = {}
    for panel, (layer, (points, explained)) in zip(axes, planes.items()):
        for i, line in enumerate(points):
            look = {key: style[i][key] for key in ("color", "marker")}
            [handle] = panel.plot(*line.T, linewidth=1.3, markersize=2.4, **look)
            panel.plot(*line[0], markersize=7.5, markerfacecolor="white", linestyle="", **look)
            [end] = panel.plot(*line[-1], markersize=7.5, linestyle="", **look)
            handles.setdefault(canvas.literal(shown[i]), end if len(line) > 1 else handle)
        for i, (axis, fraction) in enumerate(zip((panel.xaxis, panel.yaxis), explained), start=1):
            part = f" ({100 * fraction:.0f} % of var.)" if np.isfinite(fraction) else ""
            axis.set_label_text(f"component {i}{part}")
        panel.set_title(canvas.layer_name(layer), **TITLE)
        _square(panel, points)
        panel.locator_params(nbins=5)
        canvas.dress(panel)
    look = {"marker": "o", "markersize": 7.5, "color": INK, "linestyle": ""}
    for name, face in (("start", "white"), ("end", INK)):
        [handles[name]] = axes[0].plot([], [], markerfacecolor=face, **look)
    canvas.legend(figure, handles if count <= 8 else dict(list(handles.items())[-2:]))
    return canvas.finish(figure, path)


@checked
def orbit_coordinates(features: Any) -> dict[str, list]:
    """Return the plane of the two principal components: "points" `[objects][steps][2]` and "explained" `[2]`.

    Normalise rows first where h and z shall be compared by direction only.

    Args:
        features: `[objects, steps, dim]`, with dim ≥ 2.

    Raises:
        UsageError: If the features have another shape, or are not finite.

    Example:
        >>> plane = orbit_coordinates([[[0.0, 0.0, 1.0], [2.0, 0.0, 1.0]], [[4.0, 0.0, 1.0], [6.0, 0.0, 1.0]]])
        >>> plane["explained"], plane["points"][0]
        ([1.0, 0.0], [[-3.0, 0.0], [-1.0, 0.0]])
    """
    f = _finite(as_array(features, "the features of orbits", shape="[objects, steps, dim ≥ 2]", dims=3), "features")
    rows = f.reshape(-1, f.shape[-1])
    rows = rows - rows.mean(0)
    _, sigma, components = np.linalg.svd(rows, full_matrices=False)
    components = components[:2]
    components = components * np.sign(components[np.arange(len(components)), np.abs(components).argmax(1)])[:, None]
    points = np.zeros((len(rows), 2))
    points[:, : len(components)] = rows @ components.T
    explained = np.zeros(2)
    explained[: min(2, len(sigma))] = sigma[:2] ** 2 / max((sigma**2).sum(), np.finfo(float).tiny)
    return {"points": points.reshape(*f.shape[:2], 2).tolist(), "explained": explained.tolist()}


def _as_plane(layer: str, given: Any) -> tuple[np.ndarray, np.ndarray]:
    given = given if isinstance(given, Mapping) else {"points": given}
    if "points" not in given:
        raise UsageError(f"The orbits of {layer!r} have no 'points', only {sorted(given)}.")
    points, explained = given["points"], given.get("explained")
    points = _finite(as_array(points, f"the orbits of {layer!r}", shape="[objects, steps, 2 or more]", dims=3), layer)
    if points.shape[-1] > 2:
        plane = orbit_coordinates(points)
        points, explained = np.array(plane["points"]), plane["explained"]
    both = as_array([np.nan] * 2 if explained is None else explained, "fractions of variance", shape="[2]", dims=1)
    if both.size != 2:
        raise UsageError(f"Expected the fractions of variance of both components of {layer!r}, got {both.tolist()}.")
    return points, both


def _finite(array: np.ndarray, what: str) -> np.ndarray:
    if array.shape[-1] < 2 or not np.isfinite(array).all():
        raise UsageError(f"Expected finite points of at least two dimensions in {what}, got shape {list(array.shape)}.")
    return array


def _square(axes: Any, points: np.ndarray) -> None:
    """Show a square around all points, so that lengths compare in every direction."""
    low, high = points.min((0, 1)), points.max((0, 1))
    half = 0.58 * (high - low).max() or 1.0
    axes.set(xlim=(low + high)[0] / 2 + half * np.array([-1, 1]), ylim=(low + high)[1] / 2 + half * np.array([-1, 1]))
    axes.set_aspect("equal")
