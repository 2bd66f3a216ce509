"""Images with a second, known feature: digits pasted onto them, independent of the class or correlated with it.

A layer v with mask m (a digit in grey values, with m where it is not black; or a square of one colour) is blended onto
the image, ``x · (1 - m) + m · ((1 - opacity) · x + opacity · v)``. Which digit, which way of writing it and where it
lies are a function of (seed, row).

- `DigitsOnImages`: two labels for each image, its class and its digit, independent of each other. With `DigitViews` the
  augmentation drops the digit from some views, so that training learns to ignore it.
- `SpuriousMixture`: two classes, and a digit or coloured patch that goes with the class in a given fraction of the
  images: the four groups of group robustness.

References:
    Xue, Gan, Ni, Joshi, Mirzasoleiman, "Investigating the Benefits of Projection Head for Representation Learning",
    ICLR 2024, arXiv 2403.11391 (MNIST on CIFAR-10, dropped digits).
    Sagawa, Koh, Hashimoto, Liang, "Distributionally Robust Neural Networks for Group Shifts", ICLR 2020 (groups).

Deviations: scikit-learn's 8×8 digits, which need no download, enlarged bilinearly, instead of MNIST. They take 5/8 of
the shorter side, as MNIST's 20 pixels of ink do on 32, and by default lie anywhere in the image, not in its middle.
"""

import operator
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from jaxtyping import Bool, Int64, UInt8
from PIL import Image
from torch import Tensor, nn

from hfproj.checking import checked
from hfproj.data.augment import Augmentation, Number
from hfproj.data.images import ImageViews
from hfproj.data.philox import uniforms
from hfproj.errors import UsageError, unknown
from hfproj.shifts.image_map import ImageMap, to_pil
from hfproj.typing import Data, OneOf

_DIGITS, _MIXTURE, _DROPS = 0xF000, 0xF001, 0xC000  # streams apart from those of views, which are numbered from 0
_PATCHES = ((217, 26, 26), (26, 166, 51))  # red and green
BACKGROUND = "background"
Place = OneOf["random", "center"]
Split = OneOf["train", "test"]  # of scikit-learn's digits


@lru_cache(maxsize=2)
def _digits(split: Split) -> tuple[np.ndarray, list[np.ndarray]]:
    """Return the images, uint8 [n, 8, 8], and for each class its rows."""
    from hfproj.data.datasets import load_image_dataset

    data = load_image_dataset("digits", split=split)
    labels = np.asarray(data["label"])
    return np.stack([np.asarray(image) for image in data["image"]]), [np.flatnonzero(labels == d) for d in range(10)]


def paste(
    image: UInt8[Tensor, "3 height width"],
    layer: UInt8[np.ndarray, "channels rows columns"],
    mask: Bool[np.ndarray, "rows columns"],
    top: int,
    left: int,
    opacity: Number,
) -> UInt8[Tensor, "3 height width"]:
    """Blend a layer (of 1 or 3 channels) onto the image where `mask` is true, its upper left corner at (top, left).

    Example:
        >>> black = torch.zeros(3, 2, 2, dtype=torch.uint8)
        >>> white = np.full((1, 1, 1), 255, dtype=np.uint8)
        >>> paste(black, white, white[0] > 0, 0, 1, 0.6)[0].tolist()
        [[0, 153], [0, 0]]
    """
    out = image.clone()
    part = out[:, top : top + mask.shape[0], left : left + mask.shape[1]]
    weight = torch.from_numpy(mask).float() * opacity
    part.copy_((part + weight * (torch.from_numpy(layer).float() - part)).round_())
    return out


class _Pasted(ImageMap):
    """The common part of the two data sets: where a layer lies and what the item becomes."""

    def __init__(
        self,
        images: Data,
        *,
        opacity: Number,
        size: int | None,
        place: Place,
        split: Split,
        seed: int,
        image_column: str,
        rows: Sequence[int] | None = None,
    ):
        super().__init__(images, image_column, rows)
        if not 0 <= opacity <= 1:
            raise UsageError(f"Expected opacity to be a number from 0 (invisible) to 1 (opaque), got {opacity}.")
        if size is not None and size < 1:
            raise UsageError(f"Expected size to be at least 1 pixel, or None for 5/8 of the shorter side, got {size}.")
        if place not in ("random", "center"):
            raise unknown("place", place, ("random", "center"))
        if split not in ("train", "test"):
            raise unknown("split of the digits:", split, ("train", "test"))
        self.opacity, self.size, self.place, self.split, self.seed = opacity, size, place, split, seed

    def _draw(self, rows: Sequence[int], stream: int) -> np.ndarray:
        """Return four uniform numbers for each row: class, way of writing, top, left."""
        index = np.asarray(rows, dtype=np.int64)
        return uniforms(4, seed=self.seed, epoch=np.zeros_like(index), index=index, view=stream)

    def _layer(
        self, item: dict[str, Any], u: np.ndarray, *, digit: int | None = None, colour: tuple[int, int, int] = (0, 0, 0)
    ) -> dict[str, Any]:
        image = self.read(item)
        height, width = image.shape[1:]
        size = max(1, round(5 / 8 * min(height, width))) if self.size is None else self.size
        if size > min(height, width):
            raise UsageError(f"A layer of size={size} does not fit an image of {height} × {width} pixels.")
        if digit is None:
            layer = np.broadcast_to(np.array(colour, dtype=np.uint8)[:, None, None], (3, size, size)).copy()
            mask = np.ones((size, size), dtype=bool)
        else:
            pixels, rows = _digits(self.split)
            shape = Image.fromarray(pixels[rows[digit][int(u[1] * len(rows[digit]))]])
            layer = np.array(shape.resize((size, size), Image.Resampling.BILINEAR))[None]
            mask = layer[0] > 0
        if self.place == "random":
            top, left = int(u[2] * (height - size + 1)), int(u[3] * (width - size + 1))
        else:
            top, left = (height - size) // 2, (width - size) // 2
        pasted = paste(image, layer, mask, top, left, self.opacity)
        return {**item, self.image_column: to_pil(pasted), BACKGROUND: to_pil(image)}


class DigitsOnImages(_Pasted):
    """Images with a digit blended onto each: the items also hold ``"digit_label"`` and ``"background"``.

    ``"background"`` is the image without its digit, which `DigitViews` shows in some views. Both labels are columns:
    ``hfproj.EvalImages(…, label_column="digit_label")`` reads the digit.

    Args:
        images: As in `hfproj.IndexedDataset`; the items hold an image.
        opacity: 0 (invisible) to 1 (opaque). 0.7: a reimplementation of the paper.
        size: Side of the digit in pixels; None: 5/8 of the image's shorter side.
        place: ``"random"``: anywhere in the image; ``"center"``.
        split: Which of scikit-learn's digits: ``"train"`` (1,200) or ``"test"`` (597, for the test images).
        seed: Decides digits and places.
        image_column: Entry of an item that holds the image.

    Raises:
        UsageError: If an option is out of range, or the data set has no length or no indices; on access, if the item
            has no image, or one that is smaller than the digit.

    Example:
        >>> grey = [{"image": np.full((32, 32), 99, dtype=np.uint8), "label": 7}] * 50
        >>> data = DigitsOnImages(grey, opacity=1.0)
        >>> data[3]["label"], data[3]["digit_label"] == data.digit_labels[3].item()
        (7, True)
        >>> np.asarray(data[3]["image"]).max(), np.asarray(data[3]["background"]).max()
        (np.uint8(255), np.uint8(99))
    """

    @checked
    def __init__(
        self,
        images: Data,
        *,
        opacity: Number = 0.7,
        size: int | None = None,
        place: Place = "random",
        split: Split = "train",
        seed: int = 0,
        image_column: str = "image",
    ):
        super().__init__(
            images, opacity=opacity, size=size, place=place, split=split, seed=seed, image_column=image_column
        )

    @property
    def digit_labels(self) -> Int64[Tensor, " images"]:
        """The digit of every image, without reading any."""
        return torch.from_numpy((self._draw(self.rows, _DIGITS)[:, 0] * 10).astype(np.int64))

    def change(self, item: dict[str, Any], row: int, index: int) -> dict[str, Any]:
        """Return the item with its digit."""
        u = self._draw([row], _DIGITS)[0]
        digit = int(u[0] * 10)
        return {**self._layer(item, u, digit=digit), "digit_label": digit}

    def __repr__(self) -> str:
        return (
            f"DigitsOnImages({len(self)} images, opacity={self.opacity}, size={self.size}, place={self.place!r}, "
            f"split={self.split!r}, seed={self.seed})"
        )


class DigitViews(ImageViews):
    """`hfproj.ImageViews` of `DigitsOnImages` or `SpuriousMixture` that drop the digit from some views.

    Each view is made from the item's ``"background"`` instead of its image with `drop_probability`, drawn for each
    (seed, epoch, index, view) apart from the crops: the same seed gives the same crops at every probability. Two views
    disagree about the digit with probability 2p(1 - p).

    Args:
        drop_probability: p, from 0 (as `ImageViews`) to 1 (no digit anywhere).
        options: Of `ImageViews`.

    Raises:
        UsageError: If the probability is outside [0, 1], or as `ImageViews`; on call, if an item has no
            ``"background"``.

    Example:
        >>> grey = [{"image": np.full((8, 8), 99, dtype=np.uint8)}] * 4
        >>> items = [{**item, "index": i} for i, item in enumerate(DigitsOnImages(grey))]
        >>> views = DigitViews(drop_probability=1, size=8, mean=(0, 0, 0), std=(1, 1, 1), color_jitter_probability=0)
        >>> round(float(views(items)["views"][0].max()) * 255)
        99
    """

    @checked
    def __init__(self, *, drop_probability: Number = 0.5, **options: Any):
        super().__init__(**options)
        if not 0 <= drop_probability <= 1:
            raise UsageError(f"Expected drop_probability to be a number from 0 to 1, got {drop_probability}.")
        self.drop_probability = drop_probability
        dropping: list[Any] = [_Dropping(augmentation, drop_probability) for augmentation in self.augmentations]
        self.augmentations = dropping

    if TYPE_CHECKING:  # with more options than its parent's

        @classmethod
        def for_model(cls, model: nn.Module, **options: Any) -> "DigitViews":
            """Return views with size, mean and std of the model's own preprocessing."""

    def _read(self, items: Sequence[dict]) -> list[Any]:
        """Return (image, background) of each item; `_Dropping` chooses for each view."""
        for item in items:
            if BACKGROUND not in item:
                raise UsageError(
                    f"DigitViews expected items with {BACKGROUND!r}, the image without its digit, got one with "
                    f"{', '.join(map(repr, item))}; wrap the images in hfproj.studies.DigitsOnImages."
                )
        backgrounds = [{**item, self.image_column: item[BACKGROUND]} for item in items]
        return list(zip(super()._read(items), super()._read(backgrounds)))


@dataclass(frozen=True)
class _Dropping:
    """An augmentation of (image, background) pairs that takes one of the two first."""

    augmentation: Augmentation
    probability: Number

    def __call__(
        self, pairs: Sequence[tuple[Tensor, Tensor]], *, size: int, seed: int, epoch: Any, index: Any, view: int
    ) -> Tensor:
        indices = np.asarray(index, dtype=np.int64)
        epochs = np.broadcast_to(np.asarray(epoch, dtype=np.int64), indices.shape)
        u = uniforms(1, seed=seed, epoch=epochs, index=indices, view=_DROPS + view)[:, 0]
        images = [pair[int(dropped)] for pair, dropped in zip(pairs, u < self.probability)]
        return self.augmentation(images, size=size, seed=seed, epoch=epoch, index=index, view=view)


class SpuriousMixture(_Pasted):
    """Two classes of a data set, with a digit or patch that goes with the class in a given fraction of the images.

    The items hold ``"label"`` (0 or 1, the first or second of `classes`), ``"attribute"`` (0 or 1, the first or second
    digit or colour), ``"group"`` (2 · label + attribute) and ``"background"`` (the image without attribute). Of the n
    images of a class exactly ``floor(correlation · n + 1/2)``, drawn by `seed`, have the attribute of their class.
    Take the correlation of the training set high and that of the test set 0.5, where the attribute says nothing.

    Args:
        images: Labelled images, as in `hfproj.IndexedDataset`.
        classes: The two classes, numbers or names.
        attribute: ``"digit"``: one of `digits`; ``"patch"``: a red or green square.
        digits: The two digits.
        correlation: Fraction of the images of a class that have its own attribute, 0 to 1.
        opacity: As in `DigitsOnImages`.
        size: As in `DigitsOnImages`.
        place: As in `DigitsOnImages`.
        split: As in `DigitsOnImages`.
        seed: Decides which image has which attribute, and the ways of writing and the places.
        image_column: Entry of an item that holds the image.
        label_column: Entry that holds the class number.

    Raises:
        UsageError: If an option is out of range, a class does not exist, both are the same, or the labels are no
            class numbers; on access as `DigitsOnImages`.

    Example:
        >>> grey = [{"image": np.full((8, 8), 99, dtype=np.uint8), "label": i % 4} for i in range(80)]
        >>> data = SpuriousMixture(grey, classes=(1, 3), correlation=0.9)
        >>> len(data), data.group_counts
        (40, [18, 2, 2, 18])
    """

    @checked
    def __init__(
        self,
        images: Data,
        *,
        classes: tuple[int | str, int | str],
        attribute: OneOf["digit", "patch"] = "digit",
        digits: tuple[int, int] = (0, 1),
        correlation: Number = 0.95,
        opacity: Number = 0.7,
        size: int | None = None,
        place: Place = "random",
        split: Split = "train",
        seed: int = 0,
        image_column: str = "image",
        label_column: str = "label",
    ):
        super().__init__(
            images, opacity=opacity, size=size, place=place, split=split, seed=seed, image_column=image_column
        )
        if attribute not in ("digit", "patch"):
            raise unknown("attribute", attribute, ("digit", "patch"))
        if len(digits) != 2 or digits[0] == digits[1] or not all(d in range(10) for d in digits):
            raise UsageError(f"Expected digits to be two different digits from 0 to 9, got {digits}.")
        if not 0 <= correlation <= 1:
            raise UsageError(f"Expected correlation to be a fraction of the images, from 0 to 1, got {correlation}.")
        self.attribute, self.digits, self.correlation, self.label_column = attribute, digits, correlation, label_column
        labels = _class_numbers(images, label_column)
        self.classes = _two_classes(images, label_column, classes, labels)
        chosen = np.flatnonzero(np.isin(labels, self.classes))
        self.rows = chosen.tolist()
        own = (labels[chosen] == self.classes[1]).astype(np.int64)
        order = self._draw(self.rows, _MIXTURE)[:, 0].argsort(kind="stable")
        attributes = 1 - own
        for label in (0, 1):
            members = order[own[order] == label]
            attributes[members[: int(correlation * len(members) + 0.5)]] = label
        self._labels, self._attributes = own, attributes

    @property
    def groups(self) -> Int64[Tensor, " images"]:
        """The group of every image, 2 · label + attribute."""
        return torch.from_numpy(2 * self._labels + self._attributes)

    @property
    def group_counts(self) -> list[int]:
        """Images in the groups 0 to 3: (label, attribute) = (0, 0), (0, 1), (1, 0), (1, 1)."""
        return self.groups.bincount(minlength=4).tolist()

    def change(self, item: dict[str, Any], row: int, index: int) -> dict[str, Any]:
        """Return the item with its attribute, label, attribute and group."""
        label, attribute = int(self._labels[index]), int(self._attributes[index])
        u = self._draw([row], _DIGITS)[0]
        if self.attribute == "digit":
            item = self._layer(item, u, digit=self.digits[attribute])
        else:
            item = self._layer(item, u, colour=_PATCHES[attribute])
        return {**item, "label": label, "attribute": attribute, "group": 2 * label + attribute}

    def __repr__(self) -> str:
        return (
            f"SpuriousMixture({len(self)} images, classes={self.classes}, attribute={self.attribute!r}, "
            f"correlation={self.correlation}, group_counts={self.group_counts}, seed={self.seed})"
        )


def _class_numbers(images: Any, column: str) -> np.ndarray:
    if column in (getattr(images, "column_names", None) or ()):
        values = images[column]  # a column of a datasets.Dataset, without decoding its images
    else:
        from hfproj.data.indexing import as_item

        values = [as_item(images[i]).get(column) for i in range(len(images))]
    try:
        return np.array([operator.index(value) for value in values], dtype=np.int64)
    except TypeError:
        raise UsageError(
            f"Expected class numbers in {column!r}, got {values[0]!r}; name another label_column."
        ) from None


def _two_classes(images: Any, column: str, classes: Sequence[int | str], labels: np.ndarray) -> tuple[int, int]:
    names = getattr((getattr(images, "features", None) or {}).get(column), "names", None) or []
    numbers = []
    for value in classes:
        if isinstance(value, str):
            if value not in names:
                raise unknown("class", value, names)
            value = names.index(value)
        numbers.append(int(value))
    there = set(labels.tolist())
    if len(numbers) != 2 or numbers[0] == numbers[1] or not there.issuperset(numbers):
        raise UsageError(
            f"Expected classes to be two different classes of the images, got {tuple(classes)}; "
            f"the images have {', '.join(map(str, sorted(there)[:20]))}."
        )
    return numbers[0], numbers[1]
