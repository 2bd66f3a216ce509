"""Pictures of the user's own images: views, nearest neighbours and a map of h, before and after training.

They show images that may be private: they are written beside the results, and neither pushed nor named on the card.
"""

import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float
from torch import Tensor, nn

from hfproj import distributed, filenames, plots
from hfproj.checking import checked
from hfproj.data.images import EvalImages
from hfproj.data.indexing import IndexedDataset, as_item
from hfproj.errors import HfprojError, UsageError, check_path
from hfproj.files import write_atomic
from hfproj.reporting.maps import WIDTH, Labels, check_pairs, draw_map, nearest, small_png, spaced
from hfproj.typing import Data

_SHOWN, _QUERIES = 4, 4  # images whose views are shown, and whose neighbours are


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
        UsageError: If rows of h and images do not pair, there are fewer than two, or the items hold no "image".

    Example:
        >>> import hfproj, tempfile, torch
        >>> images = hfproj.load_image_dataset("digits", split="test").select(range(8))
        >>> h = torch.randn(8, 4, generator=torch.Generator().manual_seed(0))
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     written = write_image_pictures(folder, hfproj.load_backbone("vit_nano"), images, h, h.flip(1))
        ...     [path.name for path in written]
        ['neighbours.png', 'map.png']
    """
    check_path("the folder of a run", folder)
    check_pairs(dataset, before, after, what="images")
    if "image" not in (columns := as_item(dataset[0])):
        what = f"Expected images in a column 'image', got items of {', '.join(map(str, columns))}"
        raise UsageError(f"{what}; of texts: hfproj.reporting.write_text_pictures.")
    if distributed.rank() != 0:
        return []
    folder, images = Path(folder), _Images(model, dataset)
    labels = Labels(dataset, label_column)
    for name in filenames.OF_OWN_DATA:  # of a run before, which would be taken for this one's
        (folder / name).unlink(missing_ok=True)
    h = {"before": before, "after": after}
    draw: dict[str, Callable[[], Any]] = {
        filenames.NEIGHBOURS: lambda: _gallery(images, labels, h), filenames.MAP: lambda: draw_map(labels, h),
    }  # fmt: skip
    if views is not None:
        of_views = partial(_columns, images, dataset, views)
        draw = {filenames.VIEWS: lambda: plots.plot_views(of_views(), width=WIDTH), **draw}
    written = []
    for name, make in draw.items():
        with suppress(HfprojError):  # no matplotlib, or an image that can't be read: the page is complete without it
            write_atomic(folder / name, small_png(make()))
            written.append(folder / name)
    return written


class _Images:
    """Images as the backbone gets them."""

    def __init__(self, model: nn.Module, dataset: Any):
        self.dataset, self.collator = dataset, EvalImages.for_model(model, label_column=None)

    def pixels(self, rows: Sequence[int]) -> np.ndarray:
        """Return images as the backbone gets them without augmentation, `[rows, size, size, 1 or 3]` in [0, 1]."""
        items = [{"image": as_item(self.dataset[int(row)])["image"]} for row in rows]
        return shown(self.collator(items)["pixel_values"], self.collator)


def shown(x: Float[Tensor, "batch channels size size"], collator: Any) -> np.ndarray:
    """Return pixels `[batch, size, size, 1 or 3]` of normalised ones; of other channels than RGB the first, in grey."""
    pixels = x * collator.std + collator.mean
    pixels = pixels.flip(1) if collator.flip_channels else pixels
    pixels = pixels if pixels.shape[1] == 3 else pixels[:, :1]
    return pixels.clamp(0, 1).permute(0, 2, 3, 1).numpy()


def _columns(images: _Images, dataset: Any, views: Any) -> dict[str, np.ndarray]:
    rows = spaced(len(dataset), _SHOWN)
    indexed = dataset if isinstance(dataset, IndexedDataset) else IndexedDataset(dataset)
    made = views([indexed[row] for row in rows])["views"]
    return {"image": images.pixels(rows)} | {f"view {i}": shown(view, views) for i, view in enumerate(made[:4], 1)}


def _gallery(images: _Images, labels: Labels, h: Mapping[str, Tensor]) -> Any:
    rows, found = nearest(h, _QUERIES)
    pixels = {name: np.stack([images.pixels(near) for near in own]) for name, own in found.items()}
    names = labels.names(rows)
    right = {name: [labels.right(q, near) for q, near in zip(rows, own)] for name, own in found.items()}
    return plots.plot_neighbours(
        images.pixels(rows), pixels, right=right if names else None, names=names or (), width=WIDTH
    )
