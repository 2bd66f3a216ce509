"""Heat maps of covariance or correlation."""

import os
from collections.abc import Mapping
from typing import Any

import numpy as np

from hfproj.errors import UsageError
from hfproj.plots._common import LAYERS, WIDTH, as_array, as_mapping, finish, literal, panels, title

_COLOURS = "RdBu_r"  # told apart by colour-blind readers; white is zero


def plot_covariance(
    covariances: Mapping[str, Any],
    path: str | os.PathLike | None = None,
    *,
    correlation: bool = True,
    width: float = WIDTH,
) -> Any:
    """Return heat maps of the covariance of features, a panel per layer, and write them if a path is given.

    White is zero, red positive, blue negative. Off the diagonal, colour means that two dimensions say the same
    (redundancy); a decorrelated representation shows the diagonal alone.

    Args:
        covariances: Layer ("h", "z") → covariance `[dim, dim]`, as `Results.geometry["covariance"]`.
        path: Where to write; the suffix says the format (png, svg, pdf).
        correlation: Divide by the standard deviations, so that all entries lie in [−1, 1]. Dimensions without
            variance are grey.
        width: Of the figure, in inches.

    Raises:
        UsageError: no layer, or a matrix that is not square, finite and symmetric, or has a negative variance.
        HfprojError: matplotlib is not installed.

    Example:
        >>> plot_covariance({"h": [[4.0, 1.0], [1.0, 1.0]]}).axes[0].images[0].get_array().tolist()
        [[1.0, 0.5], [0.5, 1.0]]
    """
    matrices = {n: _as_matrix(n, m) for n, m in as_mapping(covariances, "covariances: layer → [dim, dim]").items()}
    kind = "correlation" if correlation else "covariance"
    figure, axes = panels(len(matrices), width=width, height=2.5 if width > 5.2 and len(matrices) > 1 else 2.9)
    for panel, (layer, matrix) in zip(axes, matrices.items()):
        if correlation:
            std = np.sqrt(np.diag(matrix))
            std = np.where(std > 0, std, np.nan)
            matrix = np.clip(matrix / std / std[:, None], -1, 1)
        limit = 1.0 if correlation else np.abs(matrix).max() or 1.0
        panel.set_facecolor("0.75")
        image = panel.imshow(
            np.ma.masked_invalid(matrix), cmap=_COLOURS, vmin=-limit, vmax=limit, interpolation="nearest"
        )
        title(panel, LAYERS.get(layer, literal(layer)))
        panel.locator_params(integer=True)
        panel.set_xlabel("dimension")
        panel.set_ylabel("dimension")
        figure.colorbar(image, cax=panel.inset_axes((1.04, 0, 0.05, 1)), label=kind)
    return finish(figure, path)


def _as_matrix(name: str, values: Any) -> np.ndarray:
    matrix = as_array(values, f"the covariance of {name!r}", shape="[dim, dim]", dims=2)
    rows, columns = matrix.shape
    if rows != columns or not np.isfinite(matrix).all():
        raise UsageError(f"Expected the covariance of {name!r} square and finite, got shape {[rows, columns]}.")
    scale = np.abs(matrix).max()
    if np.abs(matrix - matrix.T).max() > 1e-6 * scale or np.diag(matrix).min() < -1e-9 * scale:
        raise UsageError(f"The covariance of {name!r} must be symmetric, with variances of 0 or more on its diagonal.")
    return matrix
