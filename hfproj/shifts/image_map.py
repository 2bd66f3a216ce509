"""Data sets whose images are changed when they are read."""

import operator
from collections.abc import Sequence, Sized
from typing import Any

import numpy as np
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from hfproj.data.indexing import as_item
from hfproj.data.pixels import to_rgb_tensor
from hfproj.errors import UsageError
from hfproj.typing import Data


class ImageMap(Dataset):
    """A data set with other images: a subclass says in `change` what becomes of an item.

    The items are dicts; what they hold beside the image is kept. An item depends on its row alone.

    Args:
        dataset: Anything with a length and integer indices whose items hold an image: a ``datasets.Dataset``, a
            torchvision data set, a list of dicts, pairs or images.
        image_column: Entry of an item that holds the image.
        rows: Which rows of `dataset` there are, in this order; None: all.

    Raises:
        UsageError: If `dataset` has no length or no indices; on access, if the item lacks the image column or holds
            something there that is no image.
    """

    def __init__(self, dataset: Data, image_column: str = "image", rows: Sequence[int] | None = None):
        if not (isinstance(dataset, Sized) and hasattr(dataset, "__getitem__") and getattr(dataset, "ndim", 1) != 0):
            raise UsageError(
                f"{type(self).__name__} expected a data set with a length and indices, got a {type(dataset).__name__}."
            )
        self.dataset, self.image_column = dataset, image_column
        self.rows = range(len(dataset)) if rows is None else rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        index, length = operator.index(index), len(self)
        if not -length <= index < length:
            raise IndexError(f"index {index} is out of range for a data set of {length} items")
        index %= length
        row = self.rows[index]
        item = as_item(self.dataset[row])
        if self.image_column not in item:
            raise UsageError(
                f"The items have no column {self.image_column!r}; they have {', '.join(map(repr, item))}. "
                "Name the one with the images: image_column=…"
            )
        try:
            return self.change(item, row, index)
        except UsageError as error:
            raise UsageError(f"{error} (item {index} of the data set)") from error

    def change(self, item: dict[str, Any], row: int, index: int) -> dict[str, Any]:
        """Return what becomes of an item, given its row in the data set below and its index in this one."""
        raise NotImplementedError

    def read(self, item: dict[str, Any]) -> Tensor:
        """Return the item's image, uint8 [3, height, width]."""
        return to_rgb_tensor(item[self.image_column], self.image_column)


def to_pil(image: Tensor) -> Image.Image:
    """Return a uint8 tensor [3, height, width] as an image, the form in which `datasets` and torchvision give images.

    Example:
        >>> import torch
        >>> to_pil(torch.zeros(3, 2, 5, dtype=torch.uint8)).size
        (5, 2)
    """
    return Image.fromarray(np.ascontiguousarray(image.permute(1, 2, 0).numpy()))


def to_grey_levels(x: np.ndarray) -> np.ndarray:
    """Return values in [0, 1] as uint8.

    Example:
        >>> to_grey_levels(np.array([-1.0, 0.0, 0.5, 1.0])).tolist()
        [0, 0, 128, 255]
    """
    return np.rint(np.clip(x, 0, 1) * 255).astype(np.uint8)
