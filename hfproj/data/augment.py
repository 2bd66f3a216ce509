"""SimCLR's augmentation, with all randomness a function of (seed, epoch, sample index, view).

Order: random resized crop, flip, rotation and shift, colour jitter, greyscale, blur, solarization. Operations and their
distributions are torchvision's (``RandomResizedCrop``, ``ColorJitter``, …); SimCLR's strengths are the defaults.

References:
    Chen et al., "A Simple Framework for Contrastive Learning of Visual Representations", ICML 2020, appendix A.
    Grill et al., "Bootstrap Your Own Latent", NeurIPS 2020, appendix B (solarization).

Deviations: the crop is resized bilinearly with antialiasing (SimCLR's TensorFlow code: bicubic); images stay in
floating point after loading; blur is off at 64 pixels and below, as in SimCLR's CIFAR-10 experiments (appendix B.9).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from hfproj.data import image_ops as ops
from hfproj.data.philox import uniforms
from hfproj.errors import UsageError

Number = float | int

# Columns of the uniform numbers of one view; fixed, so that switching one part off leaves the others as they were.
_FLIP, _JITTER, _GRAY, _BLUR, _SIGMA, _SOLARIZE, _ROTATION, _SHIFT_X, _SHIFT_Y = range(9)
_FACTORS, _ORDER, _CROP = slice(9, 13), slice(13, 17), slice(20, 60)
_DRAWS = 60
_ATTEMPTS = 10  # of RandomResizedCrop, before it falls back to a central crop
_CHUNK = 64  # images at a time: their intermediate results stay in the cache at 32 pixels; results do not depend on it


@dataclass(frozen=True, kw_only=True)
class Augmentation:
    """What happens to an image to make a view; each part is off at None or 0.

    Args:
        scale: Share of the image's area that the crop takes, (low, high). None: the central square, no random crop.
        ratio: Range of the crop's aspect ratio (width / height).
        flip_probability: Of the horizontal flip.
        color_jitter_probability: Of the jitter as a whole.
        color_jitter_strength: Multiplies the four strengths.
        brightness: The factor is uniform in [max(0, 1 - b), 1 + b]; so for contrast and saturation.
        contrast: See brightness.
        saturation: See brightness.
        hue: The turn is uniform in [-hue, hue]; at most 0.5 after multiplication.
        grayscale_probability: Of losing all colour.
        blur_probability: Of a Gaussian blur whose kernel is about a tenth of the image. ``"auto"``: 0.5 where the size
            is above 64 pixels, else off.
        blur_sigma: Range of its standard deviation in pixels.
        solarize_probability: Of inverting the values from 0.5 up.
        rotation_degrees: The angle is uniform in [-r, r].
        translation: The shift is uniform in [-t, t], as a share of the size, in whole pixels.

    Raises:
        UsageError: a probability outside [0, 1], a negative strength, an empty range or a hue above 0.5.

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
        for name in ("flip", "color_jitter", "grayscale", "blur", "solarize"):
            value = getattr(self, f"{name}_probability")
            if value not in (None, "auto") and not 0 <= value <= 1:
                raise UsageError(f"{name}_probability is a number from 0 to 1 (or None for off); {value} came.")
        for name in ("color_jitter_strength", "brightness", "contrast", "saturation", "hue", "rotation_degrees"):
            if (getattr(self, name) or 0) < 0:
                raise UsageError(f"{name} is at least 0 (0 or None for off); {getattr(self, name)} came.")
        for name in ("scale", "ratio", "blur_sigma"):
            pair = getattr(self, name)
            if pair is not None and not 0 < pair[0] <= pair[1]:
                raise UsageError(f"{name} is (low, high) with 0 < low ≤ high; {pair} came.")
        if self.scale is not None and self.scale[1] > 1:
            raise UsageError(f"scale is a share of the image's area, at most 1; {self.scale} came.")
        if not 0 <= (self.translation or 0) < 1:
            raise UsageError(f"translation is a share of the size, 0 ≤ translation < 1; {self.translation} came.")
        if (self.hue or 0) * (self.color_jitter_strength or 0) > 0.5:
            raise UsageError(
                f"hue · color_jitter_strength is at most 0.5 (half a turn either way is every hue); "
                f"{self.hue} · {self.color_jitter_strength} came."
            )

    def __call__(
        self,
        images: Sequence[Tensor],
        *,
        size: int,
        seed: int = 0,
        epoch: int | Sequence[int] = 0,
        index: Sequence[int],
        view: int = 0,
    ) -> Float[Tensor, "batch 3 {size} {size}"]:
        """Return one view of each image, in [0, 1].

        Args:
            images: Tensors [3, height, width], uint8 or float in [0, 1], of any sizes; all on one device, where the
                views are made from the same draws as on any other.
            size: Side of the views in pixels.
            seed: Seed of the run.
            epoch: One for all, or one per image.
            index: Number of each image in the data set.
            view: Number of the view.

        Raises:
            UsageError: a tensor that is no colour image.
        """
        for image in images:
            if image.ndim != 3 or image.shape[0] != 3 or not (image.dtype == torch.uint8 or image.is_floating_point()):
                raise UsageError(
                    "Expected images [3, height, width], uint8 or float in [0, 1]; "
                    f"{list(image.shape)} of {image.dtype} came. hfproj.data.to_rgb_tensor makes one of any image."
                )
        indices = np.asarray(index, dtype=np.int64)
        epochs = np.broadcast_to(np.asarray(epoch, dtype=np.int64), indices.shape)
        draws = uniforms(_DRAWS, seed=seed, epoch=epochs, index=indices, view=view)
        out = torch.empty(len(images), 3, size, size, device=images[0].device if len(images) else None)
        for start in range(0, len(images), _CHUNK):
            part = slice(start, start + _CHUNK)
            out[part] = self._views(images[part], draws[part], size)
        return out

    def _views(self, images: Sequence[Tensor], u: np.ndarray, size: int) -> Tensor:
        x = self._crop(images, u, size)
        _apply(x, u[:, _FLIP] < (self.flip_probability or 0), lambda part, rows: part.flip(-1))
        if self.rotation_degrees or self.translation:
            x = self._move(x, u, size)
        self._jitter(x, u)
        _apply(x, u[:, _GRAY] < (self.grayscale_probability or 0), lambda part, rows: ops.grayscale(part))
        blur = (0.5 if size > 64 else 0) if self.blur_probability == "auto" else (self.blur_probability or 0)
        # SimCLR's kernel: a radius of size // 10 // 2 either side of the centre.
        kernel_size = 2 * max(size // 20, 1) + 1
        sigma = _between(u[:, _SIGMA], *self.blur_sigma)
        _apply(x, u[:, _BLUR] < blur, lambda part, rows: ops.gaussian_blur(part, _f32(sigma[rows], part), kernel_size))
        _apply(x, u[:, _SOLARIZE] < (self.solarize_probability or 0), lambda part, rows: ops.solarize(part, 0.5))
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
        out = torch.empty(len(images), 3, size, size, device=images[0].device)
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
        strengths = [
            (value or 0) * (self.color_jitter_strength or 0)
            for value in (self.brightness, self.contrast, self.saturation, self.hue)
        ]
        jitters = (ops.adjust_brightness, ops.adjust_contrast, ops.adjust_saturation, ops.adjust_hue)
        chosen = u[:, _JITTER] < (self.color_jitter_probability or 0)
        order = np.argsort(u[:, _ORDER], axis=1)
        for turn in range(4):
            for number, (strength, jitter) in enumerate(zip(strengths, jitters)):
                if not strength:
                    continue
                low, high = (-strength, strength) if jitter is ops.adjust_hue else (max(0, 1 - strength), 1 + strength)
                factor = _between(u[:, _FACTORS][:, number], low, high)
                _apply(
                    x,
                    chosen & (order[:, turn] == number),
                    lambda part, rows, jitter=jitter, factor=factor: jitter(part, _f32(factor[rows], part)),
                )


def crop_boxes(
    u: np.ndarray,
    heights: np.ndarray,
    widths: np.ndarray,
    *,
    scale: tuple[Number, Number],
    ratio: tuple[Number, Number],
) -> np.ndarray:
    """Return the rectangles of a random resized crop, rows (top, left, height, width), int64 [4, batch].

    Ten tries of area ~ U(scale) · height · width and log aspect ~ U(log ratio); the first that fits is placed
    uniformly. If none fits, the largest central rectangle with an aspect in `ratio` is taken, as in torchvision.

    Args:
        u: Uniform numbers, [batch, 40]: 10 each for area, aspect, top and left.
        heights: Of the images, int [batch].
        widths: Of the images, int [batch].
        scale: (low, high) share of the area.
        ratio: (low, high) of width / height.

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


def _apply(x: Tensor, mask: np.ndarray, operation: Any) -> None:
    """Replace the images of `x` that are in `mask` by ``operation(those images, their rows)``."""
    rows = np.flatnonzero(mask)
    if len(rows):
        at = torch.from_numpy(rows).to(x.device)
        x.index_copy_(0, at, operation(x.index_select(0, at), rows))


def _between(u: np.ndarray, low: Number, high: Number) -> np.ndarray:
    return low + u * (high - low)


def _f32(values: np.ndarray, like: Tensor) -> Tensor:
    return torch.from_numpy(values.astype(np.float32)).to(like.device)
