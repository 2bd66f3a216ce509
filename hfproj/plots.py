"""Figures of what was measured. matplotlib is imported when a figure is drawn; no global state of it is touched."""

import io
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from hfproj.errors import HfprojError, UsageError
from hfproj.results import write_atomic

# Okabe & Ito's colours, told apart by colour-blind readers; the line styles tell the curves apart in print.
_STYLES: dict[str, dict[str, Any]] = {
    "h before": {"color": "#56B4E9", "linestyle": (0, (5, 2))},
    "h after": {"color": "#0072B2", "linestyle": "-"},
    "z before": {"color": "#E69F00", "linestyle": (0, (1, 1.4))},
    "z after": {"color": "#D55E00", "linestyle": (0, (7, 1.6, 1.2, 1.6))},
}
_NAMES = {"h": "representation h", "z": "projection z"}
_SPARE = ["#009E73", "#CC79A7", "#000000"]
_DECADES = 6  # what lies further below the largest eigenvalue is no spread that a probe could use


def plot_spectrum(spectra: Mapping[str, Any], path: str | os.PathLike | None = None) -> Any:
    """Return a figure of covariance eigenvalues (logarithmic) against their rank, and write it if a path is given.

    A curve that falls off the lower edge has no variance in the remaining dimensions (dimensional collapse). The same
    spectra give the same file, byte for byte.

    Args:
        spectra: Curve name → eigenvalues sorted descending, as `Results.spectra` ("h before", "h after", "z before",
            "z after"; other names work too).
        path: Where to write; the suffix says the format (png, svg, pdf).

    Raises:
        UsageError: no spectrum, or one that is empty or holds no positive number.
        HfprojError: matplotlib is not installed.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise HfprojError("Drawing needs matplotlib: pip install hfproj[plots]") from error
    curves = {name: _as_curve(name, values) for name, values in spectra.items()}
    if not curves:
        raise UsageError("There is no spectrum to draw.")

    figure = Figure(figsize=(6.4, 4.0), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    spare = iter(_SPARE * len(curves))
    for name in sorted(curves, key=lambda n: (list(_STYLES).index(n) if n in _STYLES else len(_STYLES), n)):
        style = _STYLES.get(name) or {"color": next(spare), "linestyle": "-."}
        layer, _, when = name.partition(" ")
        label = f"{_NAMES[layer]}, {when} training" if name in _STYLES else name
        axes.plot(np.arange(1, len(curves[name]) + 1), curves[name], label=label, linewidth=1.8, **style)
    axes.set_yscale("log")
    top = max(np.nanmax(curve) for curve in curves.values())
    bottom = min(curve[curve > 0].min() for curve in curves.values())
    axes.set_ylim(max(bottom / 2, top * 10.0**-_DECADES), top * 2)
    axes.set_xlim(1, max(max(map(len, curves.values())), 2))
    axes.set_xlabel("rank of the eigenvalue")
    axes.set_ylabel("eigenvalue of the covariance (log scale)")
    axes.grid(True, which="major", color="0.9", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, handlelength=3.6)
    if path is not None:
        _save(figure, Path(path))
    return figure


def _as_curve(name: str, values: Any) -> np.ndarray:
    values = values.detach().cpu().numpy() if hasattr(values, "detach") else values
    curve = np.array([np.nan if v is None else v for v in values], dtype=np.float64)
    if curve.ndim != 1 or not (curve > 0).any():
        raise UsageError(f"The spectrum {name!r} must be a list with at least one positive number.")
    floor = np.nanmax(curve) * 1e-300
    return np.where(np.isnan(curve), np.nan, np.maximum(curve, floor))  # a zero would break the line on a log axis


def _save(figure: Any, path: Path) -> None:
    import matplotlib

    kind = path.suffix.lstrip(".").lower() or "png"
    dates = {"png": {"Software": None}, "svg": {"Date": None}, "pdf": {"CreationDate": None}}
    if kind not in dates:
        raise UsageError(f"Cannot write a figure as {path.name!r}; expected a name that ends in .png, .svg or .pdf.")
    buffer = io.BytesIO()
    with matplotlib.rc_context({"svg.hashsalt": "hfproj"}):
        figure.savefig(buffer, format=kind, metadata=dates[kind])
    write_atomic(path, buffer.getvalue())
