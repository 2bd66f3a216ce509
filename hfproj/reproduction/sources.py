"""Where the images of a study come from: images to train on, a bank and test images for probes, and their labels."""

import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from hfproj.data import EvalImages, ImageViews, load_image_dataset
from hfproj.errors import UsageError

HUB = {"cifar10": "uoft-cs/cifar10", "cifar100": "uoft-cs/cifar100", "tiny_imagenet": "zh-plus/tiny-imagenet"}
CLASSES = {"cifar10": 10, "cifar100": 100, "tiny_imagenet": 200, "digits": 10}


@dataclass(frozen=True)
class Splits:
    """What a source gives.

    Attributes:
        train: The items that the model trains on; also the bank of the probes.
        test: Held-out items.
        labels: Name → the labels of the items of train and of test.
    """

    train: Any
    test: Any
    labels: Mapping[str, tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Source:
    """Images with one label, by name; other sources of `hfproj.studies` derive from it.

    Args:
        images: "cifar10", "cifar100", "tiny_imagenet" or "digits".
        train_labels: Column with the labels that the training sees, where the objective needs some.
    """

    images: str
    train_labels: str = "label"

    def load(self, places: Mapping[str, str], images: int | None, test_images: int | None) -> Splits:
        """Return the splits, random subsets of at most so many images.

        Args:
            places: Name of a data set → where it is (a Hub id, a folder); else it is on the Hub.
            images, test_images: At most so many.
        """
        name = places.get(self.images) or HUB.get(self.images, self.images)
        train = load_image_dataset(name, split="train", limit=images)
        test = load_image_dataset(name, split=self._test_split(name), limit=test_images)
        return self.splits(train, test)

    def synthetic(self, rows: int) -> Splits:
        """Return splits of random images, for a trial: nothing is downloaded, and nothing can be learned."""
        made = []
        for split in ("train", "test"):
            rng = np.random.default_rng(zlib.crc32(f"{self.images}{split}".encode()))
            pixels = rng.integers(0, 256, (rows, 32, 32, 3), dtype=np.uint8)
            feature = self._class_label()
            columns = {"image": [Image.fromarray(p) for p in pixels], "label": [i % feature.num_classes for i in range(rows)]}
            features = datasets.Features({"image": datasets.Image(), "label": feature})
            made.append(datasets.Dataset.from_dict(columns, features=features))
        return self.splits(*made)

    def splits(self, train: datasets.Dataset, test: datasets.Dataset) -> Splits:
        """Return what the two data sets become."""
        label = tuple(torch.tensor(part["label"]) for part in (train, test))
        return Splits(train, test, {"label": label})  # type: ignore[dict-item]

    def views(self, model: nn.Module, **options: Any) -> ImageViews:
        """Return the collator that makes views for the training."""
        return ImageViews.for_model(model, label_column=self.train_labels, **options)

    def pixels(self, model: nn.Module, size: int | None) -> EvalImages:
        """Return the collator that makes batches for measuring."""
        options = {} if size is None else {"size": size, "resize": size}
        return EvalImages.for_model(model, label_column=None, **options)

    def _test_split(self, name: str) -> str:
        return "valid" if name == HUB["tiny_imagenet"] else "test"

    def _class_label(self) -> Any:
        if self.images not in CLASSES:
            raise UsageError(f"Expected images of {', '.join(CLASSES)}, got {self.images!r}.")
        return datasets.ClassLabel(num_classes=CLASSES[self.images])


def place_of(folder: str | Path) -> dict[str, str]:
    """Return the data sets that lie in a folder, by name, as ``places``: subfolders named ``cifar10`` and so on.

    Raises:
        UsageError: If there are none.
    """
    path = Path(folder).expanduser()
    found = {part.name: str(part) for part in sorted(path.iterdir()) if part.is_dir()} if path.is_dir() else {}
    if not {*found} & {*CLASSES}:
        raise UsageError(f"Expected a folder with data sets ({', '.join(HUB)}), got {str(folder)!r}; leave it out to use the Hub.")
    return found
