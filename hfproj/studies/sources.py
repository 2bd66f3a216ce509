"""Where images of the papers' studies come from, beside plain data sets: coarse labels, digits, mixtures, tasks."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import datasets
import torch
from torch import nn

from hfproj.data import ImageViews, load_image_dataset
from hfproj.reproduction.sources import CLASSES, HUB, Source, Splits, labels_of
from hfproj.shifts.coarse import coarse_labels
from hfproj.shifts.composites import DigitsOnImages, DigitViews, SpuriousMixture


@dataclass(frozen=True)
class CoarseToFine(Source):
    """CIFAR-100 that shows its 20 superclasses to the training, with labels "coarse" and "fine" for the probes."""

    images: str = "cifar100"
    train_labels: str = "coarse"

    def splits(self, train: datasets.Dataset, test: datasets.Dataset) -> Splits:
        """Return the images with both labels."""
        fine = labels_of(train, test)
        coarse = (coarse_labels(fine[0]), coarse_labels(fine[1]))
        train, test = (p.add_column("coarse", y.tolist()) for p, y in zip((train, test), coarse, strict=True))
        return Splits(train, test, {"fine": fine, "coarse": coarse})


@dataclass(frozen=True)
class Digits(Source):
    """Images with a digit on each, which views lose with a probability: labels "class" and "digit".

    Args:
        drop_probability: Of a view without its digit.
        opacity, size, place: As in `hfproj.studies.DigitsOnImages`.
    """

    drop_probability: float = 0.0
    opacity: float = 0.7
    size: int | None = 28
    place: str = "center"

    def splits(self, train: datasets.Dataset, test: datasets.Dataset) -> Splits:
        """Return the images with their digits."""
        pasted = {
            split: DigitsOnImages(images, opacity=self.opacity, size=self.size, place=self.place, split=split)  # type: ignore[arg-type]
            for split, images in (("train", train), ("test", test))
        }
        label = labels_of(train, test)
        digit = (pasted["train"].digit_labels, pasted["test"].digit_labels)
        return Splits(pasted["train"], pasted["test"], {"class": label, "digit": digit})

    def views(self, model: nn.Module, **options: Any) -> ImageViews:
        """Return views, of which some have no digit."""
        return DigitViews.for_model(
            model, drop_probability=self.drop_probability, label_column=self.train_labels, **options
        )


@dataclass(frozen=True)
class Mixture(Source):
    """Two classes with a digit that goes with the class in most training images and says nothing in the test images.

    Labels "class" and "group" (2 · class + digit).

    Args:
        classes: Two class numbers.
        correlation: Fraction of the training images of a class that have its digit.
        opacity, size: As in `hfproj.studies.SpuriousMixture`.
    """

    classes: tuple[int, int] = (3, 5)  # cat and dog
    correlation: float = 0.95
    opacity: float = 0.7
    size: int | None = None

    def splits(self, train: datasets.Dataset, test: datasets.Dataset) -> Splits:
        """Return the mixtures."""
        options: dict[str, Any] = {"classes": self.classes, "opacity": self.opacity, "size": self.size}
        bank = SpuriousMixture(train, correlation=self.correlation, split="train", **options)
        held_out = SpuriousMixture(test, correlation=0.5, split="test", **options)
        group = (bank.groups, held_out.groups)
        return Splits(bank, held_out, {"class": (group[0] // 2, group[1] // 2), "group": group})

    def views(self, model: nn.Module, **options: Any) -> ImageViews:
        """Return views with the attribute in all of them."""
        return ImageViews.for_model(model, label_column=self.train_labels, **options)


@dataclass(frozen=True)
class Tasks(Source):
    """The classes of a data set in several tasks, which are trained one after the other; labels "class" and "task".

    Args:
        tasks: Into how many the classes are divided, in the order of their numbers.
    """

    tasks: int = 2

    def splits(self, train: datasets.Dataset, test: datasets.Dataset) -> Splits:
        """Return the images; those of each task in `Splits.phases`."""
        label = labels_of(train, test)
        per_task = -(-CLASSES[self.images] // self.tasks)
        task = (label[0] // per_task, label[1] // per_task)
        phases = tuple(train.select((task[0] == number).nonzero().flatten().tolist()) for number in range(self.tasks))
        first = tuple(torch.where(t == 0, y, -1) for t, y in zip(task, label))
        return Splits(train, test, {"class": label, "task": task, "first task": first}, phases)  # type: ignore[dict-item]


@dataclass(frozen=True)
class Transfer(Source):
    """Images with further labelled data sets that the training does not see, for probes: `Splits.others`.

    Args:
        to: Names of data sets; "digits" are scikit-learn's.
        bank, held_out: At most so many images of each.
    """

    to: tuple[str, ...] = field(default=("cifar100", "tiny_imagenet", "digits", "digits on images"))
    bank: int = 4_000
    held_out: int = 2_000

    def load(self, places: Mapping[str, str], images: int | None, test_images: int | None) -> Splits:
        """Return the images with the others."""
        own = super().load(places, images, test_images)
        others = {name: self._other(name, own, places) for name in self.to}
        return Splits(own.train, own.test, own.labels, others=others)

    def synthetic(self, rows: int) -> Splits:
        """Return random images, with themselves as the others."""
        own = super().synthetic(rows)
        return Splits(own.train, own.test, own.labels, others=dict.fromkeys(self.to, own))

    def _other(self, name: str, own: Splits, places: Mapping[str, str]) -> Splits:
        if name == "digits on images":
            made = Digits(self.images).splits(own.train, own.test)
            return Splits(made.train, made.test, {"label": made.labels["digit"]})
        place = places.get(name) or HUB.get(name, name)
        source = Source(name)
        train = load_image_dataset(place, split="train", limit=self.bank)
        return source.splits(train, load_image_dataset(place, split=source.test_split(place), limit=self.held_out))
