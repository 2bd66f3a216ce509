"""Each transform of a view alone, at two typical strengths: what a representation still says of it can be asked.

A transform whose strength is drawn from a range is shown at the medians of the lower and the upper half of that range,
one that happens or not without and with it:

| transform | first | second |
|---|---|---|
| crop | the centre, an area of low + ¾ (high − low) | of low + ¼ (high − low) |
| brightness, contrast, saturation | factor: the quarter of its range | its three quarters |
| hue, rotation, shift | −½ of the strength | +½ of it |
| flip, grey, solarization | without | with |
| blur | without | with the middle σ of its range |

Everything else of the image is that of its central square.

Deviations:
    Of augmentations that differ from view to view (BYOL's two) each transform has the widest range of all.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from hfproj.checking import checked
from hfproj.data import image_ops as ops
from hfproj.data.augment import Augmentation, Number
from hfproj.data.images import ImageViews
from hfproj.data.indexing import index_and_labels
from hfproj.errors import UsageError, check_type, unknown

_COLOURS = ("saturation", "hue", "grey", "solarization")  # operations on red, green and blue

Operation = Callable[[Tensor], Tensor]  # of images [batch, channels, size, size] in [0, 1]


@dataclass(frozen=True)
class Transform:
    """A transform at two strengths: `ends` says them in words, first and second.

    Example:
        >>> views = ImageViews(size=8, mean=(0.5,) * 3, std=(0.5,) * 3, rotation_degrees=30)
        >>> transforms_of(views)["rotation"].ends
        ('−15°', '+15°')
    """

    ends: tuple[str, str]
    operations: tuple[Operation, Operation]


@checked
def transforms_of(views: ImageViews) -> dict[str, Transform]:
    """Return every transform that is part of the global views, by name, in the order in which views are made.

    Raises:
        UsageError: If `views` is no `ImageViews`.

    Example:
        >>> views = ImageViews(size=8, mean=(0.5,) * 3, std=(0.5,) * 3, scale=None, color_jitter_probability=0)
        >>> list(transforms_of(views))  # blur is off at 64 pixels and below
        ['flip', 'grey']
    """
    check_type("views", views, ImageViews, "make it by hfproj.ImageViews.for_model(model, …)")
    found: dict[str, tuple[Number, Transform]] = {}
    for augmentation in views.augmentations[: views.num_views]:
        for name, (strength, transform) in _transforms(augmentation, views.size).items():
            if (name not in _COLOURS or len(views.mean) == 3) and strength > found.get(name, (0,))[0]:
                found[name] = (strength, transform)
    return {name: found[name][1] for name in _ORDER if name in found}


_ORDER = (
    "crop", "flip", "rotation", "shift", "brightness", "contrast", "saturation", "hue", "grey", "blur", "solarization",
)  # fmt: skip


def _transforms(a: Augmentation, size: int) -> dict[str, tuple[Number, Transform]]:
    """Return name → (how strong, the transform at its two ends) of the parts of an augmentation that are on."""
    jitter = (a.color_jitter_strength or 0) * bool(a.color_jitter_probability)
    blurs = (0.5 if size > 64 else 0) if a.blur_probability == "auto" else (a.blur_probability or 0)
    sigma, kernel = sum(a.blur_sigma) / 2, 2 * max(size // 20, 1) + 1
    shift = round((a.translation or 0) * size)
    found = {
        "rotation": _either_way(a.rotation_degrees or 0, "°", _rotate), "shift": _either_way(shift, " pixels", _shift),
        "hue": _either_way((a.hue or 0) * jitter, " turns", ops.adjust_hue),
        "flip": _on_or_off(a.flip_probability or 0, _flip),
        "grey": _on_or_off(a.grayscale_probability or 0, _grey),
        "blur": _on_or_off(blurs, partial(_blur, sigma, kernel), f"σ = {sigma:.3g} pixels"),
        "solarization": _on_or_off(a.solarize_probability or 0, partial(ops.solarize, threshold=0.5)),
    }  # fmt: skip
    for name in ("brightness", "contrast", "saturation"):
        reach = (getattr(a, name) or 0) * jitter
        low, high = max(0.0, 1 - reach), 1 + reach
        factors = [low + part * (high - low) for part in (0.25, 0.75)]
        first, second = (partial(_with, getattr(ops, f"adjust_{name}"), factor) for factor in factors)
        found[name] = reach, Transform((f"×{factors[0]:.3g}", f"×{factors[1]:.3g}"), (first, second))
    if a.scale is not None:
        large, small = (a.scale[0] + part * (a.scale[1] - a.scale[0]) for part in (0.75, 0.25))
        ends = f"{large:.0%} of the area", f"{small:.0%} of the area"
        found["crop"] = a.scale[1] - a.scale[0], Transform(ends, (partial(_crop, large), partial(_crop, small)))
    return found


def _either_way(reach: Number, unit: str, operation: Callable[[Tensor, Tensor], Tensor]) -> tuple[Number, Transform]:
    half = reach / 2
    low, high = (partial(_with, operation, value) for value in (-half, half))
    return reach, Transform((f"−{half:.3g}{unit}", f"+{half:.3g}{unit}"), (low, high))


def _on_or_off(chance: Number, operation: Operation, how: str = "with") -> tuple[Number, Transform]:
    return chance, Transform(("without", how), (_nothing, operation))


def _with(operation: Callable[[Tensor, Tensor], Tensor], value: Number, x: Tensor) -> Tensor:
    return operation(x, x.new_full((len(x),), value))


def _nothing(x: Tensor) -> Tensor:
    return x


def _flip(x: Tensor) -> Tensor:
    return x.flip(-1)


def _grey(x: Tensor) -> Tensor:
    return ops.grayscale(x).contiguous()


def _rotate(x: Tensor, degrees: Tensor) -> Tensor:
    return ops.rotate_translate(x, degrees, 0 * degrees, 0 * degrees)


def _shift(x: Tensor, pixels: Tensor) -> Tensor:
    return ops.rotate_translate(x, 0 * pixels, pixels, 0 * pixels)


def _blur(sigma: Number, kernel: int, x: Tensor) -> Tensor:
    return ops.gaussian_blur(x, x.new_full((len(x),), sigma), kernel)


def _crop(area: Number, x: Tensor) -> Tensor:
    size = x.shape[-1]
    side = min(size, max(1, round(size * area**0.5)))
    start = torch.full((len(x),), (size - side) // 2)
    return ops.resized_crop(x, start, start, start * 0 + side, start * 0 + side, size)


class TransformedImages:
    """Collator of images with one transform of the views at one of its two strengths: no randomness, as `EvalImages`.

    Args:
        views: Where size, mean, std, columns and transforms come from.
        transform: A name of `transforms_of(views)`.
        end: 0, the first strength, or 1, the second.

    Raises:
        UsageError: If the views have no such transform, or `end` is neither.

    Example:
        >>> views = ImageViews(size=2, mean=(0.0,) * 3, std=(1.0,) * 3)
        >>> image = torch.tensor([[0.0, 1.0], [0.0, 1.0]]).expand(3, 2, 2)
        >>> TransformedImages(views, "flip", 1)([{"image": image}])["pixel_values"][0, 0, 0].tolist()
        [1.0, 0.0]
    """

    @checked
    def __init__(self, views: ImageViews, transform: str, end: int):
        known = transforms_of(views)
        if transform not in known:
            raise unknown("transform of the views", transform, known)
        if end not in (0, 1):
            raise UsageError(f"Expected end to be 0 (the first strength) or 1 (the second), got {end}.")
        self.views, self.transform, self.end = views, transform, end
        self._operation = known[transform].operations[end]
        self._size = views.size

    @property
    def cache_key(self) -> str:
        """What the pixels depend on, for caches of features."""
        views = self.views
        read = [views.image_column, views.label_column, views.size, views.flip_channels]
        return repr([*read, views.mean.tolist(), views.std.tolist(), self.transform, self.end, views.augmentations])

    @property
    def label_column(self) -> str | None:
        """The column that labels are read from."""
        return self.views.label_column

    @torch.no_grad()
    def __call__(self, items: Sequence[dict]) -> dict[str, Any]:
        """Return ``{"pixel_values", "index"?, "labels"?}`` of `items`."""
        images = self.views._read(items)
        plain = Augmentation.none()(images, size=self._size, index=[0] * len(images))
        x = self.views._normalized(self._operation(plain).clone())
        return {"pixel_values": x, **index_and_labels(items, self.views.label_column)}
