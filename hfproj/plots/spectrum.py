"""Eigenvalues of the covariance against their rank."""

import os
from collections.abc import Mapping
from typing import Any

import numpy as np

from hfproj.errors import UsageError
from hfproj.plots._common import LAYERS, WIDTH, as_array, dress, finish, literal, new_figure

_STYLES: dict[str, dict[str, Any]] = {
    "h before": {"color": "#56B4E9", "linestyle": (0, (5, 2))},
    "h after": {"color": "#0072B2", "linestyle": "-"},
    "z before": {"color": "#E69F00", "linestyle": (0, (1, 1.4))},
    "z after": {"color": "#D55E00", "linestyle": (0, (7, 1.6, 1.2, 1.6))},
}
_SPARE = ["#009E73", "#CC79A7", "#000000"]
_DECADES = 8  # what lies further below the largest eigenvalue is no spread that a probe could use


def plot_spectrum(spectra: Mapping[str, Any], path: str | os.PathLike | None = None, *, width: float = WIDTH) -> Any:
    """Return a figure of covariance eigenvalues (logarithmic) against their rank, and write it if a path is given.

    A curve that falls off the lower edge has no variance in the remaining dimensions (dimensional collapse). The same
    spectra give the same file, byte for byte.

    Args:
        spectra: Curve name → eigenvalues sorted descending, as `Results.spectra` ("h before", "h after", "z before",
            "z after"; other names work too).
        path: Where to write; the suffix says the format (png, svg, pdf).
        width: Of the figure, in inches.

    Raises:
        UsageError: no spectrum, or one that is empty or holds no positive number.
        HfprojError: matplotlib is not installed.

    Example:
        >>> plot_spectrum({"h after": [1.0, 0.5, 0.1]}).axes[0].get_yscale()
        'log'
    """
    figure, [axes] = new_figure(width=width, height=4.0)
    curves = {name: _as_curve(name, values) for name, values in spectra.items()}
    if not curves:
        raise UsageError("There is no spectrum to draw.")
    spare = iter(_SPARE * len(curves))
    for name in sorted(curves, key=lambda n: (list(_STYLES).index(n) if n in _STYLES else len(_STYLES), n)):
        style = _STYLES.get(name) or {"color": next(spare), "linestyle": "-."}
        layer, _, when = name.partition(" ")
        label = f"{LAYERS[layer]}, {when} training" if name in _STYLES else literal(name)
        axes.plot(np.arange(1, len(curves[name]) + 1), curves[name], label=label, linewidth=1.8, **style)
    axes.set_yscale("log")
    top = max(np.nanmax(curve) for curve in curves.values())
    bottom = min(curve[curve > top * 10.0**-_DECADES].min(initial=top) for curve in curves.values())
    axes.set_ylim(bottom / 2, top * 2)
    axes.set_xlim(1, max(max(map(len, curves.values())), 2))
    axes.locator_params(axis="x", integer=True)
    axes.set_xlabel("rank of the eigenvalue")
    axes.set_ylabel("eigenvalue of the covariance (log scale)")
    dress(axes)
    axes.legend(frameon=False, handlelength=3.6)
    return finish(figure, path)


def _as_curve(name: str, values: Any) -> np.ndarray:
    curve = as_array(values, f"the spectrum {name!r}", shape="[dim]", dims=1)
    if not (curve > 0).any():
        raise UsageError(f"The spectrum {name!r} must be a list with at least one positive number.")
    floor = np.nanmax(curve) * 1e-300
    return np.where(np.isnan(curve), np.nan, np.maximum(curve, floor))  # a zero would break the line on a log axis
