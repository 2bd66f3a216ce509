"""Orbits of augmentation: where one image moves in h and in z while a transformation is turned up.

The plane is that of the two principal components of all points, centred on their mean: PCA by SVD of
`[objects · steps, dim]`, the sign of a component such that its entry of largest size is positive.
"""

import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from hfproj.errors import UsageError
from hfproj.plots._common import (
    INK,
    LAYERS,
    WIDTH,
    as_array,
    as_mapping,
    dress,
    finish,
    legend,
    literal,
    panels,
    styles,
    title,
)

_NAMED = 8  # objects in the legend


def plot_orbits(
    orbits: Mapping[str, Any],
    path: str | os.PathLike | None = None,
    *,
    names: Sequence[str] | None = None,
    width: float = WIDTH,
) -> Any:
    """Return a figure of orbits in the plane of two principal components, a panel per layer; write it if asked to.

    Each line is one object under a sweep, from its start (large hollow marker) to its end (large full one). A head that
    is invariant to the transformation contracts lines to points; the panels have scales of their own.

    Args:
        orbits: Layer ("h", "z") → coordinates `[objects, steps, 2]`, a mapping with these as "points" and the shares of
            variance as "explained" (`orbit_coordinates`), or features `[objects, steps, dim]`, which are projected.
        path: Where to write; the suffix says the format (png, svg, pdf).
        names: Of the objects, for the legend (drawn for up to 8 objects).
        width: Of the figure, in inches.

    Raises:
        UsageError: no layer, or points of another shape, or not finite.
        HfprojError: matplotlib is not installed.

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
    style = list(styles([f"{i}" for i in range(count)]).values())
    figure, axes = panels(len(planes), width=width, height=3.1)
    handles: dict[str, Any] = {}
    for panel, (layer, (points, explained)) in zip(axes, planes.items()):
        for i, line in enumerate(points):
            color, marker = style[i]["color"], style[i]["marker"]
            handle = panel.plot(*line.T, color=color, linewidth=1.3, marker=marker, markersize=2.4)[0]
            panel.plot(*line[0], marker=marker, markersize=7.5, markerfacecolor="white", color=color, linestyle="")
            [end] = panel.plot(*line[-1], marker=marker, markersize=7.5, color=color, linestyle="")
            handles.setdefault(literal(shown[i]), end if len(line) > 1 else handle)
        for axis, share, which in zip((panel.xaxis, panel.yaxis), explained, ("component 1", "component 2")):
            part = f" ({100 * share:.0f} % of var.)" if np.isfinite(share) else ""
            axis.set_label_text(f"{which}{part}")
        title(panel, LAYERS.get(layer, literal(layer)))
        _square(panel, points)
        panel.locator_params(nbins=5)
        dress(panel)
    for name, face in (("start", "white"), ("end", INK)):
        handles[name] = _proxy(axes[0], face)
    legend(figure, handles if count <= _NAMED else dict(list(handles.items())[-2:]), columns=max(2, int(width / 1.6)))
    return finish(figure, path)


def orbit_coordinates(features: Any) -> dict[str, list]:
    """Return the plane of the two principal components: "points" `[objects][steps][2]` and "explained" `[2]`.

    Normalise rows first where h and z shall be compared by direction only.

    Args:
        features: `[objects, steps, dim]`, with dim ≥ 2.

    Raises:
        UsageError: another shape, or numbers that are not finite.

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
    shares = np.zeros(2)
    shares[: min(2, len(sigma))] = sigma[:2] ** 2 / max((sigma**2).sum(), np.finfo(float).tiny)
    return {"points": points.reshape(*f.shape[:2], 2).tolist(), "explained": shares.tolist()}


def _as_plane(layer: str, given: Any) -> tuple[np.ndarray, np.ndarray]:
    if isinstance(given, Mapping):
        if "points" not in given:
            raise UsageError(f"The orbits of {layer!r} have no 'points', only {sorted(given)}.")
        points, explained = given["points"], given.get("explained")
    else:
        points, explained = given, None
    points = _finite(as_array(points, f"the orbits of {layer!r}", shape="[objects, steps, 2 or more]", dims=3), layer)
    if points.shape[-1] > 2:
        plane = orbit_coordinates(points)
        points, explained = np.array(plane["points"]), plane["explained"]
    shares = as_array([np.nan] * 2 if explained is None else explained, "shares of variance", shape="[2]", dims=1)
    if shares.size != 2:
        raise UsageError(f"Expected the shares of variance of both components of {layer!r}, got {shares.tolist()}.")
    return points, shares


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


def _proxy(axes: Any, face: str) -> Any:
    [handle] = axes.plot([], [], marker="o", markersize=7.5, markerfacecolor=face, color=INK, linestyle="")
    return handle
