"""Named curves with a spread."""

import os
from collections.abc import Mapping
from typing import Any

import numpy as np

from hfproj.errors import UsageError, unknown
from hfproj.plots._common import (
    LAYERS,
    WIDTH,
    as_array,
    as_mapping,
    dress,
    finish,
    legend,
    literal,
    log_scale,
    new_figure,
    styles,
    whole_numbers,
)

SCALES = ("linear", "log", "symlog")
_MARKED = 30  # points of a curve; more of them hide the line


def plot_curves(
    curves: Mapping[str, Any],
    x_label: str,
    y_label: str,
    path: str | os.PathLike | None = None,
    *,
    x_scale: str = "linear",
    y_scale: str = "linear",
    zero_line: bool = False,
    width: float = WIDTH,
) -> Any:
    """Return a figure of named curves, and write it if a path is given.

    Args:
        curves: Name → `(x, y)` or `(x, mean of y, standard deviation of y)`; the deviation is drawn as a band. None and
            NaN leave a gap. Curves named "h" and "z" look as in every other figure.
        x_label: What x is, with its unit.
        y_label: What y is, with its unit.
        path: Where to write; the suffix says the format (png, svg, pdf).
        x_scale: "linear", "log" or "symlog". A logarithmic axis leaves out what is not positive.
        y_scale: The same for y; the threshold of "symlog" is chosen from the numbers.
        zero_line: Draw a line at y = 0.
        width: Of the figure, in inches.

    Raises:
        UsageError: no curve, one whose parts differ in length or hold no finite number that can be drawn, or an unknown
            scale.
        HfprojError: matplotlib is not installed.

    Example:
        >>> figure = plot_curves({"SiLU": ([1, 2, 3], [0.5, 0.2, 0.1], [0.1, 0.1, 0.0])}, "step", "loss")
        >>> figure.axes[0].get_xlabel()
        'step'
    """
    for scale in (x_scale, y_scale):
        if scale not in SCALES:
            raise unknown("scale", scale, SCALES)
    figure, [axes] = new_figure(width=width, height=3.8)
    drawn = {name: _as_curve(name, parts) for name, parts in as_mapping(curves, "curves: name → (x, y)").items()}
    style, handles = styles(drawn), {}
    for name, (x, y, std) in drawn.items():
        y = np.where(y > 0, y, np.nan) if y_scale == "log" else y
        x = np.where(x > 0, x, np.nan) if x_scale == "log" else x
        if not (np.isfinite(x) & np.isfinite(y)).any():
            raise UsageError(f"The curve {name!r} has no point to draw on a {y_scale} scale of y and {x_scale} of x.")
        label = LAYERS.get(name, literal(name))
        handles[label] = draw_curve(axes, x, y, std, label=label, style=style[name])
    set_scale(axes, "x", x_scale, np.concatenate([x for x, _, _ in drawn.values()]))
    set_scale(axes, "y", y_scale, np.concatenate([y for _, y, _ in drawn.values()]))
    axes.set_xlabel(literal(x_label))
    axes.set_ylabel(literal(y_label))
    if x_scale == "linear":
        whole_numbers(axes, np.concatenate([x for x, _, _ in drawn.values()]))
    dress(axes)
    if zero_line:
        axes.axhline(0, color="0.15", linewidth=0.9, zorder=1.5)
    if len(drawn) > 1 or not {"h", "z"} >= set(drawn):
        legend(figure, handles, columns=max(2, int(width / 1.6)))
    return finish(figure, path)


def draw_curve(
    axes: Any, x: np.ndarray, y: np.ndarray, std: np.ndarray | None, *, style: Mapping[str, Any], label: str = ""
) -> Any:
    """Draw a line with its band and, where there are few points, markers; return the line."""
    marker = style["marker"] if len(x) <= _MARKED else None
    look = {"color": style["color"], "linestyle": style["linestyle"], "marker": marker, "markersize": 4.5}
    [line] = axes.plot(x, y, label=label, linewidth=1.7, **look)
    if std is not None:
        axes.fill_between(x, y - std, y + std, color=style["color"], alpha=0.18, linewidth=0)
    return line


def set_scale(axes: Any, which: str, scale: str, values: np.ndarray) -> None:
    """Scale the x or y axis; "symlog" is linear below the smallest size among `values`, at most four decades down."""
    if scale == "log":
        log_scale(axes, which)
    elif scale == "symlog":
        sizes = np.abs(values[np.isfinite(values) & (values != 0)])
        largest = sizes.max() if sizes.size else 1.0
        smallest = max(sizes.min() if sizes.size else 1.0, largest * 1e-4)
        getattr(axes, f"set_{which}scale")("symlog", linthresh=10.0 ** np.floor(np.log10(smallest)))


def _as_curve(name: str, parts: Any) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
    if isinstance(parts, str | Mapping) or not hasattr(parts, "__len__") or len(parts) not in (2, 3):
        raise UsageError(f"Expected the curve {name!r} as (x, y) or (x, mean, standard deviation), got {parts!r:.80}.")
    x, y, *std = (
        as_array(part, f"x, y and deviation of {name!r}", shape="[points]", dims=1)
        for part in parts
        if part is not None
    )
    if any(part.shape != x.shape for part in (y, *std)):
        raise UsageError(
            f"x, y and deviation of the curve {name!r} differ in length: {[len(p) for p in (x, y, *std)]}."
        )
    return x, y, std[0] if std else None
