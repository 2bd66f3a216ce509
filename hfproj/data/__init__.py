"""Data sets whose items know their index and epoch, image augmentation that depends on nothing else, and collators.

A batch of any collator is ``{"views": [tensor or dict, …], "index": [B], "labels"?: [B]}``.
"""

import importlib
from typing import Any

_PUBLIC = {
    "Augmentation": "augment",
    "CIFAR100_SUPERCLASSES": "coarse",
    "CachedFeatures": "cache",
    "CorruptedDataset": "corruptions",
    "DigitViews": "composites",
    "DigitsOnImages": "composites",
    "EpochSampler": "indexing",
    "EvalFeatures": "cache",
    "EvalImages": "images",
    "EvalText": "text",
    "FeatureViews": "cache",
    "ImageViews": "images",
    "IndexedDataset": "indexing",
    "SpuriousMixture": "composites",
    "StreamDataset": "indexing",
    "TextViews": "text",
    "cache_features": "cache",
    "coarse_labels": "coarse",
    "corrupt": "corruptions",
    "list_corruptions": "corruptions",
    "load_image_dataset": "datasets",
    "split_off": "datasets",
    "to_rgb_tensor": "images",
    "with_coarse_labels": "coarse",
}

__all__ = sorted(_PUBLIC)


def __getattr__(name: str) -> Any:
    if name in _PUBLIC:
        value = getattr(importlib.import_module(f"hfproj.data.{_PUBLIC[name]}"), name)
        globals()[name] = value
        return value
    raise AttributeError(f"module 'hfproj.data' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *_PUBLIC])
