"""Trajectories of the extreme eigenvalues of a Hessian."""

import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from hfproj.errors import UsageError
from hfproj.plots._common import INK, WIDTH, dress, finish, legend, literal, new_figure, styles, title, whole_numbers
from hfproj.plots.curves import draw_curve, set_scale
from hfproj.plots.over_steps import check_rows, over_steps

_NAMES = {"lambda_max": "largest λ", "lambda_min": "smallest λ"}


def plot_eigenvalues(
    rows: Sequence[Mapping[str, Any]],
    path: str | os.PathLike | None = None,
    *,
    of: str = "",
    width: float = WIDTH,
) -> Any:
    """Return a figure of λ_min and λ_max of the loss's Hessian over steps, and write it if a path is given.

    The axis is symmetric logarithmic, so that a small negative eigenvalue is seen beside a large positive one. Below
    the zero line the loss has a direction of negative curvature: the point is no minimum.

    Args:
        rows: `Results.history`: mappings with "step" and "lambda_min" or "lambda_max", and their bounds of error
            "lambda_min_error", "lambda_max_error" where they are known (drawn as bars).
        path: Where to write; the suffix says the format (png, svg, pdf).
        of: In what the Hessian was taken ("the head's parameters", "h"), for the axis.
        width: Of the figure, in inches.

    Raises:
        UsageError: no row, a row without a step, or no eigenvalue.
        HfprojError: matplotlib is not installed.

    Example:
        >>> rows = [{"step": s, "lambda_min": -0.1, "lambda_max": 4.0} for s in range(3)]
        >>> plot_eigenvalues(rows).axes[0].get_yscale()
        'symlog'
    """
    check_rows(rows)
    figure, [axes] = new_figure(width=width, height=3.8)
    style = dict(zip(_NAMES, styles(["h", "z"]).values()))
    drawn, handles = [], {}
    for name, label in _NAMES.items():
        x, y, std = over_steps(rows, name)
        if not np.isfinite(y).any():
            continue
        handles[label] = draw_curve(axes, x, y, std, style=style[name])
        bounds = dict(zip(*over_steps(rows, f"{name}_error")[:2]))
        error = np.array([bounds.get(step, np.nan) for step in x])
        if np.isfinite(error).any():
            color = style[name]["color"]
            axes.errorbar(x, y, np.nan_to_num(error), fmt="none", ecolor=color, elinewidth=1, capsize=2.5)
        drawn.append(y)
        whole_numbers(axes, x)
    if not drawn:
        raise UsageError("No row of the history has 'lambda_min' or 'lambda_max'.")
    values = np.concatenate(drawn)
    set_scale(axes, "y", "symlog", values)
    low, high = axes.dataLim.intervaly  # bars of error included
    axes.axhline(0, color=INK, linewidth=1)
    axes.set_ylim(min(2.5 * low, -np.nanmax(np.abs(values)) * 1e-5), max(2.5 * high, 0))
    if np.nanmin(values) < 0:
        handles["negative curvature"] = axes.axhspan(axes.get_ylim()[0], 0, color="0.93", linewidth=0, zorder=0)
    axes.set_xlabel("training step")
    axes.set_ylabel("eigenvalue (symmetric log scale)")
    title(axes, f"Hessian of the loss{f' in {literal(of)}' if of else ''}")
    dress(axes)
    legend(figure, handles, columns=3)
    return finish(figure, path)
