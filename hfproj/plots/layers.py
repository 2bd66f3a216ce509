"""A number of every layer, from the first to the last."""

import os
from collections.abc import Mapping
from typing import Any

import numpy as np

from hfproj.errors import UsageError
from hfproj.plots._common import WIDTH, as_mapping, dress, finish, legend, literal, new_figure, styles, tilt
from hfproj.plots.curves import draw_curve
from hfproj.plots.groups import as_pair


def plot_layers(
    curves: Mapping[str, Any], y_label: str, path: str | os.PathLike | None = None, *, width: float = WIDTH
) -> Any:
    """Return a figure of what was measured of each layer, a curve a name, and write it if a path is given.

    Args:
        curves: Name → layer → number or `(mean, standard deviation)`; deviations are drawn as bands. Layers stand in
            the order of the first curve that has them; a curve may lack some.
        y_label: What the numbers are, with their unit.
        path: Where to write; the suffix says the format (png, svg, pdf).
        width: Of the figure, in inches.

    Raises:
        UsageError: no curve, an empty one, or a value that is no number.
        HfprojError: matplotlib is not installed.

    Example:
        >>> figure = plot_layers({"20-NN": {"block_1": 0.4, "h": 0.8, "z": (0.7, 0.02)}}, "accuracy")
        >>> [label.get_text() for label in figure.axes[0].get_xticklabels()]
        ['block_1', 'h', 'z']
    """
    figure, [axes] = new_figure(width=width, height=3.8)
    table = {
        name: {layer: as_pair(name, layer, value) for layer, value in as_mapping(of, f"layers of {name!r}").items()}
        for name, of in as_mapping(curves, "curves: name → layer → number").items()
    }
    layers = list(dict.fromkeys(layer for of in table.values() for layer in of))
    if len(layers) < 2:
        raise UsageError(f"Expected at least two layers, got {layers}.")
    style, handles = styles(table), {}
    for name, of in table.items():
        mean, std = np.array([of.get(layer, (np.nan, 0.0)) for layer in layers]).T
        band = std if std.any() else None
        handles[literal(name)] = draw_curve(axes, np.arange(len(layers)), mean, band, style=style[name])
    axes.set_xticks(range(len(layers)), [literal(layer, wrap=16) for layer in layers])
    if sum(map(len, layers)) > 9 * width:
        tilt(axes)
    axes.set_ylabel(literal(y_label))
    axes.set_xlabel("layer")
    dress(axes)
    legend(figure, handles, columns=max(2, int(width / 1.6)))
    return finish(figure, path)
