"""Data sets whose items know their index and epoch, image augmentation that depends on nothing else, and collators.

A batch of any collator is ``{"views": [tensor or dict, …], "index": [B], "labels"?: [B]}``. Imports `backbones` (for
their preprocessing) and what lies below it.
"""

from typing import TYPE_CHECKING

from hfproj.lazy import lazy_names

if TYPE_CHECKING:
    from hfproj.data.augment import Augmentation
    from hfproj.data.datasets import load_image_dataset, split_off, without_bad_images
    from hfproj.data.images import EvalImages, ImageViews, to_rgb_tensor
    from hfproj.data.indexing import EpochSampler, IndexedDataset, StreamDataset
    from hfproj.data.text import EvalText, TextViews

__all__ = [
    "Augmentation", "EpochSampler", "EvalImages", "EvalText", "ImageViews", "IndexedDataset", "StreamDataset",
    "TextViews", "load_image_dataset", "split_off", "to_rgb_tensor", "without_bad_images",
]  # fmt: skip

if not TYPE_CHECKING:
    __getattr__, __dir__ = lazy_names(__name__, {
        "augment": ["Augmentation"], "datasets": ["load_image_dataset", "split_off", "without_bad_images"],
        "images": ["EvalImages", "ImageViews", "to_rgb_tensor"],
        "indexing": ["EpochSampler", "IndexedDataset", "StreamDataset"], "text": ["EvalText", "TextViews"],
    })  # fmt: skip
