"""Where the images of a study come from: images to train on, a bank and test images for probes, and their labels."""

import hashlib
import os
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from hfproj.data import EvalImages, ImageViews, load_image_dataset
from hfproj.errors import UsageError, unknown

HUB = {"cifar10": "uoft-cs/cifar10", "cifar100": "uoft-cs/cifar100", "tiny_imagenet": "zh-plus/tiny-imagenet",
       "imagenet": "ILSVRC/imagenet-1k"}  # fmt: skip
CLASSES = {"cifar10": 10, "cifar100": 100, "tiny_imagenet": 200, "imagenet": 1000, "digits": 10}


@dataclass(frozen=True)
class Splits:
    """What a source gives.

    Attributes:
        train: The items that the model trains on; also the bank of the probes.
        test: Held-out items.
        labels: Name → the labels of the items of train and of test.
        phases: What is trained on one after the other, if it is not `train`.
        others: Further labelled data sets by name, which only probes see.
    """

    train: Any
    test: Any
    labels: Mapping[str, tuple[Tensor, Tensor]]
    phases: tuple[Any, ...] = ()
    others: Mapping[str, "Splits"] = field(default_factory=dict)

    @property
    def fingerprint(self) -> str:
        """A text that differs between other data: of all labels, and of some images; those of `others` among them."""
        found = hashlib.blake2b(digest_size=8)
        for name, both in sorted(self.labels.items()):
            for part in both:
                found.update(f"{name} {len(part)}".encode() + part.numpy().tobytes())
        for data in (self.train, self.test):
            for row in range(0, len(data), max(1, len(data) // 8)):
                found.update(np.asarray(data[row]["image"]).tobytes())
        for name, other in sorted(self.others.items()):
            found.update(f"{name} {other.fingerprint}".encode())
        return found.hexdigest()


@dataclass(frozen=True)
class Source:
    """Images with one label, by name; other sources of `hfproj.studies` derive from it.

    Args:
        images: "cifar10", "cifar100", "tiny_imagenet", "imagenet" or "digits".
        train_labels: Column with the labels that the training sees, where the objective needs some.
    """

    images: str
    train_labels: str | None = "label"

    def load(self, places: Mapping[str, str], images: int | None, test_images: int | None) -> Splits:
        """Return the splits, random subsets of at most so many images.

        Args:
            places: Name of a data set → where it is (a Hub id, a folder); else it is on the Hub.
            images: At most so many of train; None: all.
            test_images: The same of test.
        """
        name = places.get(self.images) or HUB.get(self.images, self.images)
        train = load_image_dataset(name, split="train", limit=images)
        test = load_image_dataset(name, split=self.test_split(name), limit=test_images)
        return self.splits(train, test)

    def synthetic(self, rows: int) -> Splits:
        """Return splits of random images, for a trial: nothing is downloaded, and nothing can be learned."""
        made = []
        for split in ("train", "test"):
            rng = np.random.default_rng(zlib.crc32(f"{self.images}{split}".encode()))
            pixels = rng.integers(0, 256, (rows, 32, 32, 3), dtype=np.uint8)
            feature = self._class_label()
            columns = {
                "image": [Image.fromarray(p) for p in pixels],
                "label": [i % feature.num_classes for i in range(rows)],
            }
            features = datasets.Features({"image": datasets.Image(), "label": feature})
            made.append(datasets.Dataset.from_dict(columns, features=features))
        return self.splits(*made)

    def splits(self, train: datasets.Dataset, test: datasets.Dataset) -> Splits:
        """Return what the two data sets become."""
        return Splits(train, test, {"label": labels_of(train, test)})

    def views(self, model: nn.Module, **options: Any) -> ImageViews:
        """Return the collator that makes views for the training."""
        return ImageViews.for_model(model, label_column=self.train_labels, **options)

    def pixels(self, model: nn.Module, size: int | None) -> EvalImages:
        """Return the collator that makes batches for measuring."""
        options: Any = {} if size is None else {"size": size, "resize": size}
        return EvalImages.for_model(model, label_column=None, **options)

    def test_split(self, name: str) -> str:
        """Return what the held-out split of the data set at a place is called."""
        return {HUB["tiny_imagenet"]: "valid", HUB["imagenet"]: "validation"}.get(name, "test")

    def _class_label(self) -> Any:
        if self.images not in CLASSES:
            raise UsageError(f"Expected images of {', '.join(CLASSES)}, got {self.images!r}.")
        return datasets.ClassLabel(num_classes=CLASSES[self.images])


def labels_of(train: datasets.Dataset, test: datasets.Dataset) -> tuple[Tensor, Tensor]:
    """Return the class numbers of two data sets."""
    return torch.tensor(train["label"]), torch.tensor(test["label"])


def places_of(data: str | os.PathLike | Mapping[str, str] | None) -> dict[str, str]:
    """Return name → place of the data sets that lie in a folder, as subfolders named ``cifar10`` and so on.

    A mapping is returned as it is, None as an empty one: the Hub.

    Raises:
        UsageError: If the folder has none, or the mapping names a data set that does not exist or no place of one.
    """
    if data is None or isinstance(data, Mapping):
        for name, place in (data or {}).items():
            if name not in CLASSES:
                raise unknown("data set", name, CLASSES)
            if not place:
                raise UsageError(f"Expected a folder or a Hub id of {name}, got nothing; leave it out to use the Hub.")
        return dict(data or {})
    path = Path(data).expanduser()
    found = (
        {part.name.removesuffix("_val"): str(part) for part in sorted(path.iterdir()) if part.is_dir()}
        if path.is_dir()
        else {}
    )
    known = {name: place for name, place in found.items() if name in CLASSES}
    if not known:
        raise UsageError(
            f"Expected a folder with data sets ({', '.join(HUB)}) as subfolders, got {str(data)!r}; leave it out to "
            "use the Hub."
        )
    return known
