"""How unevenly a head stretches directions: condition number of the pullback metric, over layers and samples."""

import os
from collections.abc import Mapping
from typing import Any

import numpy as np

from hfproj.errors import UsageError
from hfproj.plots._common import INK, WIDTH, as_array, as_mapping, dress, finish, literal, log_scale, new_figure

_BOX = {"facecolor": "#CFE3F1", "edgecolor": INK}


def plot_metric_condition(
    values: Mapping[str, Any], path: str | os.PathLike | None = None, *, width: float = WIDTH
) -> Any:
    r"""Return a figure of condition numbers per layer, a dot per sample, and write it if a path is given.

    The condition number is that of G = JᵀJ on its rank: 1 where the head stretches all directions that it keeps alike.
    Boxes reach from the lower to the upper quartile, with a line at the median; whiskers from 5 % to 95 % of samples.

    Args:
        values: Layer, in order → condition number of the pullback metric of each sample, as
            `Results.geometry["metric_condition_number"]`. None, NaN and infinity (a metric without full rank) are
            counted beside the layer's name and not drawn.
        path: Where to write; the suffix says the format (png, svg, pdf).
        width: Of the figure, in inches.

    Raises:
        UsageError: no layer, one without a finite value, or a value that is not positive.
        HfprojError: matplotlib is not installed.

    Example:
        >>> figure = plot_metric_condition({"layer 1": [2.0, 3.0, 5.0], "layer 2": [20.0, 80.0, None]})
        >>> [label.get_text() for label in figure.axes[0].get_yticklabels()]
        ['layer 1', 'layer 2\n(1 of 3 not finite)']
    """
    layers = {
        name: as_array(sample, f"the condition numbers of {name!r}", shape="[samples]", dims=1)
        for name, sample in as_mapping(values, "condition numbers: layer → one per sample").items()
    }
    figure, [axes] = new_figure(width=width, height=1.5 + 0.55 * len(layers))
    labels, finite = [], []
    for name, sample in layers.items():
        kept = sample[np.isfinite(sample)]
        if not kept.size or (kept <= 0).any():
            raise UsageError(
                f"Expected positive condition numbers of {name!r}, at least one finite; got {sample[:5]} …"
            )
        lost = sample.size - kept.size
        labels.append(literal(name, wrap=24) + (f"\n({lost} of {sample.size} not finite)" if lost else ""))
        finite.append(kept)
    places = np.arange(len(finite))
    scatter = np.random.default_rng(0)  # vertical offsets: dots of equal value lie beside each other
    for place, kept in zip(places, finite):
        offsets = scatter.uniform(-0.2, 0.2, kept.size)
        axes.scatter(kept, place + offsets, s=9, color="#0072B2", alpha=0.5, linewidths=0, zorder=3)
    axes.boxplot(
        finite,
        positions=places,
        widths=0.56,
        whis=(5, 95),
        orientation="horizontal",
        showfliers=False,
        patch_artist=True,
        boxprops=_BOX,
        medianprops={"color": "#D55E00", "linewidth": 2},
    )
    axes.set_yticks(places, labels)
    axes.set_ylim(len(finite) - 0.5, -0.5)  # the first layer on top
    log_scale(axes, "x")
    axes.set_xlabel("condition number of G (log scale)")
    dress(axes, grid="x")
    return finish(figure, path)
