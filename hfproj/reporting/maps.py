"""Maps of representations in two dimensions, nearest neighbours and what rows are called, for pictures of a run.

The map is PCA of unit rows (SVD of the centred rows), the plane after training turned and mirrored onto the one before
(orthogonal Procrustes), so that what moves between them moved; and UMAP by cosine, where ``umap-learn`` is installed.
Neighbours are those by cosine among the same held-out items, without the item itself.
"""

import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hfproj import plots
from hfproj.checking import checked
from hfproj.errors import UsageError
from hfproj.features.neighbours import NeighbourBank

NEIGHBOURS = 5  # of a query
_ROWS = 2000  # points of a map
WIDTH = 4.2  # inches: letters stay readable on a telephone
LARGEST = 600_000  # bytes of a picture: three of them, and the rest of a page, stay below 3 MB
_UMAP: dict[str, Any] = {"n_neighbors": 15, "min_dist": 0.1, "metric": "cosine", "random_state": 0}  # umap's defaults


def check_pairs(dataset: Any, before: Tensor, after: Tensor, *, what: str) -> None:
    """Raise `UsageError` unless there is a row of both for each of two or more items."""
    rows = len(dataset)
    if not len(before) == len(after) == rows or rows < 2:
        expected = f"Expected a row of h for each of two or more {what}, before and after"
        raise UsageError(f"{expected}, got {len(before)} and {len(after)} rows of {rows} {what}.")


def small_png(figure: Any) -> bytes:
    """Return a figure as a PNG of at most `LARGEST` bytes: of photographs at a lower resolution."""
    data = plots.picture(figure, "png")
    while len(data) > LARGEST:
        figure.set_dpi(figure.get_dpi() * 0.8)
        data = plots.picture(figure, "png")
    return data


def spaced(count: int, most: int) -> list[int]:
    """Return `most` evenly spaced rows of `count`, or all: sets may be sorted by class.

    Example:
        >>> spaced(10, 3), spaced(2, 3)
        ([1, 5, 8], [0, 1])
    """
    most = min(count, most)
    return [(2 * i + 1) * count // (2 * most) for i in range(most)]


@checked
def maps(h: Mapping[str, Tensor]) -> dict[str, np.ndarray]:
    """Return maps of representations of the same images in two dimensions: by PCA and, if it is installed, by UMAP.

    Args:
        h: Name ("before", "after") → rows `[rows, dim]`.

    Example:
        >>> f = torch.randn(9, 4, generator=torch.Generator().manual_seed(0))
        >>> found = maps({"before": f, "after": f @ torch.linalg.qr(torch.randn(4, 4))[0]})
        >>> before, after = (found[name] for name in found if "PCA" in name)
        >>> bool(np.allclose(before, after, atol=1e-5))
        True
    """
    unit = {name: torch.nn.functional.normalize(f.double(), dim=1).numpy() for name, f in h.items()}
    found: dict[str, np.ndarray] = {}
    first: np.ndarray | None = None
    for name, rows in unit.items():
        points, explained = _pca(rows)
        first = points if first is None else first
        u, _, vt = np.linalg.svd(points.T @ first)
        found[f"{name}: PCA, {explained:.0%} of variance"] = points @ (u @ vt)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of what else could be installed, and of one process that a seed allows
        try:
            from umap import UMAP
        except ImportError:
            return found
        for name, rows in unit.items():
            if len(rows) > _UMAP["n_neighbors"]:
                found[f"{name}: UMAP"] = np.asarray(UMAP(**_UMAP, n_jobs=1).fit_transform(rows), dtype=np.float64)
    return found


def _pca(rows: np.ndarray) -> tuple[np.ndarray, float]:
    centred = rows - rows.mean(0)
    u, sigma, _ = np.linalg.svd(centred, full_matrices=False)
    points = np.zeros((len(rows), 2))
    points[:, : min(2, len(sigma))] = (u * sigma)[:, :2]
    return points, float((sigma[:2] ** 2).sum() / max((sigma**2).sum(), np.finfo(float).tiny))


class Labels:
    """What rows of a data set are called by its labels, if it has a column of them."""

    def __init__(self, dataset: Any, column: str | None):
        self.found: list[Any] | None = None
        self.classes: Sequence[str] = ()
        columns = getattr(dataset, "column_names", None)
        if column and isinstance(columns, Sequence) and column in columns:
            self.found = list(dataset[column])
            self.classes = getattr(dataset.features[column], "names", None) or ()

    def names(self, rows: Sequence[int]) -> list[str] | None:
        """Return what rows are called, "–" where there is no label; None if there is no column of them."""
        return None if self.found is None else [self._name(self.found[row]) for row in rows]

    def right(self, query: int, near: Sequence[int]) -> list[bool | None]:
        """Return whether neighbours have the label of a query; None where one of both has none."""
        own, *others = self.names([query, *near]) or ["–"] * (1 + len(near))
        return [None if "–" in (own, name) else name == own for name in others]

    def _name(self, label: Any) -> str:
        return "–" if label in (None, -1) else str(self.classes[label] if self.classes else label)


def nearest(h: Mapping[str, Tensor], queries: int) -> tuple[list[int], dict[str, list[list[int]]]]:
    """Return evenly spaced queries, and the rows of each one's nearest others under each name of `h`."""
    count = len(next(iter(h.values())))
    rows, k = spaced(count, queries), min(NEIGHBOURS, count - 1)
    return rows, {name: NeighbourBank(f).search_within(k).rows[rows].tolist() for name, f in h.items()}


def draw_map(labels: Labels, h: Mapping[str, Tensor]) -> Any:
    """Return a figure with the maps of h under each name."""
    chosen = spaced(len(next(iter(h.values()))), _ROWS)
    points = maps({name: f[torch.tensor(chosen)] for name, f in h.items()})
    return plots.plot_map(points, labels=labels.names(chosen), width=WIDTH)
