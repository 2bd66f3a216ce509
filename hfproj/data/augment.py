"""SimCLR's augmentation, with all randomness a function of (seed, epoch, sample index, view).

Order: random resized crop, flip, rotation and shift, colour jitter, greyscale, blur, solarization. Operations and their
distributions are torchvision's (``RandomResizedCrop``, ``ColorJitter``, …); SimCLR's strengths are the defaults.

References:
    Chen et al. 2020, "SimCLR", arXiv 2002.05709, appendix A; Grill et al. 2020, "BYOL", arXiv 2006.07733, appendix B
    (solarization).

Deviations:
    The crop is resized bilinearly with antialiasing (SimCLR's TensorFlow code: bicubic); images stay in floating point
    after loading; blur is off at 64 pixels and below, as in SimCLR's CIFAR-10 experiments (appendix B.9).

Why not torchvision: its transforms draw from global generators, so that a view depends on worker, rank and order, and
have one set of parameters per call. Image by image, crop, flip, jitter and greyscale of 256 images of 32 pixels take
636 ms of one core; here, with each image's own draws over the whole batch, all parts take 70 ms.
"""

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from hfproj.checking import check_types, checked
from hfproj.data import image_ops as ops
from hfproj.data.philox import uniforms
from hfproj.errors import UsageError

Number = float | int

# Columns of the uniform numbers of one view; fixed, so that switching one part off leaves the others as they were.
_FLIP, _JITTER, _GRAY, _BLUR, _SIGMA, _SOLARIZE, _ROTATION, _SHIFT_X, _SHIFT_Y = range(9)
_FACTORS, _ORDER, _CROP = slice(9, 13), slice(13, 17), slice(20, 60)
_DRAWS = 60
_CHUNK = 64  # images at a time: their intermediate results stay in the cache at 32 pixels; results do not depend on it
_JITTERS = ("brightness", "contrast", "saturation", "hue")  # in the order of their factors' columns


@dataclass(frozen=True, kw_only=True)
class Augmentation:
    """What happens to an image to make a view; each part is off at None or 0.

    Args:
        scale: Fraction of the image's area that the crop takes, (low, high). None: the central square, no random crop.
        ratio: Range of the crop's aspect ratio (width / height).
        flip_probability: Of the horizontal flip.
        color_jitter_probability: Of the jitter as a whole.
        color_jitter_strength: Multiplies the four strengths.
        brightness, contrast, saturation: The factor is uniform in [max(0, 1 - b), 1 + b].
        hue: The turn is uniform in [-hue, hue]; at most 0.5 after multiplication.
        grayscale_probability: Of losing all colour.
        blur_probability: Of a Gaussian blur whose kernel is about a tenth of the image. ``"auto"``: 0.5 where the size
            is above 64 pixels, else off.
        blur_sigma: Range of its standard deviation in pixels.
        solarize_probability: Of inverting the values from 0.5 up.
        rotation_degrees: The angle is uniform in [-r, r].
        translation: The shift is uniform in [-t, t], as a fraction of the size, in whole pixels.

    Raises:
        UsageError: If a probability is outside [0, 1], a strength negative, a range empty or the hue above 0.5.

    Example (all parts off at the image's own size: the image):
        >>> off = Augmentation.none()
        >>> x = torch.rand(3, 8, 8)
        >>> torch.allclose(off([x], size=8, epoch=0, index=[5], view=1)[0], x, atol=1e-6)
        True
    """

    scale: tuple[Number, Number] | None = (0.08, 1.0)
    ratio: tuple[Number, Number] = (3 / 4, 4 / 3)
    flip_probability: Number | None = 0.5
    color_jitter_probability: Number | None = 0.8
    color_jitter_strength: Number | None = 1.0
    brightness: Number | None = 0.8
    contrast: Number | None = 0.8
    saturation: Number | None = 0.8
    hue: Number | None = 0.2
    grayscale_probability: Number | None = 0.2
    blur_probability: Number | Literal["auto"] | None = "auto"
    blur_sigma: tuple[Number, Number] = (0.1, 2.0)
    solarize_probability: Number | None = 0.0
    rotation_degrees: Number | None = 0.0
    translation: Number | None = 0.0

    @classmethod
    def none(cls, **options: Any) -> "Augmentation":
        """Return an augmentation with all parts off but those given."""
        parts = ("flip", "color_jitter", "grayscale", "blur", "solarize")
        off = dict.fromkeys(["scale", "rotation_degrees", "translation", *(f"{part}_probability" for part in parts)])
        return cls(**{**off, **options})

    def __post_init__(self) -> None:
        check_types(type(self).__name__, type(self).__init__, vars(self))

        def require(holds: bool, name: str, wanted: str, value: object) -> None:
            if not holds:
                raise UsageError(f"Expected {name} to be {wanted}, got {value}.")

        for part in ("flip", "color_jitter", "grayscale", "blur", "solarize"):
            value = getattr(self, name := f"{part}_probability")
            known = value is None or (value == "auto" and part == "blur")
            require(known or (value != "auto" and 0 <= value <= 1), name, "from 0 to 1 (None for off)", value)
        for name in ("color_jitter_strength", "brightness", "contrast", "saturation", "hue", "rotation_degrees"):
            value = getattr(self, name)
            require((value or 0) >= 0, name, "at least 0 (0 or None for off)", value)
        for name in ("scale", "ratio", "blur_sigma"):
            pair = getattr(self, name)
            off = pair is None and name == "scale"
            require(off or 0 < pair[0] <= pair[1], name, "(low, high) with 0 < low ≤ high", pair)
        require(self.scale is None or self.scale[1] <= 1, "scale", "a fraction of the area, at most 1", self.scale)
        require(0 <= (self.translation or 0) < 1, "translation", "a fraction of the size below 1", self.translation)
        hue = (self.hue or 0) * (self.color_jitter_strength or 0)
        require(hue <= 0.5, "hue · color_jitter_strength", "at most 0.5 (half a turn either way is every hue)", hue)

    @checked
    def __call__(
        self, images: Sequence[Tensor], *, size: int, seed: int = 0, epoch: int | Sequence[int] = 0,
        index: Sequence[int], view: int = 0,
    ) -> Float[Tensor, "batch channels {size} {size}"]:  # fmt: skip
        """Return one view of each image, in [0, 1].

        Args:
            images: Tensors [channels, height, width], uint8 or float in [0, 1], of any sizes; all on one device, where
                the views are made from the same draws as on any other. Of other than three channels the parts that
                `for_colour` names are left out, and contrast is about the mean over all channels.
            size: Side of the views in pixels.
            seed: Seed of the run.
            epoch: One for all, or one per image.
            index: Number of each image in the data set.
            view: Number of the view.

        Raises:
            UsageError: If a tensor is no image, or the numbers of channels differ.
        """
        channels = len(images[0]) if len(images) and images[0].ndim else 3
        for image in images:
            if image.ndim != 3 or len(image) != channels or not (
                image.dtype == torch.uint8 or image.is_floating_point()
            ):  # fmt: skip
                given = f"got {list(image.shape)} of {image.dtype}; hfproj.data.to_rgb_tensor makes one of any image"
                raise UsageError(f"Expected images [{channels}, height, width], uint8 or float in [0, 1], {given}.")
        if size < 1 or view < 0 or any(not image.numel() for image in images):
            raise UsageError(
                f"Expected size of at least 1 and view of at least 0, images with pixels, got {size=}, {view=}."
            )
        try:
            indices = np.asarray(index, dtype=np.int64).reshape(len(images))
            epochs = np.broadcast_to(np.asarray(epoch, dtype=np.int64), indices.shape)
        except (TypeError, ValueError, OverflowError, RuntimeError):
            raise UsageError(f"Expected one index and epoch for each of {len(images)} images, whole numbers.") from None
        draws = uniforms(_DRAWS, seed=seed, epoch=epochs, index=indices, view=view)
        out = torch.empty(len(images), channels, size, size, device=images[0].device if len(images) else None)
        for start in range(0, len(images), _CHUNK):
            part = slice(start, start + _CHUNK)
            out[part] = self._views(images[part], draws[part], size)
        return out

    def for_colour(self) -> list[str]:
        """Return the parts that are on and have a meaning for red, green and blue alone.

        Example:
            >>> Augmentation(grayscale_probability=0).for_colour()
            ['saturation', 'hue']
        """
        jitters = (self.color_jitter_probability or 0) * (self.color_jitter_strength or 0)
        on = [name for name in ("saturation", "hue") if jitters * (getattr(self, name) or 0)]
        return on + [name for name in ("grayscale_probability", "solarize_probability") if getattr(self, name)]

    def _views(self, images: Sequence[Tensor], u: np.ndarray, size: int) -> Tensor:
        x = self._crop(images, u, size)
        _apply(x, u[:, _FLIP] < (self.flip_probability or 0), lambda part, rows: part.flip(-1))
        if self.rotation_degrees or self.translation:
            x = self._move(x, u, size)
        grey, solarize = (
            (p or 0) if x.shape[1] == 3 else 0 for p in (self.grayscale_probability, self.solarize_probability)
        )
        self._jitter(x, u)
        _apply(x, u[:, _GRAY] < grey, lambda part, rows: ops.grayscale(part))
        blur = (0.5 if size > 64 else 0) if self.blur_probability == "auto" else (self.blur_probability or 0)
        # SimCLR's kernel: a radius of size // 10 // 2 either side of the centre.
        kernel_size = 2 * max(size // 20, 1) + 1
        sigma = _between(u[:, _SIGMA], *self.blur_sigma)
        _apply(x, u[:, _BLUR] < blur, lambda part, rows: ops.gaussian_blur(part, _f32(sigma[rows], part), kernel_size))
        _apply(x, u[:, _SOLARIZE] < solarize, lambda part, rows: ops.solarize(part, 0.5))
        return x

    def _crop(self, images: Sequence[Tensor], u: np.ndarray, size: int) -> Tensor:
        heights, widths = (np.array([image.shape[dim] for image in images]) for dim in (1, 2))
        if self.scale is None:
            side = np.minimum(heights, widths)
            boxes = np.stack(((heights - side) // 2, (widths - side) // 2, side, side))
        else:
            boxes = crop_boxes(u[:, _CROP], heights, widths, scale=self.scale, ratio=self.ratio)
        groups: dict[tuple, list[int]] = {}
        for row, image in enumerate(images):
            groups.setdefault((image.dtype, image.shape), []).append(row)
        out = torch.empty(len(images), len(images[0]), size, size, device=images[0].device)
        for rows in groups.values():
            x = torch.stack([images[row] for row in rows])
            x = x.float() if x.is_floating_point() else x.float().div_(255)
            top, left, height, width = torch.from_numpy(boxes[:, rows]).to(x.device)
            out.index_copy_(0, torch.tensor(rows, device=x.device), ops.resized_crop(x, top, left, height, width, size))
        return out

    def _move(self, x: Tensor, u: np.ndarray, size: int) -> Tensor:
        reach, turn = (self.translation or 0) * size, self.rotation_degrees or 0
        shift_x, shift_y = (np.rint(_between(u[:, column], -reach, reach)) for column in (_SHIFT_X, _SHIFT_Y))
        degrees = _between(u[:, _ROTATION], -turn, turn)
        return ops.rotate_translate(x, _f32(degrees, x), _f32(shift_x, x), _f32(shift_y, x))

    def _jitter(self, x: Tensor, u: np.ndarray) -> None:
        chosen = u[:, _JITTER] < (self.color_jitter_probability or 0)
        order = np.argsort(u[:, _ORDER], axis=1)
        for turn in range(4):
            for number, name in enumerate(_JITTERS):
                strength = (getattr(self, name) or 0) * (self.color_jitter_strength or 0)
                if not strength or (x.shape[1] != 3 and name in ("saturation", "hue")):
                    continue
                low, high = (-strength, strength) if name == "hue" else (max(0, 1 - strength), 1 + strength)
                factor = _between(u[:, _FACTORS][:, number], low, high)
                adjust = functools.partial(_adjust, getattr(ops, f"adjust_{name}"), factor)
                _apply(x, chosen & (order[:, turn] == number), adjust)


def crop_boxes(
    u: Float[np.ndarray, "batch 40"], heights: Int[np.ndarray, " batch"], widths: Int[np.ndarray, " batch"], *,
    scale: tuple[Number, Number], ratio: tuple[Number, Number],
) -> Int[np.ndarray, "4 batch"]:  # fmt: skip
    """Return the rectangles of a random resized crop, rows (top, left, height, width).

    Ten tries of area ~ U(scale) · height · width and log aspect ~ U(log ratio); the first that fits is placed
    uniformly. If none fits, the largest central rectangle with an aspect in `ratio` is taken, as in torchvision. `u`
    has 10 uniform numbers each for area, aspect, top and left; `scale` is (low, high) of the fraction of the area,
    `ratio` of width / height.

    Example:
        >>> crop_boxes(np.full((1, 40), 0.5), np.array([8]), np.array([8]), scale=(1, 1), ratio=(1, 1)).tolist()
        [[0], [0], [8], [8]]
    """
    area, aspect, top, left = np.split(u, 4, axis=1)
    area = _between(area, *scale) * (heights * widths)[:, None]
    aspect = np.exp(_between(aspect, np.log(ratio[0]), np.log(ratio[1])))
    width = np.rint(np.sqrt(area * aspect)).astype(np.int64)
    height = np.rint(np.sqrt(area / aspect)).astype(np.int64)
    fits = (width > 0) & (width <= widths[:, None]) & (height > 0) & (height <= heights[:, None])
    first = np.argmax(fits, axis=1)
    rows = np.arange(len(u))
    width, height, top, left = width[rows, first], height[rows, first], top[rows, first], left[rows, first]
    top = np.floor(top * (heights - height + 1)).astype(np.int64)
    left = np.floor(left * (widths - width + 1)).astype(np.int64)
    if not (found := fits.any(axis=1)).all():
        whole = widths / heights
        fall_height = np.where(whole < ratio[0], np.rint(widths / ratio[0]), heights).astype(np.int64)
        fall_width = np.where(whole > ratio[1], np.rint(heights * ratio[1]), widths).astype(np.int64)
        height, width = np.where(found, height, fall_height), np.where(found, width, fall_width)
        top = np.where(found, top, (heights - fall_height) // 2)
        left = np.where(found, left, (widths - fall_width) // 2)
    return np.stack((top, left, height, width))


def _apply(x: Tensor, mask: np.ndarray, operation: Callable[[Tensor, np.ndarray], Tensor]) -> None:
    """Replace the images of `x` that are in `mask` by ``operation(those images, their rows)``."""
    rows = np.flatnonzero(mask)
    if len(rows):
        at = torch.from_numpy(rows).to(x.device)
        x.index_copy_(0, at, operation(x.index_select(0, at), rows))


def _adjust(jitter: Callable[[Tensor, Tensor], Tensor], factor: np.ndarray, part: Tensor, rows: np.ndarray) -> Tensor:
    return jitter(part, _f32(factor[rows], part))


def _between(u: np.ndarray, low: Number, high: Number) -> np.ndarray:
    return low + u * (high - low)


def _f32(values: np.ndarray, like: Tensor) -> Tensor:
    return torch.from_numpy(values.astype(np.float32)).to(like.device)
