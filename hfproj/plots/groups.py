"""Named groups of numbers with their spread, side by side."""

import os
from collections.abc import Mapping
from typing import Any

import numpy as np

from hfproj.errors import UsageError, unknown
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
    new_figure,
    styles,
    tilt,
)
from hfproj.plots.curves import SCALES, set_scale


def plot_groups(
    groups: Mapping[str, Any],
    y_label: str,
    path: str | os.PathLike | None = None,
    *,
    y_scale: str = "linear",
    zero_line: bool = False,
    width: float = WIDTH,
) -> Any:
    """Return a figure of points with error bars, grouped along x, and write it if a path is given.

    Args:
        groups: Group → series → `(mean, standard deviation)`, or a number without a deviation. A group may lack a
            series; series named "h" and "z" look as in every other figure.
        y_label: What the numbers are, with their unit.
        path: Where to write; the suffix says the format (png, svg, pdf).
        y_scale: "linear", "log" or "symlog".
        zero_line: Draw a line at 0.
        width: Of the figure, in inches.

    Raises:
        UsageError: no group, an empty one, a value that is no number, or an unknown scale.
        HfprojError: matplotlib is not installed.

    Example:
        >>> groups = {"linear": {"h": (0.92, 0.01), "z": (0.90, 0.02)}, "mlp": {"h": 0.94, "z": 0.85}}
        >>> [label.get_text() for label in plot_groups(groups, "accuracy").axes[0].get_xticklabels()]
        ['linear', 'mlp']
    """
    if y_scale not in SCALES:
        raise unknown("scale", y_scale, SCALES)
    figure, [axes] = new_figure(width=width, height=3.8)
    table = {
        group: {name: as_pair(group, name, value) for name, value in as_mapping(series, f"series of {group!r}").items()}
        for group, series in as_mapping(groups, "groups: name → series").items()
    }
    names = list(dict.fromkeys(name for series in table.values() for name in series))
    style, handles = styles(names), {}
    step = 0.7 / max(len(names), 3)
    for i, name in enumerate(names):
        places = [p + (i - (len(names) - 1) / 2) * step for p, series in enumerate(table.values()) if name in series]
        mean, std = np.array([series[name] for series in table.values() if name in series]).T
        look = {"color": style[name]["color"], "marker": style[name]["marker"], "markersize": 7}
        handles[LAYERS.get(name, literal(name))] = axes.errorbar(
            places, mean, std if std.any() else None, linestyle="", elinewidth=1.4, capsize=3.5, **look
        )
    set_scale(axes, "y", y_scale, np.array([mean for series in table.values() for mean, _ in series.values()]))
    axes.set_xticks(range(len(table)), [literal(group, wrap=16) for group in table])
    axes.set_xlim(-0.55, len(table) - 0.45)
    if sum(map(len, table)) > 9 * width:
        tilt(axes)
    for between in range(1, len(table)):
        axes.axvline(between - 0.5, color="0.85", linewidth=0.8, zorder=0)
    axes.set_ylabel(literal(y_label))
    dress(axes, grid="y")
    if zero_line:
        axes.axhline(0, color=INK, linewidth=0.9, zorder=1.5)
    if len(names) > 1 or names[0] not in LAYERS:
        legend(figure, handles, columns=max(2, int(width / 1.6)))
    return finish(figure, path)


def as_pair(group: str, name: str, value: Any) -> tuple[float, float]:
    """Return mean and standard deviation; a number alone has none."""
    pair = as_array(value if np.ndim(value) else [value], f"{name!r} of {group!r}", shape="(mean, std)", dims=1)
    if pair.size > 2 or not np.isfinite(pair).all() or pair[1:].min(initial=0) < 0:
        raise UsageError(f"Expected {name!r} of {group!r} as (mean, standard deviation ≥ 0), got {value!r:.80}.")
    return float(pair[0]), float(pair[1]) if pair.size > 1 else 0.0
