"""How strongly each layer weighs each feature of the input."""

import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from hfproj.errors import UsageError
from hfproj.plots._common import (
    LAYERS,
    WIDTH,
    as_array,
    as_mapping,
    dress,
    finish,
    literal,
    log_scale,
    new_figure,
    styles,
    tilt,
)

_TICKS = 12  # names below the axis


def plot_feature_weights(
    layers: Mapping[str, Any],
    path: str | os.PathLike | None = None,
    *,
    features: Sequence[str] | None = None,
    width: float = WIDTH,
) -> Any:
    """Return a figure of feature weights per layer, relative to the layer's mean, and write it if a path is given.

    The legend has the coefficient of variation (CV): where it grows from layer to layer, weighting is progressive, and
    the last layer keeps fewer features than the first.

    Args:
        layers: Layer, in order → weight of each feature. Weights without names (the singular values of a layer) are
            sorted descending; then layers may differ in width.
        path: Where to write; the suffix says the format (png, svg, pdf).
        features: Names of the features, which fix their order.
        width: Of the figure, in inches.

    Raises:
        UsageError: no layer, weights that are negative, not finite or all zero, or not one per name.
        HfprojError: matplotlib is not installed.

    Example:
        >>> figure = plot_feature_weights({"h": [1.0, 3.0], "z": [1.0, 9.0]}, features=["colour", "shape"])
        >>> [text.get_text() for text in figure.axes[0].get_legend().get_texts()]
        ['representation h (CV 0.50)', 'projection z (CV 0.80)']
    """
    figure, [axes] = new_figure(width=width, height=3.8)
    drawn = {n: _as_weights(n, w, features) for n, w in as_mapping(layers, "weights: layer → one per feature").items()}
    style = styles(drawn)
    for name, weights in drawn.items():
        relative = weights / weights.mean()
        label = f"{LAYERS.get(name, literal(name))} (CV {relative.std():.2f})"
        look = {key: style[name][key] for key in ("color", "linestyle")}
        marker = style[name]["marker"] if len(weights) <= 30 else None
        x = np.arange(1, len(weights) + 1)
        axes.plot(x, np.where(relative > 0, relative, np.nan), label=label, marker=marker, linewidth=1.6, **look)
    axes.axhline(1, color="0.5", linewidth=0.8, zorder=1.5)
    log_scale(axes, "y")
    axes.set_ylabel("weight / mean of its layer (log scale)")
    if features is not None and len(features) <= _TICKS:
        axes.set_xticks(np.arange(1, len(features) + 1), [literal(name, wrap=14) for name in features])
        if sum(map(len, map(str, features))) > 9 * width:
            tilt(axes)
        axes.set_xlabel("feature")
    else:
        axes.set_xlabel("feature" if features is not None else "rank of the feature by weight")
    dress(axes)
    axes.legend(frameon=False, handlelength=3.2)
    return finish(figure, path)


def _as_weights(name: str, values: Any, features: Sequence[str] | None) -> np.ndarray:
    weights = as_array(values, f"the weights of {name!r}", shape="[features]", dims=1)
    if not np.isfinite(weights).all() or (weights < 0).any() or not weights.any():
        raise UsageError(f"Expected finite weights of {name!r}, 0 or more and not all 0; got {weights[:5]} …")
    if features is None:
        return np.sort(weights)[::-1]
    if len(features) != len(weights):
        raise UsageError(f"The layer {name!r} has {len(weights)} weights for {len(features)} features.")
    return weights
