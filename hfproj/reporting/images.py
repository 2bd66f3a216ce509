"""Pictures of the user's own images: views, nearest neighbours and a map of h, before and after training.

Neighbours are those by cosine among the same held-out images, without the image itself. The map is PCA of unit rows
(SVD of the centred rows), the plane after training turned and mirrored onto the one before (orthogonal Procrustes), so
that what moves between them moved; and UMAP by cosine, where ``umap-learn`` is installed.

They show images that may be private: they are written beside the results, and neither pushed nor named on the card.
"""

import os
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from hfproj import distributed, filenames, plots
from hfproj.checking import checked
from hfproj.data.images import EvalImages
from hfproj.data.indexing import IndexedDataset, as_item
from hfproj.errors import HfprojError, UsageError, check_path
from hfproj.features.neighbours import NeighbourBank
from hfproj.files import write_atomic
from hfproj.typing import Data

NEIGHBOURS, QUERIES, SHOWN = 5, 4, 4  # neighbours of a query, queries, images of which views are shown
_ROWS = 2000  # points of a map
_WIDTH = 4.2  # inches: letters stay readable on a telephone
LARGEST = 600_000  # bytes of a picture: three of them, and the rest of a page, stay below 3 MB
_UMAP: dict[str, Any] = {"n_neighbors": 15, "min_dist": 0.1, "metric": "cosine", "random_state": 0}  # umap's defaults


@checked
def write_image_pictures(
    folder: str | os.PathLike, model: nn.Module, dataset: Data, before: Float[Tensor, "rows dim"],
    after: Float[Tensor, "_ _"], *, views: Callable[[list], Mapping[str, Any]] | None = None,
    label_column: str | None = "label",
) -> list[Path]:  # fmt: skip
    """Write `views.png`, `neighbours.png` and `map.png` into the folder of a run, where `hfproj.report` finds them.

    On several processes the first one writes. Those of a run before are removed; without matplotlib nothing is written.

    Args:
        folder: Where `results.json` lies.
        model: Whose preprocessing the images get.
        dataset: The held-out images.
        before: h of all of them before training, in their order (`hfproj.extract_features`).
        after: h of all of them after it.
        views: The collator of the training (`ImageViews`); None: no picture of views.
        label_column: Column of the labels, where there is one, to mark neighbours and points; None: without labels.

    Returns:
        What was written.

    Raises:
        UsageError: If rows of h and images do not pair, or there are fewer than two.

    Example:
        >>> import hfproj, tempfile
        >>> images = hfproj.load_image_dataset("digits", split="test").select(range(8))
        >>> h = torch.randn(8, 4, generator=torch.Generator().manual_seed(0))
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     written = write_image_pictures(folder, hfproj.load_backbone("vit_nano"), images, h, h.flip(1))
        ...     [path.name for path in written]
        ['neighbours.png', 'map.png']
    """
    check_path("the folder of a run", folder)
    rows = len(dataset)  # type: ignore[arg-type]
    if not len(before) == len(after) == rows or rows < 2:
        what = "Expected a row of h for each of two or more images, before and after"
        raise UsageError(f"{what}, got {len(before)} and {len(after)} rows of {rows} images.")
    if distributed.rank() != 0:
        return []
    folder, images = Path(folder), _Images(model, dataset, label_column)
    for name in filenames.OF_IMAGES:  # of a run before, which would be taken for this one's
        (folder / name).unlink(missing_ok=True)
    h = {"before": before, "after": after}
    draw: dict[str, Callable[[], Any]] = {
        filenames.NEIGHBOURS: lambda: _gallery(images, h), filenames.MAP: lambda: _map(images, h),
    }  # fmt: skip
    if views is not None:
        of_views = partial(_columns, images, dataset, views)
        draw = {filenames.VIEWS: lambda: plots.plot_views(of_views(), width=_WIDTH), **draw}
    written = []
    for name, make in draw.items():
        with suppress(HfprojError):  # no matplotlib, or an image that can't be read: the page is complete without it
            write_atomic(folder / name, _small(make()))
            written.append(folder / name)
    return written


def _small(figure: Any) -> bytes:
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


class _Images:
    """Thumbnails and labels of a data set."""

    def __init__(self, model: nn.Module, dataset: Any, label_column: str | None):
        self.dataset, self.collator = dataset, EvalImages.for_model(model, label_column=None)
        self.labels: list[Any] | None = None
        self.classes: Sequence[str] = ()
        columns = getattr(dataset, "column_names", None)
        if label_column and isinstance(columns, Sequence) and label_column in columns:
            self.labels = list(dataset[label_column])
            self.classes = getattr(dataset.features[label_column], "names", None) or ()

    def pixels(self, rows: Sequence[int]) -> np.ndarray:
        """Return images as the backbone gets them without augmentation, `[rows, size, size, 1 or 3]` in [0, 1]."""
        items = [{"image": as_item(self.dataset[int(row)])["image"]} for row in rows]
        return shown(self.collator(items)["pixel_values"], self.collator)

    def names(self, rows: Sequence[int]) -> list[str]:
        """Return what the labels of rows are called; "–" where there is none."""

        def name(label: Any) -> str:
            return "–" if label in (None, -1) else str(self.classes[label] if self.classes else label)

        return [name((self.labels or [])[row]) for row in rows]


def shown(x: Float[Tensor, "batch channels size size"], collator: Any) -> np.ndarray:
    """Return pixels `[batch, size, size, 1 or 3]` of normalised ones; of other channels than RGB the first, in grey."""
    pixels = x * collator.std + collator.mean
    pixels = pixels.flip(1) if collator.flip_channels else pixels
    pixels = pixels if pixels.shape[1] == 3 else pixels[:, :1]
    return pixels.clamp(0, 1).permute(0, 2, 3, 1).numpy()


def _columns(images: _Images, dataset: Any, views: Any) -> dict[str, np.ndarray]:
    rows = spaced(len(dataset), SHOWN)
    indexed = dataset if isinstance(dataset, IndexedDataset) else IndexedDataset(dataset)
    made = views([indexed[row] for row in rows])["views"]
    return {"image": images.pixels(rows)} | {f"view {i}": shown(view, views) for i, view in enumerate(made[:4], 1)}


def _map(images: _Images, h: Mapping[str, Tensor]) -> Any:
    chosen = spaced(len(h["before"]), _ROWS)
    labels = images.names(chosen) if images.labels is not None else None
    return plots.plot_map(maps({name: f[torch.tensor(chosen)] for name, f in h.items()}), labels=labels, width=_WIDTH)


def _gallery(images: _Images, h: Mapping[str, Tensor]) -> Any:
    rows = spaced(len(h["before"]), QUERIES)
    k = min(NEIGHBOURS, len(h["before"]) - 1)
    found = {name: NeighbourBank(f).search_within(k).rows[rows].tolist() for name, f in h.items()}
    pixels = {name: np.stack([images.pixels(near) for near in own]) for name, own in found.items()}
    right, names = None, []
    if images.labels is not None:
        names = images.names(rows)
        of = {name: [images.names(near) for near in own] for name, own in found.items()}
        right = {name: [[n == q for n in near] for near, q in zip(own, names)] for name, own in of.items()}
    return plots.plot_neighbours(images.pixels(rows), pixels, right=right, names=names, width=_WIDTH)
